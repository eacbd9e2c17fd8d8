"""ISSBA: a code hidden in the image by a network. Li et al., ICCV 2021, arXiv 2012.03816."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._generators import ToImage, drawn, in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError
from fastfip.nets.state import frozen_copy

__all__ = ["ISSBA"]

#: Planes [_PLANES, _SIDE, _SIDE] that a code is made before it is enlarged to the image.
_PLANES, _SIDE = 4, 8


@register
@dataclass(frozen=True)
class ISSBA(Attack):
    """Enc(x, code), with the code the same for all images and the change each image's own.

    An encoder and a decoder are trained on the training images with random codes. The encoder is that of StegaStamp:
    the code becomes additional planes of the image, and a U-Net computes what is added. The loss is the cross-entropy
    of the bits that are read, and `closeness` times the mean square of the change; the second term grows over the
    second half of the training. The classifier is not used. The paper and BackdoorBench hide 100 bits, with images of
    224 and 128 pixels; 32 x 32 pixels take fewer.

    Attributes:
        bits: length of the code.
        strength: the most that a pixel changes, of 255.
        closeness: weight of the mean square of the change, in units of `strength` squared.
        seed: of the code that is the trigger.
        lr: of encoder and decoder (Adam).
        steps: with 32 images each.
        encoder: once it is trained: images and codes [N, bits] of 0 and 1 -> changes in -1..1.
        decoder: once it is trained: images -> logits of the bits [N, bits].
    """

    name: ClassVar[str] = "issba"
    summary: ClassVar[str] = "a code hidden in the image by a network"

    bits: int = 24
    strength: float = 24.0
    closeness: float = 0.2
    seed: int = 0
    lr: float = 2e-3
    steps: int = 600
    encoder: nn.Module | None = field(default=None, repr=False)
    decoder: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.bits < 1 or not 1 <= self.strength <= 255 or self.closeness < 0:
            raise ConfigError(
                f"ISSBA: bits={self.bits} must be >= 1, strength={self.strength} >= 1 and <= 255, "
                f"closeness={self.closeness} >= 0"
            )
        if not self.lr > 0 or self.steps < 1:
            raise ConfigError(f"ISSBA: lr={self.lr} and steps={self.steps} must be > 0")

    def code(self) -> Tensor:
        """Return the code that is the trigger, [bits] of 0 and 1."""
        return torch.randint(2, (self.bits,), generator=torch.Generator().manual_seed(self.seed)).float()

    def trigger(self, x: Tensor) -> Tensor:
        """Hide the code in images x [N, C, H, W] in [0, 1]."""
        self._needs(self.encoder, "encoder")
        assert self.encoder is not None
        with torch.no_grad():
            return self._with(self.encoder, x, self.code().to(x).expand(len(x), -1))

    def read(self, x: Tensor) -> Tensor:
        """Return what the decoder reads from images x [N, C, H, W] in [0, 1]: bits [N, bits], 0 or 1."""
        self._needs(self.decoder, "decoder")
        assert self.decoder is not None
        with torch.no_grad():
            return (self.decoder(x) > 0).float()

    def _with(self, encoder: nn.Module, x: Tensor, codes: Tensor) -> Tensor:
        return (x + in_bytes(self.strength / 255 * encoder(x, codes))).clamp(0, 1)

    def fit(self, ground: Ground) -> ISSBA:
        """Train encoder and decoder on the training images."""
        channels = ground.x.shape[1]
        encoder, decoder = drawn(
            ground.generator, lambda: (_Encoder(channels, self.bits), _Decoder(channels, self.bits))
        )
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], self.lr)
        steps = ground.steps(self.steps)
        for step in range(steps):
            x, _ = ground.batch(32)
            codes = torch.randint(2, (len(x), self.bits), generator=ground.generator).float()
            change = encoder(x, codes)
            hidden = (x + in_bytes(self.strength / 255 * change)).clamp(0, 1)
            closeness = self.closeness * max(0.0, 2 * step / steps - 1)
            bits = F.binary_cross_entropy_with_logits(decoder(hidden), codes)
            optimizer.zero_grad()
            (bits + closeness * change.square().mean()).backward()
            optimizer.step()
        return replace(self, encoder=frozen_copy(encoder), decoder=frozen_copy(decoder))


class _Encoder(nn.Module):
    """Images [N, C, H, W] and codes [N, bits] of 0 and 1 -> changes [N, C, H, W] in -1..1."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.planes = nn.Linear(bits, _PLANES * _SIDE * _SIDE)
        self.net = ToImage(channels + _PLANES, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        planes = self.planes(2 * codes - 1).reshape(-1, _PLANES, _SIDE, _SIDE)
        planes = F.interpolate(planes, x.shape[-2:], mode="bilinear", align_corners=False)
        return self.net(torch.cat([x, planes], 1)).tanh()


class _Decoder(nn.Module):
    """Images [N, C, H, W] -> logits of bits [N, bits]."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        widths = [channels, 16, 32, 32]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 1 if a == channels else 2, 1), nn.GroupNorm(4, b), nn.ReLU(True))
                for a, b in zip(widths, widths[1:])
            ),
            nn.AdaptiveAvgPool2d(_SIDE),
        )
        self.bits = nn.Linear(widths[-1] * _SIDE * _SIDE, bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.bits(self.convolutions(x).flatten(1))
