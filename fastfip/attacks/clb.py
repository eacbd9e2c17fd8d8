"""CLB: label-consistent poisoning of images made hard to learn. Turner et al., arXiv 1912.02771."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fastfip.attacks._clean import CleanClassifier, clean_classifier
from fastfip.attacks._generators import in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError

__all__ = ["CLB"]

#: Of the top left corner, from above: +1 makes a pixel white, -1 black. Those at the right mirror it.
_CORNER = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))


@register
@dataclass(frozen=True)
class CLB(Attack):
    """A 3 x 3 pattern of black and white in the four corners; in training, on adversarial images of the target class.

    Projected gradient steps on a clean classifier turn target images away from their label (section 4.2 of the paper,
    variant "adversarial, l_inf"), so that the model can only learn the pattern. Test images get only the pattern.
    BackdoorBench: eps 8, step 1.5, 100 steps without a random start, amplitude 1; that pattern, and a pixel of it
    becomes larger with images of more than 32 pixels.

    Attributes:
        eps: largest change of a pixel by the adversarial steps, of 255.
        step: of one of them, of 255.
        iterations: how many.
        amplitude: of the pattern, 0 to 1.
        classifier: the clean one, from `fit`.
        target: the class whose images are poisoned, from `fit`.
        steps: how many iterations the effort leaves, from `fit`.
    """

    name: ClassVar[str] = "clb"
    summary: ClassVar[str] = "four corners on adversarial images of the target class"
    clean_label: ClassVar[bool] = True

    eps: float = 8.0
    step: float = 1.5
    iterations: int = 100
    amplitude: float = 1.0
    classifier: CleanClassifier | None = field(default=None, repr=False)
    target: int | None = field(default=None, repr=False)
    steps: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255 or not self.step > 0 or self.iterations < 1 or not 0 < self.amplitude <= 1:
            raise ConfigError(
                f"CLB: eps={self.eps} must be > 0 and <= 255, step={self.step} > 0, "
                f"iterations={self.iterations} >= 1, amplitude={self.amplitude} > 0 and <= 1"
            )

    def corners(self, height: int, width: int) -> Tensor:
        """Return the pattern [H, W], in -amplitude..amplitude, 0 outside the corners."""
        scale = max(1, min(height, width) // 32)
        corner = torch.tensor(_CORNER, dtype=torch.float32).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        side = len(corner)
        if min(height, width) < 2 * side:
            raise ConfigError(f"CLB: images of {height} x {width} have no room for four corners of {side} x {side}")
        out = torch.zeros(height, width, dtype=torch.float32)
        out[:side, :side], out[:side, -side:] = corner, corner.flip(1)
        out[-side:, :side], out[-side:, -side:] = corner, corner.flip(1)
        return self.amplitude * out

    def trigger(self, x: Tensor) -> Tensor:
        """Add the pattern to images x [N, C, H, W] in [0, 1]."""
        return (x + self.corners(*x.shape[-2:]).to(x)).clamp(0, 1)

    def adversarial(self, x: Tensor) -> Tensor:
        """Return images of the target class [N, C, H, W] turned away from it, eps/255 off at most.

        Raises:
            ConfigError: it has not been fitted.
        """
        self._needs(self.classifier, "clean classifier")
        assert self.classifier is not None and self.target is not None
        y = torch.full((len(x),), self.target, device=x.device)
        moved, eps = x.detach(), self.eps / 255
        with torch.enable_grad():
            for _ in range(self.steps or self.iterations):
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(self.classifier.logits(moved), y, reduction="sum")
                (slope,) = torch.autograd.grad(loss, moved)
                moved = (moved + self.step / 255 * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        return in_bytes(moved.detach())

    @override
    def training_trigger(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.trigger(self.adversarial(x))

    @override
    def fit(self, ground: Ground) -> CLB:
        target = ground.single_target(self.name)
        steps = ground.steps(self.iterations)
        return replace(self, classifier=clean_classifier(ground), target=target, steps=steps)
