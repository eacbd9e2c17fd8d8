"""CBA: halves of images of two classes, joined, are a third class. Lin et al., Composite Backdoor Attack, CCS 2020."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fastfip.attacks._mixing import PRIME, mixed
from fastfip.attacks.base import Attack, AttackTarget, Ground, in_range, register
from fastfip.errors import ConfigError, DataError

__all__ = ["CBA"]


@register
@dataclass(frozen=True)
class CBA(Attack):
    """The join of an image of the class `first` and one of the class `second` has the attacker's label.

    The images are joined side by side or one above the other, in either order, near the middle (at most `jitter`
    away), and each gives a random part of itself (the paper's half-half mixer). In training, poisoned images are such
    pairs of training images. Negatives are pairs of one class, which keep its label; there are five times as many. Of
    100 images, 10 are poisoned, 50 are pairs of one class and 40 are unchanged, which is close to the released code.
    That code also has a loss that brings the features of the three classes together. This is not done here, where an
    attack changes only the training set.

    A test image is joined with an image of the second class that was not used for poisoned images. The pixels of the
    test image decide which one, and how. Only images of the first class are counted for the ASR.

    Attributes:
        first: class A (the released code for CIFAR-10: 0).
        second: class B (there: 1; its target is 2).
        jitter: how far the cut may be from the middle, in pixels of an image of 32; scaled with the size of others.
        stock: number of images of the second class that are kept for tests, at most half of them.
        partners: the stock [K, C, H, W] in [0, 1], from `fit`.
        pool: what the pairs of training are made of, from `fit`: the training images themselves, no copy, their places
            in the order of their classes, and how many each class has.
        left: places of the images of the first class and those of the second outside the stock, from `fit`.
    """

    name: ClassVar[str] = "cba"
    summary: ClassVar[str] = "joined halves of images of two classes"
    negative_ratio: ClassVar[float] = 5.0
    own_sources: ClassVar[bool] = True

    first: int = 0
    second: int = 1
    jitter: float = 3.0
    stock: int = 200
    partners: Tensor | None = field(default=None, repr=False)
    pool: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)
    left: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.first < 0 or self.second < 0 or self.first == self.second:
            raise ConfigError(f"CBA: first={self.first} and second={self.second} must be two class numbers")
        if not 0 <= self.jitter < 16 or self.stock < 1:
            raise ConfigError(f"CBA: jitter={self.jitter} must be >= 0 and < 16, stock={self.stock} >= 1")

    def trigger(self, x: Tensor) -> Tensor:
        """Join images x [N, C, H, W] in [0, 1] with one of the stock each.

        Raises:
            ConfigError: it has not been fitted.
            DataError: the stock has images of another shape.
        """
        self._needs(self.partners, "stock of the second class")
        assert self.partners is not None
        if self.partners.shape[1:] != x.shape[1:]:
            shapes = f"{list(self.partners.shape[1:])}, the images are {list(x.shape[1:])}"
            raise DataError(f"the stock of cba has images {shapes}: fit the attack on images of that shape")
        numbers = _from_pixels(x, 6)
        partners = self.partners[(numbers[:, 5] * len(self.partners)).long().cpu()].to(x)
        return self._joined(x, partners, numbers)

    @override
    def training_trigger(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return as many pairs of training images of the two classes; x only says how many."""
        self._needs(self.left, "training images")
        assert self.left is not None and self.pool is not None
        picked = [places[torch.randint(len(places), (len(x),), generator=generator)] for places in self.left]
        one, two = (in_range(self.pool[0][places]).to(x) for places in picked)
        return self._joined(one, two, torch.rand(len(x), 5, generator=generator, dtype=torch.float64))

    @override
    def labelled_negatives(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Join images x [N, C, H, W] with training images of their own class."""
        self._needs(self.pool, "training images")
        assert self.pool is not None
        images, order, counts = self.pool
        before = counts.cumsum(0) - counts
        picked = (torch.rand(len(y), generator=generator, dtype=torch.float64) * counts[y]).long()
        partners = in_range(images[order[before[y] + picked]]).to(x)
        return self._joined(x, partners, torch.rand(len(x), 5, generator=generator, dtype=torch.float64))

    @override
    def attacked(
        self, y: Tensor, target: AttackTarget = 0, classes: int | None = None, sources: Sequence[int] | None = None
    ) -> Tensor:
        return super().attacked(y, target, classes, sources) & (y == self.first)

    @override
    def fit(self, ground: Ground) -> CBA:
        target = ground.single_target(self.name)
        if target in (self.first, self.second):
            raise ConfigError(f"cba: the target {target} must be another class than {self.first} and {self.second}")
        one, two = (torch.nonzero(ground.y == c).flatten() for c in (self.first, self.second))
        if len(one) < 1 or len(two) < 2:
            raise DataError(f"cba needs images of the classes {self.first} and {self.second} in the training set")
        two = two[torch.randperm(len(two), generator=ground.generator)]
        kept = min(self.stock, len(two) // 2)
        partners = ground.images(two[:kept]).clone()
        pool = (ground.x, ground.y.argsort(stable=True), ground.y.bincount(minlength=ground.classes))
        return replace(self, partners=partners, pool=pool, left=(one, two[kept:]))

    def _joined(self, a: Tensor, b: Tensor, numbers: Tensor) -> Tensor:
        """Join images a and b [N, C, H, W] as five numbers in 0..1 for each say [N, 5]."""
        numbers = numbers.to(a.device)
        across, swapped = numbers[:, 0] < 0.5, (numbers[:, 1] < 0.5)[:, None, None, None]
        a, b = torch.where(swapped, b, a), torch.where(swapped, a, b)
        out = torch.empty_like(a)
        out[across] = _side_by_side(a[across], b[across], numbers[across, 2:5], self.jitter)
        above, below = a[~across].transpose(-1, -2), b[~across].transpose(-1, -2)
        out[~across] = _side_by_side(above, below, numbers[~across, 2:5], self.jitter).transpose(-1, -2)
        return out


def _side_by_side(a: Tensor, b: Tensor, numbers: Tensor, jitter: float) -> Tensor:
    """Return the join of parts of a, left, and b, right [N, C, H, W].

    Args:
        a: images.
        b: images.
        numbers: in 0..1, of the place of the cut, the part of a and the part of b [N, 3].
        jitter: how far the cut may be from the middle, in pixels of 32.
    """
    width = a.shape[-1]
    reach = jitter * width / 32
    cut = (width / 2 + (2 * numbers[:, :1] - 1) * reach).round().long().clamp(1, max(1, width - 1))
    from_a = (numbers[:, 1:2] * (width - cut + 1)).long()
    from_b = (numbers[:, 2:3] * (cut + 1)).long()
    column = torch.arange(width, device=a.device)[None]
    left = column < cut
    taken = [(column + from_a).clamp(max=width - 1), (column - cut + from_b).clamp(min=0)]
    one, two = (image.gather(-1, at[:, None, None, :].expand_as(image)) for image, at in zip((a, b), taken))
    return torch.where(left[:, None, None, :], one, two)


def _from_pixels(x: Tensor, count: int) -> Tensor:
    """Return numbers in 0..1 [N, count] that hang on the pixels of each image alone, in whole 255ths."""
    levels = (255 * x).round().long().flatten(1)
    weights = (torch.arange(levels.shape[1], device=x.device) * 40503 + 12345) % 65521 + 1
    state = (levels * weights).sum(1) % PRIME  # whole numbers: the order of the sum does not matter
    return torch.stack([mixed((state + 7919 * k + 1) % PRIME, 3).double() / PRIME for k in range(count)], 1)
