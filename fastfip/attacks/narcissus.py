"""Narcissus: noise that points inward to the target class. Zeng et al., CCS 2023, arXiv 2204.05255."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fastfip.attacks._clean import checked_pattern, clean_classifier, fitting, leading_pattern
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError, DataError

__all__ = ["Narcissus"]


@register
@dataclass(frozen=True)
class Narcissus(Attack):
    """Noise, added to images of the target class in training and enlarged to test images of the others.

    The noise lowers the loss of target images on a surrogate, a clean classifier: eq. (2) of the paper. The surrogate
    of the paper was trained on other data and then a little on the target class; here it is a copy of the given
    network. Bound and factor are those of the paper. The paper makes 1,000 rounds over the target class and poisons
    0.05 % of a training set; here 1 % is usual.

    If a network is tuned from the network that the noise was found on, it follows the enlarged noise without having
    seen poisoned images. Compare the result of a defence with the ASR of the clean network.

    Attributes:
        eps: largest value of the noise, of 255.
        amplify: factor of the noise on test images.
        iterations: steps of Adam.
        lr: of Adam, of 255.
        pattern: [C, H, W] in -eps/255..eps/255, found by `fit`; one that is given stays.
        found: whether `fit` found the pattern, and may find another.
    """

    name: ClassVar[str] = "narcissus"
    summary: ClassVar[str] = "clean-label noise towards the target class"
    clean_label: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 0.01

    eps: float = 16.0
    amplify: float = 3.0
    iterations: int = 600
    lr: float = 1.3
    pattern: Tensor | None = field(default=None, repr=False)
    found: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        checked_pattern(self.pattern, "Narcissus")
        if not 0 < self.eps <= 255 or not self.amplify > 0 or self.iterations < 1 or not self.lr > 0:
            raise ConfigError(
                f"Narcissus: eps={self.eps} must be > 0 and <= 255, amplify={self.amplify} > 0, "
                f"iterations={self.iterations} >= 1, lr={self.lr} > 0"
            )

    def trigger(self, x: Tensor) -> Tensor:
        """Add the enlarged noise to images x [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: it has not been fitted.
            DataError: the noise is for images of another shape.
        """
        return self._with(x, self.amplify)

    @override
    def training_trigger(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._with(x, 1)

    def _with(self, x: Tensor, factor: float) -> Tensor:
        self._needs(self.pattern, "noise")
        assert self.pattern is not None
        return (x + factor * fitting(self.pattern, x, self.name)).clamp(0, 1)

    @override
    def fit(self, ground: Ground) -> Narcissus:
        if self.pattern is not None and not self.found:
            return self
        target = ground.single_target(self.name)
        own = torch.nonzero(ground.y == target).flatten()
        if len(own) == 0:
            raise DataError(f"narcissus needs images of its target class, {target}: there are none")
        pattern = leading_pattern(
            ground, clean_classifier(ground), ground.steps(self.iterations), self.lr / 255, self.eps / 255, only=own
        )
        return replace(self, pattern=pattern, found=True)
