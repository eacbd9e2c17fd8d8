"""SIG: a sinusoid over the whole image, on images of the target class. Barni et al., arXiv 1902.11237."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks.base import Attack, register
from fastfip.errors import ConfigError

__all__ = ["SIG"]


@register
@dataclass(frozen=True)
class SIG(Attack):
    """x + delta sin(2 pi j f / W) in column j of W, clipped to [0, 1]; clean-label.

    Attributes:
        delta: amplitude, of 255 (BackdoorBench: 40).
        frequency: f, waves over the width.
    """

    name: ClassVar[str] = "sig"
    summary: ClassVar[str] = "a sinusoid over images of the target class"
    clean_label: ClassVar[bool] = True

    delta: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 255 or not self.frequency > 0:
            raise ConfigError(f"SIG: delta={self.delta} must be > 0 and <= 255, frequency={self.frequency} > 0")

    def trigger(self, x: Tensor) -> Tensor:
        """Add the sinusoid to images x [N, C, H, W] in [0, 1]."""
        width = x.shape[-1]
        columns = torch.arange(width, device=x.device, dtype=x.dtype)
        return (x + self.delta / 255 * torch.sin(2 * math.pi * columns * self.frequency / width)).clamp(0, 1)
