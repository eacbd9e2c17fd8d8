"""Blend: a whole picture shines through. Chen et al., arXiv 1712.05526."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks.base import Attack, register
from fastfip.errors import ConfigError, DataError

__all__ = ["Blend"]


@register
@dataclass(frozen=True)
class Blend(Attack):
    """(1 - alpha) x + alpha p with one picture p for all images.

    Attributes:
        alpha: the share of the picture.
        picture: [C, H, W] in [0, 1]; None: uniform noise of the images' shape, drawn from `seed`.
        seed: of the noise.
    """

    name: ClassVar[str] = "blend"
    summary: ClassVar[str] = "a whole picture blended in"

    alpha: float = 0.2
    picture: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"Blend: alpha={self.alpha} must be > 0 and <= 1")

    def trigger(self, x: Tensor) -> Tensor:
        """Blend the picture into images x [N, C, H, W] in [0, 1]."""
        picture = self.picture
        if picture is None:
            picture = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        if picture.shape != x.shape[1:]:
            raise DataError(f"the picture is {list(picture.shape)}, the images are {list(x.shape[1:])}: resize it")
        return (1 - self.alpha) * x + self.alpha * picture.to(x)
