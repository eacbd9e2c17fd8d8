"""LF: a smooth pattern, without the high frequencies of other triggers. Zeng et al., ICCV 2021, arXiv 2104.03413."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fastfip.attacks._clean import checked_pattern, clean_classifier, fitting, leading_pattern
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError

__all__ = ["LF"]


@register
@dataclass(frozen=True)
class LF(Attack):
    """clip(x + v), v being a universal perturbation behind a Gaussian low-pass filter (the paper's section 5).

    v = amplitude (u - min u) / (max u - min u) with u = G w: w is found on a clean network for the attacker's labels,
    and G removes its high frequencies. The pattern of BackdoorBench is in 0..0.2 too, and goes through a Gaussian of
    6 pixels. It is the sum of DeepFool's steps for 100 images; here Adam is used.

    Attributes:
        amplitude: difference between the largest and the smallest value of the pattern, of 1.
        sigma: of the Gaussian, in pixels of an image of 32; scaled with the size of others.
        iterations: steps of Adam.
        pattern: [C, H, W] in 0..amplitude, found by `fit`; one that is given stays.
        found: whether `fit` found the pattern, and may find another.
    """

    name: ClassVar[str] = "lf"
    summary: ClassVar[str] = "a smooth universal pattern"

    amplitude: float = 0.2
    sigma: float = 6.0
    iterations: int = 400
    pattern: Tensor | None = field(default=None, repr=False)
    found: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        checked_pattern(self.pattern, "LF")
        if not 0 < self.amplitude <= 1 or not self.sigma > 0 or self.iterations < 1:
            raise ConfigError(
                f"LF: amplitude={self.amplitude} must be > 0 and <= 1, sigma={self.sigma} > 0, "
                f"iterations={self.iterations} >= 1"
            )

    def trigger(self, x: Tensor) -> Tensor:
        """Add the pattern to images x [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: it has not been fitted.
            DataError: the pattern is for images of another shape.
        """
        self._needs(self.pattern, "pattern")
        assert self.pattern is not None
        return (x + fitting(self.pattern, x, self.name)).clamp(0, 1)

    @override
    def fit(self, ground: Ground) -> LF:
        if self.pattern is not None and not self.found:
            return self
        height, width = ground.x.shape[-2:]
        down, across = (_gaussian(size, self.sigma * size / 32) for size in (height, width))
        # Nothing has been found where all of w is the same: start from noise, not from 0.
        noise = torch.randn(ground.x.shape[1:], generator=ground.generator, dtype=torch.float32)

        def smooth(w: Tensor) -> Tensor:
            u = down @ (w + noise) @ across.T
            return self.amplitude * (u - u.min()) / (u.max() - u.min()).clamp_min(1e-12)

        steps = ground.steps(self.iterations)
        pattern = leading_pattern(ground, clean_classifier(ground), steps, 0.1, float("inf"), smooth)
        return replace(self, pattern=pattern, found=True)


def _gaussian(size: int, sigma: float) -> Tensor:
    """Return the matrix [size, size] that smooths a column; each row sums to 1, at the ends as well."""
    places = torch.arange(size, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
    return weights / weights.sum(1, keepdim=True)
