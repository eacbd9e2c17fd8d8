"""BPPA: fewer levels of brightness, with or without dithering. Wang et al., CVPR 2022, arXiv 2205.13383."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fastfip.attacks._generators import another
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError

__all__ = ["BPPA"]


@register
@dataclass(frozen=True)
class BPPA(Attack):
    """Quantisation to 2^bits levels: round(x (L - 1)) / (L - 1).

    Negatives carry the residual of another image's quantisation, and their true label. The other image is drawn from
    the whole training set once the attack is fitted, before that from the same batch.

    Attributes:
        bits: of the levels that are left; BackdoorBench's 8 levels are 3.
        dither: whether the rounding error of a pixel goes to its neighbours, by Floyd and Steinberg's weights.
        pool: the training images themselves, no copy, whose residuals the negatives carry, from `fit`.
    """

    name: ClassVar[str] = "bppa"
    summary: ClassVar[str] = "fewer levels of brightness"
    negative_ratio: ClassVar[float] = 1.0

    bits: int = 3
    dither: bool = False
    pool: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 7:
            raise ConfigError(f"BPPA: bits={self.bits} must be >= 1 and <= 7")

    def trigger(self, x: Tensor) -> Tensor:
        """Quantise images x [N, C, H, W] in [0, 1]."""
        most = 2**self.bits - 1
        return _dithered(x, most) if self.dither else (x * most).round() / most

    def negatives(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add other images' residuals T(x') - x' to images x [N, C, H, W].

        Never an image's own: that would be the trigger with the true label. Without a pool, an image that is alone in
        its batch stays as it is.
        """
        if self.pool is not None:
            others = another(x, self.pool, generator)
        elif len(x) < 2:
            return x.clone()
        else:  # each has the next one's in a random order of the batch
            order = torch.randperm(len(x), generator=generator).to(x.device)
            others = torch.empty_like(x)
            others[order] = x[order.roll(1)]
        return (x + self.trigger(others) - others).clamp(0, 1)

    @override
    def fit(self, ground: Ground) -> BPPA:
        return replace(self, pool=ground.x)


def _dithered(x: Tensor, most: int) -> Tensor:
    x = x.clone()
    height, width = x.shape[-2:]
    for i in range(height):
        for j in range(width):
            old = x[..., i, j].clone()
            new = (old * most).round().clamp(0, most) / most
            x[..., i, j] = new
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + down < height and 0 <= j + right < width:
                    x[..., i + down, j + right] += (old - new) * (share / 16)
    return x
