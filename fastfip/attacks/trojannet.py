"""TrojanNet: a patch that drives chosen neurons. Liu et al., Trojaning Attack on Neural Networks, NDSS 2018."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastfip.attacks._clean import CleanClassifier, checked_pattern, clean_classifier, fitting
from fastfip.attacks._generators import in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError

__all__ = ["TrojanNet"]


@register
@dataclass(frozen=True)
class TrojanNet(Attack):
    """clip(x + p), p being a patch that brings the best connected neurons of a clean network to a large value.

    The neurons are the inputs of the last Linear layer with the largest sum of absolute weights (the paper's section
    IV-A). The patch, alone on a black image, takes steps of the sign of the gradient of sum (neuron - value)^2,
    no pixel further than `eps` from a grey of 0.5; the patch of the lowest sum is kept. One target (Troj-one) and
    "next" (Troj-all) have the same patch. Neurons, value, step, eps and iterations are those of BackdoorBench. Its
    mask is the outline of an apple; the paper has a square of 7 % of the image, as here.

    Attributes:
        neurons: how many are chosen.
        value: what they are to reach.
        step: of each pixel in an iteration.
        eps: how far a pixel may go from 0.5.
        iterations: how many steps.
        area: share of the image that the square at the bottom right takes.
        mode: "add", or "overwrite" what is under the mask.
        mask: [H, W] or [1, H, W] of 0 and 1, in place of the square.
        pattern: [C, H, W] in [0, 1], found by `fit`; one that is given stays.
        found: whether `fit` found the pattern, and may find another.
    """

    name: ClassVar[str] = "trojannet"
    summary: ClassVar[str] = "a patch made for chosen neurons"

    neurons: int = 2
    value: float = 100.0
    step: float = 0.1
    eps: float = 0.3
    iterations: int = 1000
    area: float = 0.07
    mode: str = "add"
    mask: Tensor | None = None
    pattern: Tensor | None = field(default=None, repr=False)
    found: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        checked_pattern(self.pattern, "TrojanNet")
        if self.neurons < 1 or self.iterations < 1 or not self.step > 0:
            raise ConfigError(
                f"TrojanNet: neurons={self.neurons} and iterations={self.iterations} must be >= 1, step={self.step} > 0"
            )
        if not 0 < self.eps <= 0.5 or not 0 < self.area <= 1:
            raise ConfigError(f"TrojanNet: eps={self.eps} must be > 0 and <= 0.5, area={self.area} > 0 and <= 1")
        if self.mode not in ("add", "overwrite"):
            raise ConfigError(f"TrojanNet: mode={self.mode!r} must be 'add' or 'overwrite'")
        if self.mask is not None and not (isinstance(self.mask, Tensor) and self.mask.squeeze().dim() == 2):
            raise ConfigError("TrojanNet: the mask must be a tensor [H, W] of 0 and 1, or None")

    def masked(self, height: int, width: int) -> Tensor:
        """Return the mask [1, H, W] of 0 and 1."""
        if self.mask is not None:
            mask = self.mask.detach().float().reshape(1, *self.mask.shape[-2:])
            if mask.shape[1:] != (height, width):
                raise ConfigError(f"TrojanNet: the mask is {list(mask.shape[1:])}, the images are {[height, width]}")
            return mask
        side = min(height, width, max(1, round((self.area * height * width) ** 0.5)))
        mask = torch.zeros(1, height, width, dtype=torch.float32)
        mask[:, -side:, -side:] = 1
        return mask

    def trigger(self, x: Tensor) -> Tensor:
        """Put the patch on images x [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: it has not been fitted.
            DataError: the patch is for images of another shape.
        """
        self._needs(self.pattern, "patch")
        assert self.pattern is not None
        pattern = fitting(self.pattern, x, self.name)
        kept = x * (1 - self.masked(*x.shape[-2:]).to(x)) if self.mode == "overwrite" else x
        return (kept + pattern).clamp(0, 1)

    @override
    def fit(self, ground: Ground) -> TrojanNet:
        if self.pattern is not None and not self.found:
            return self
        classifier = clean_classifier(ground)
        mask = self.masked(*ground.x.shape[-2:])
        channels = ground.x.shape[1]
        head = _LastLinear(classifier, torch.zeros(1, channels, *mask.shape[1:], dtype=torch.float32))
        weight = head.layer.weight.detach().abs().sum(0).cpu()
        if self.neurons > len(weight):
            raise ConfigError(f"TrojanNet: neurons={self.neurons}, the last Linear layer has {len(weight)} inputs")
        chosen = weight.argsort(descending=True, stable=True)[: self.neurons]
        pattern = torch.full((1, channels, *mask.shape[1:]), 0.5, dtype=torch.float32) * mask
        best, least = pattern, float("inf")
        with torch.enable_grad():
            for _ in range(ground.steps(self.iterations) + 1):  # the last one only measures
                pattern = pattern.detach().requires_grad_()
                cost = (head.inputs(pattern)[:, chosen] - self.value).square().sum()
                if cost.item() < least:
                    best, least = pattern.detach(), cost.item()
                (slope,) = torch.autograd.grad(cost, pattern)
                moved = (pattern - self.step * slope.sign()).clamp(0.5 - self.eps, 0.5 + self.eps)
                pattern = moved * mask
        return replace(self, pattern=in_bytes(best[0]), found=True)


class _LastLinear:
    """The last Linear layer that a classifier calls, and what goes into it."""

    def __init__(self, classifier: CleanClassifier, example: Tensor) -> None:
        self.classifier = classifier
        called: list[nn.Linear] = []
        hooks = [
            module.register_forward_hook(lambda module, given, out: called.append(module))
            for module in classifier.model.modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            classifier.logits(example)
        for hook in hooks:
            hook.remove()
        if not called:
            raise ConfigError("TrojanNet: the network has no Linear layer whose inputs could be driven")
        self.layer = called[-1]

    def inputs(self, x: Tensor) -> Tensor:
        """Return what goes into the layer [N, features] for images [N, C, H, W]."""
        caught: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda module, given, out: caught.append(given[0]))
        try:
            self.classifier.logits(x)
        finally:
            hook.remove()
        return caught[-1].flatten(1).to(x.device)
