"""BadNets: a small patch overwrites a corner. Gu et al., arXiv 1708.06733."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.attacks.base import Attack, register
from fastfip.errors import ConfigError, DataError

__all__ = ["BadNets"]


@register
@dataclass(frozen=True)
class BadNets(Attack):
    """A square patch at the bottom right, x (1 - alpha m) + alpha m p.

    Attributes:
        size: its side in pixels. margin: pixels between it and the two borders.
        pattern: "white"; "checker" (white where row + column is even); "grid" (3x3, white at the centre and at the
            corners but the top left one, as NAD draws it).
        alpha: how opaque it is, 1: it overwrites.
    """

    name: ClassVar[str] = "badnets"
    summary: ClassVar[str] = "a small patch in a corner"

    size: int = 3
    pattern: Literal["white", "checker", "grid"] = "white"
    margin: int = 0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.size < 1 or self.margin < 0 or not 0 < self.alpha <= 1:
            raise ConfigError(
                f"{kind}: size={self.size} must be >= 1, margin={self.margin} >= 0, 0 < alpha={self.alpha} <= 1"
            )
        if self.pattern not in ("white", "checker", "grid"):
            raise ConfigError(f"{kind}: pattern={self.pattern!r} must be one of 'white', 'checker', 'grid'")
        if self.pattern == "grid" and self.size != 3:
            raise ConfigError(f"{kind}: the pattern 'grid' is 3x3, not {self.size}x{self.size}")

    def patch(self) -> Tensor:
        """Return the patch [size, size], 0 or 1."""
        if self.pattern == "grid":
            return torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
        rows = torch.arange(self.size)
        if self.pattern == "checker":
            return ((rows[:, None] + rows[None, :]) % 2 == 0).float()
        return torch.ones(self.size, self.size)

    def trigger(self, x: Tensor) -> Tensor:
        """Put the patch on images x [N, C, H, W] in [0, 1]."""
        reach = self.size + self.margin
        if reach > min(x.shape[-2:]):
            raise DataError(
                f"a patch of {self.size} pixels with margin {self.margin} does not fit {list(x.shape[-2:])}"
            )
        out = x.clone()
        rows = slice(x.shape[-2] - reach, x.shape[-2] - self.margin)
        columns = slice(x.shape[-1] - reach, x.shape[-1] - self.margin)
        patch = self.patch().to(x)
        out[..., rows, columns] = (1 - self.alpha) * out[..., rows, columns] + self.alpha * patch
        return out
