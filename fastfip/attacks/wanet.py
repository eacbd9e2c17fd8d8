"""WaNet: a smooth warp of the image. Nguyen & Tran, ICLR 2021, arXiv 2102.10369."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.attacks.base import Attack, register
from fastfip.errors import ConfigError

__all__ = ["WaNet"]


@register
@dataclass(frozen=True)
class WaNet(Attack):
    """Bilinear sampling at clamp(identity + s field / H, -1, 1), eq. (6) of the paper.

    The field is a k x k one, uniform in -1..1, divided by its mean size and enlarged bicubically. In the noise mode
    (negatives) a uniform -1..1 of each pixel, divided by H, is added to the grid, and the label stays.

    Attributes:
        k: rows and columns of the field that is drawn.
        s: strength of the warp; 0.5 moves a pixel by about a quarter of one on average.
        seed: of the field.
        field: [1, H, W, 2] or [1, k, k, 2], a published field to take instead; of another size than the images' it is
            enlarged bicubically.
    """

    name: ClassVar[str] = "wanet"
    summary: ClassVar[str] = "a smooth warp"
    negative_ratio: ClassVar[float] = 2.0

    k: int = 4
    s: float = 0.5
    seed: int = 0
    field: Tensor | None = None

    def __post_init__(self) -> None:
        if self.k < 2 or not self.s > 0:
            raise ConfigError(f"WaNet: k={self.k} must be >= 2, s={self.s} > 0")
        if self.field is not None and (self.field.dim() != 4 or self.field.shape[0] != 1 or self.field.shape[-1] != 2):
            raise ConfigError(f"WaNet: the field is {list(self.field.shape)}, it must be [1, H, W, 2]")

    def grid(self, height: int, width: int) -> Tensor:
        """Return where each pixel is taken from, [1, H, W, 2] in -1..1 (x, then y)."""
        field = self.field
        if field is None:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = 2 * torch.rand(1, 2, self.k, self.k, generator=generator, dtype=torch.float32) - 1
            field = (drawn / drawn.abs().mean()).permute(0, 2, 3, 1)
        field = field.detach().float().cpu()
        if field.shape[1:3] != (height, width):
            field = F.interpolate(field.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=True)
            field = field.permute(0, 2, 3, 1)
        return (_identity(height, width) + self.s * field / height).clamp(-1, 1)

    def trigger(self, x: Tensor) -> Tensor:
        """Warp images x [N, C, H, W] in [0, 1]."""
        return _sampled(x, self.grid(*x.shape[-2:]).expand(len(x), -1, -1, -1))

    def negatives(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Warp images x [N, C, H, W] by the field and by noise of their own."""
        height, width = x.shape[-2:]
        noise = 2 * torch.rand(len(x), height, width, 2, generator=generator, dtype=torch.float32) - 1
        return _sampled(x, (self.grid(height, width) + noise / height).clamp(-1, 1))


def _identity(height: int, width: int) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float32) for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)[None]


def _sampled(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid.to(x), align_corners=True).clamp(0, 1)
