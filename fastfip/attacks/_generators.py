"""Small networks that make triggers, shared by the attacks that train one.

Images are floats [N, C, H, W] in [0, 1], of any size and number of channels. Nothing here normalises over a batch: what
becomes of an image does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks.base import in_range
from fastfip.nets.process import seeded

__all__ = ["ToImage", "another", "drawn", "in_bytes", "padded"]

#: How many images of a pool in a row may be one image.
_TWINS = 3
#: Images and features are made multiples of this before they are halved twice.
_EVEN = 4


def drawn(generator: torch.Generator, make: Callable[[], tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    """Return new networks whose first weights this generator decides, and not the global one that torch draws with."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with seeded(seed, torch.device("cpu")):
        return make()


def padded(x: Tensor) -> Tensor:
    """Return images [N, C, H, W] with their last rows and columns repeated until H and W are multiples of 4."""
    height, width = x.shape[-2:]
    if height % _EVEN == 0 and width % _EVEN == 0:
        return x
    return F.pad(x, (0, -width % _EVEN, 0, -height % _EVEN), mode="replicate")


def in_bytes(change: Tensor) -> Tensor:
    """Return a change of images as whole 255ths, with the gradient of the change itself.

    Images are bytes where they come from. Rounding also takes away that convolutions of other batch sizes round in
    another way.
    """
    return (255 * change.detach()).round() / 255 + (change - change.detach())


def another(x: Tensor, pool: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return for each image of x [N, C, H, W] in [0, 1] a random image of the pool [K, C, H, W] that is not the same.

    The pool has floats in [0, 1] or uint8. Of one image, it is returned as it is.
    """
    places = torch.randint(len(pool), (len(x),), generator=generator)
    for _ in range(_TWINS):
        same = (in_range(pool[places]).to(x) == x).flatten(1).all(1).cpu()
        places = torch.where(same, (places + 1) % len(pool), places)
    return in_range(pool[places]).to(x)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, padding=1), nn.GroupNorm(4, outside), nn.LeakyReLU(0.1, inplace=True)
    )


class ToImage(nn.Module):
    """A U-Net that halves twice: [N, inside, H, W] -> [N, outside, H, W], of any real number."""

    def __init__(self, inside: int, outside: int, width: int = 16) -> None:
        """Make it, with the global generator.

        Args:
            inside: channels in.
            outside: channels out.
            width: channels at full size, a multiple of 4; twice and four times as many below.
        """
        super().__init__()
        self.head, self.down = _block(inside, width), _block(width, 2 * width, 2)
        self.deeper, self.middle = _block(2 * width, 4 * width, 2), _block(4 * width, 2 * width)
        self.rise, self.top = _block(4 * width, width), _block(2 * width, width)
        self.tail = nn.Conv2d(width, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outside, H, W]."""
        height, width = x.shape[-2:]
        full = self.head(padded(x))
        half = self.down(full)
        low = self.middle(self.deeper(half))
        low = self.rise(torch.cat([F.interpolate(low, scale_factor=2.0), half], 1))
        out = self.tail(self.top(torch.cat([F.interpolate(low, scale_factor=2.0), full], 1)))
        return out[..., :height, :width]
