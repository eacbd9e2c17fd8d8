"""Input-aware: each image has a trigger that works on no other. Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._generators import ToImage, another, drawn, in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError
from fastfip.nets.state import frozen_copy

__all__ = ["Dynamic"]

#: Training images that lend their patterns to negatives.
_POOL = 256

#: Images are measured in this against masks: about the deviation of pixels, by which the paper's are normalised.
_UNIT = 0.25


@register
@dataclass(frozen=True)
class Dynamic(Attack):
    """(1 - m(x)) x + m(x) p(x): a mask network m and a pattern network p, both U-Nets.

    m is trained first, so that masks are small and differ between images. Then p and the classifier are trained
    together on four terms: the cross-entropy of clean images, of triggered images with the attacker's labels, and of
    images that carry the mask and pattern of another image with their true labels (the negatives), and a term that
    makes patterns differ between images. "Dyn-one" has a class as its target, "Dyn-all" has "next". All-to-all takes
    longer: on CIFAR-10, in the same 4 epochs of 10,000 images, a ResNet-20 reached an ASR of 93 for one class and of
    48 for "next" (single trials).

    Defaults are those of the paper and BackdoorBench, with three exceptions: the number of steps (600 epochs there),
    the learning rate of masks and patterns (0.01 there; in a few steps, this gives all patterns one colour and costs
    accuracy), and the shares in a batch of this training, which are thirds (80, 10 and 10 % there). The mask is tanh(20
    u - 10) / 2 + 1/2, with u in (0, 1).

    Attributes:
        density: what a mask may have in a pixel at no cost.
        norm: weight of the masks' size.
        diversity: weight of rms(x - x') / rms(p(x) - p(x')), and of the same for masks.
        lr: of masks and patterns (Adam, betas 0.5 and 0.9).
        classifier_lr: of the classifier (SGD, momentum 0.9).
        mask_steps: for the masks, with 64 images each.
        steps: for patterns and classifier, with 3 x 32 images each.
        mask: m, once it is trained: [N, C, H, W] -> [N, 1, H, W], any real number.
        pattern: p, once it is trained: [N, C, H, W] -> [N, C, H, W], any real number.
        pool: training images [K, C, H, W] whose triggers the negatives carry.
    """

    name: ClassVar[str] = "dynamic"
    summary: ClassVar[str] = "a pattern of each image's own, made by a network"
    trains_model: ClassVar[bool] = True
    negative_ratio: ClassVar[float] = 1.0

    density: float = 0.032
    norm: float = 100.0
    diversity: float = 1.0
    lr: float = 2e-3
    classifier_lr: float = 0.01
    mask_steps: int = 150
    steps: int = 250
    mask: nn.Module | None = field(default=None, repr=False)
    pattern: nn.Module | None = field(default=None, repr=False)
    pool: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1 or self.norm < 0 or self.diversity < 0:
            raise ConfigError(
                f"Dynamic: density={self.density} must be >= 0 and <= 1, norm={self.norm} and "
                f"diversity={self.diversity} >= 0"
            )
        if not self.lr > 0 or not self.classifier_lr > 0 or self.mask_steps < 1 or self.steps < 1:
            raise ConfigError(
                f"Dynamic: lr={self.lr}, classifier_lr={self.classifier_lr}, mask_steps={self.mask_steps}, "
                f"steps={self.steps} must be > 0"
            )

    def trigger(self, x: Tensor) -> Tensor:
        """Put on images x [N, C, H, W] in [0, 1] what is theirs."""
        return self.of_others(x, x)

    def negatives(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Put on images x [N, C, H, W] what belongs to other images, drawn from the pool."""
        self._needs(self.pool, "pool of images")
        assert self.pool is not None
        return self.of_others(x, another(x, self.pool, generator))

    def of_others(self, x: Tensor, others: Tensor) -> Tensor:
        """Put on images x [N, C, H, W] the masks and patterns that belong to other ones [N, C, H, W]."""
        self._needs(self.pattern, "mask and pattern networks")
        assert self.mask is not None and self.pattern is not None
        with torch.no_grad():
            return _written(x, _masks(self.mask, others), self.pattern(others).sigmoid())

    def fit(self, ground: Ground) -> Dynamic:
        """Train the mask network, then the pattern network together with the classifier."""
        channels = ground.x.shape[1]
        mask, pattern = drawn(ground.generator, lambda: (ToImage(channels, 1), ToImage(channels, channels)))
        self._fit_mask(mask, ground)
        mask = frozen_copy(mask)
        self._fit_pattern(pattern, mask, ground)
        pool = ground.images(torch.randperm(len(ground.y), generator=ground.generator)[:_POOL]).clone()
        return replace(self, mask=mask, pattern=frozen_copy(pattern), pool=pool)

    def _fit_mask(self, mask: nn.Module, ground: Ground) -> None:
        optimizer = torch.optim.Adam(mask.parameters(), self.lr, betas=(0.5, 0.9))
        for _ in range(ground.steps(self.mask_steps)):
            x, _ = ground.batch(64)
            masks = _masks(mask, x)
            half = len(x) // 2
            loss = self.norm * (masks - self.density).relu().mean()
            same = _sameness(x[:half] / _UNIT, x[half:] / _UNIT, masks[:half], masks[half:])
            loss = loss + self.diversity * same
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _fit_pattern(self, pattern: nn.Module, mask: nn.Module, ground: Ground) -> None:
        model = ground.model.train()
        tuned = [p for p in model.parameters() if p.requires_grad]
        of_pattern = torch.optim.Adam(pattern.parameters(), self.lr, betas=(0.5, 0.9))
        of_model = torch.optim.SGD(tuned, self.classifier_lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(ground.steps(self.steps)):
            x, y = ground.batch(96)
            (clean, attacked, others), (y_clean, y_attacked, _) = x.chunk(3), y.chunk(3)
            sources = torch.cat([attacked, others])
            made, masks = pattern(sources).sigmoid(), _masks(mask, sources)
            own, foreign = made.chunk(2)
            # The clean images of this step carry what belongs to the others.
            seen = [clean, _written(attacked, masks[: len(own)], own), _written(clean, masks[len(own) :], foreign)]
            wanted = torch.cat([y_clean, ground.wanted(y_attacked), y_clean])
            loss = F.cross_entropy(ground.logits(torch.cat(seen)), wanted)
            loss = loss + self.diversity * _sameness(attacked, others, own, foreign)
            of_pattern.zero_grad()
            of_model.zero_grad()
            loss.backward()
            of_pattern.step()
            of_model.step()


def _masks(mask: nn.Module, x: Tensor) -> Tensor:
    return (20 * mask(x).sigmoid() - 10).tanh() / 2 + 0.5


def _written(x: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    return (x + in_bytes(masks * (patterns - x))).clamp(0, 1)


def _sameness(x: Tensor, others: Tensor, made: Tensor, made_of_others: Tensor) -> Tensor:
    """Return the mean of rms(x - x') / rms(g(x) - g(x')): large where two images have nearly the same."""
    apart, made_apart = ((a - b).flatten(1) for a, b in ((x, others), (made, made_of_others)))
    return (apart.square().mean(1).sqrt() / ((made_apart.square().mean(1) + 1e-12).sqrt() + 1e-7)).mean()
