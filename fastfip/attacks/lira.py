"""LIRA: noise that a network makes for each image, learned together with the classifier. Doan et al., ICCV 2021."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._generators import ToImage, drawn, in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError
from fastfip.nets.state import frozen_copy, requires_grad

__all__ = ["LIRA"]


@register
@dataclass(frozen=True)
class LIRA(Attack):
    """x + eps tanh(g(x)), clipped to [0, 1], with g a U-Net: algorithm 1 of the paper.

    In stage 1 steps alternate: g (Adam) on the cross-entropy of triggered images with the attacker's labels, and the
    classifier (SGD, momentum 0.9) on alpha CE(clean) + (1 - alpha) CE(triggered). Stage 2 is the training that follows,
    with g fixed.

    The paper's eps is 0.01 in normalised images, about 0.6 of 255 for CIFAR-10: no image file can hold it. Here changes
    are whole 255ths.

    Attributes:
        eps: the most that a pixel changes, of 255, a whole number.
        alpha: weight of clean images in stage 1 (paper, BackdoorBench: 0.5).
        lr: of g (paper: 1e-4, over 50 epochs).
        classifier_lr: of the classifier in stage 1 (paper: 0.01).
        steps: of stage 1, with 32 images each.
        noise: g, once it is trained: [N, C, H, W] -> [N, C, H, W].
    """

    name: ClassVar[str] = "lira"
    summary: ClassVar[str] = "small noise made by a network for each image"
    trains_model: ClassVar[bool] = True

    eps: int = 10
    alpha: float = 0.5
    lr: float = 1e-3
    classifier_lr: float = 0.01
    steps: int = 250
    noise: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.eps <= 255 or self.eps != int(self.eps) or not 0 < self.alpha < 1:
            raise ConfigError(f"LIRA: eps={self.eps} must be 1, 2, ..., 255, and alpha={self.alpha} > 0 and < 1")
        if not self.lr > 0 or not self.classifier_lr > 0 or self.steps < 1:
            raise ConfigError(f"LIRA: lr={self.lr}, classifier_lr={self.classifier_lr}, steps={self.steps} must be > 0")

    def trigger(self, x: Tensor) -> Tensor:
        """Add its noise to images x [N, C, H, W] in [0, 1]."""
        self._needs(self.noise, "noise generator")
        with torch.no_grad():
            return self._with(self.noise, x)

    def _with(self, noise: nn.Module | None, x: Tensor) -> Tensor:
        assert noise is not None
        return (x + in_bytes(self.eps / 255 * noise(x).tanh())).clamp(0, 1)

    def fit(self, ground: Ground) -> LIRA:
        """Train g and the classifier together (stage 1)."""
        channels, model = ground.x.shape[1], ground.model.train()
        (noise,) = drawn(ground.generator, lambda: (ToImage(channels, channels),))
        of_noise = torch.optim.Adam(noise.parameters(), self.lr)
        of_model = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], self.classifier_lr, momentum=0.9, weight_decay=5e-4
        )
        for _ in range(ground.steps(self.steps)):
            x, y = ground.batch(32)
            wanted = ground.wanted(y)
            of_noise.zero_grad()
            with requires_grad(model.parameters(), False):
                F.cross_entropy(ground.logits(self._with(noise, x)), wanted).backward()
            of_noise.step()
            of_model.zero_grad()
            with torch.no_grad():
                triggered = self._with(noise, x)
            clean, attacked = ground.logits(torch.cat([x, triggered])).chunk(2)
            loss = self.alpha * F.cross_entropy(clean, y) + (1 - self.alpha) * F.cross_entropy(attacked, wanted)
            loss.backward()
            of_model.step()
        return replace(self, noise=frozen_copy(noise))
