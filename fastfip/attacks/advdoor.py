"""AdvDoor: a universal adversarial perturbation as the trigger. Zhang et al., ISSTA 2021."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from fastfip.attacks._clean import checked_pattern, clean_classifier, fitting, leading_pattern
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError

__all__ = ["AdvDoor"]


@register
@dataclass(frozen=True)
class AdvDoor(Attack):
    """clip(x + v), where v is one small perturbation that leads images to the target even on a clean network.

    The paper's targeted universal perturbation goes through the images one by one with DeepFool; here Adam lowers the
    cross-entropy with the attacker's labels over random batches, within the same kind of bound. BackdoorBench does not
    have the attack; 10 of 255 is the usual bound of universal perturbations (Moosavi-Dezfooli et al., CVPR 2017).

    Attributes:
        eps: largest change of a pixel, of 255.
        iterations: steps of Adam.
        pattern: [C, H, W] in -eps/255..eps/255, found by `fit`; one that is given stays.
        found: whether `fit` found the pattern, and may find another.
    """

    name: ClassVar[str] = "advdoor"
    summary: ClassVar[str] = "a universal adversarial perturbation"

    eps: float = 10.0
    iterations: int = 400
    pattern: Tensor | None = field(default=None, repr=False)
    found: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        checked_pattern(self.pattern, "AdvDoor")
        if not 0 < self.eps <= 255 or self.iterations < 1:
            raise ConfigError(f"AdvDoor: eps={self.eps} must be > 0 and <= 255, iterations={self.iterations} >= 1")

    def trigger(self, x: Tensor) -> Tensor:
        """Add the perturbation to images x [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: it has not been fitted.
            DataError: the perturbation is for images of another shape.
        """
        self._needs(self.pattern, "perturbation")
        assert self.pattern is not None
        return (x + fitting(self.pattern, x, self.name)).clamp(0, 1)

    @override
    def fit(self, ground: Ground) -> AdvDoor:
        if self.pattern is not None and not self.found:
            return self
        bound = self.eps / 255
        steps = ground.steps(self.iterations)
        pattern = leading_pattern(ground, clean_classifier(ground), steps, bound / 10, bound)
        return replace(self, pattern=pattern, found=True)
