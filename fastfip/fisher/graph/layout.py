"""Which element of a tensor belongs to which sample: the sample axis is found by experiment, not assumed.

If sample n's loss is weighted by w[n], every gradient that belongs to sample n is multiplied by w[n]. So two backward
passes, with and without weights, show for every tensor which layout is the right one: batch first or not, frames or
windows folded into the batch in either order. A sample whose loss depends on another one follows neither weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_PROBES = 4096  # elements that are compared in each tensor
_AGREE = {torch.float64: 1.0, torch.float32: 1.0}  # share of a sample's that must follow the weights; else ...
_AGREE_ROUGHLY = 0.98
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # of a number, relative to it; in 16 bits 1e-2
_NOISE = 1e-2  # of the sample's numbers, that much is added to it


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` has N*k elements; sample n has those with index // k == n (`major`) or index % N == n."""

    dim: int
    major: bool = True

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether a tensor of that shape can be laid out like this."""
        return self.dim < len(shape) and shape[self.dim] > 0 and shape[self.dim] % samples == 0

    def same(self, other: Layout, shape: torch.Size, samples: int) -> bool:
        """Whether both mean the same for a tensor of that shape."""
        return self.dim == other.dim and (self.major == other.major or shape[self.dim] == samples)

    def split(self, t: Tensor, samples: int) -> Tensor:
        """Return [N, *shape] with k elements left in dimension `dim` (a view where memory allows it)."""
        k = t.shape[self.dim] // samples
        if self.major:
            return t.unflatten(self.dim, (samples, k)).movedim(self.dim, 0)
        return t.unflatten(self.dim, (k, samples)).movedim(self.dim + 1, 0)

    def owner(self, shape: torch.Size, samples: int, flat: Tensor) -> Tensor:
        """Return the sample that each flat index into a tensor of that shape belongs to."""
        inner = 1
        for size in shape[self.dim + 1 :]:
            inner *= size
        index = flat // inner % shape[self.dim]
        return index // (shape[self.dim] // samples) if self.major else index % samples


def candidates(dims: Iterable[int], shape: torch.Size, samples: int) -> tuple[Layout, ...]:
    """Return the layouts that a tensor of that shape may have if its batch lies in one of `dims`, likelier first."""
    layouts = []
    for dim in dims:
        if Layout(dim).fits(shape, samples):
            layouts += [Layout(dim)] if shape[dim] == samples else [Layout(dim), Layout(dim, major=False)]
    return tuple(sorted(layouts, key=lambda one: shape[one.dim] != samples))


def weights_for(samples: int, like: Tensor, seed: int, coarse: frozenset[torch.dtype]) -> Tensor:
    """Return weights between 2^-12 and 16, [N]: 256 different ones, powers of two for up to 16 samples.

    `coarse` are dtypes of 16 bits in the arithmetic, which round products with anything but powers of two too much:
    there are 16 different ones. float16 has no room for small ones: 1, 2, 4 and 8. Two samples that see each other and
    have the same weight pass for samples on their own.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    if torch.float16 in coarse:
        return (2.0 ** (order % 4)).to(like)
    if coarse:
        return (2.0 ** (3 - order % 16)).to(like)
    return (2.0 ** (3 - order % 16) * (1 + order // 16 % 16 / 16)).to(like)


@dataclass
class Probe:
    """A few elements of a weighted gradient, to be compared with the same elements of the one without weights."""

    shape: torch.Size
    flat: Tensor  # indices
    value: Tensor

    @classmethod
    def of(cls, g: Tensor, samples: int) -> Probe:
        """Take elements that are not zero, spread over the tensor."""
        flat, most = g.reshape(-1), max(_PROBES, 16 * samples)
        if flat.numel() > 16 * most:
            step = flat.numel() / (16 * most)  # one at random of each stretch
            generator = torch.Generator().manual_seed(flat.numel())
            where = (torch.arange(16 * most) + torch.rand(16 * most, generator=generator, dtype=torch.float64)) * step
            some = where.long().clamp_(max=flat.numel() - 1).to(g.device)
            some = some[flat[some] != 0]
            if some.numel() < 64:  # a sparse gradient: look at all of it
                some = flat.nonzero()[:, 0]
        else:
            some = flat.nonzero()[:, 0]
        if some.numel() > most:
            some = some[:: -(-some.numel() // most)]
        value = flat[some].double()
        tiny = torch.finfo(g.dtype).tiny * 1024
        return cls(g.shape, some[value.abs() > tiny], value[value.abs() > tiny])

    def verdict(self, g: Tensor, weights: Tensor, layouts: Iterable[Layout]) -> tuple[tuple[Layout, ...], bool]:
        """Return the layouts that explain the gradient `g` without weights, and whether there was anything to judge by.

        Every sample has to follow its own weight: one that takes part in another's loss does not.
        """
        if self.flat.numel() == 0:
            return tuple(layouts), False
        plain, weights = g.reshape(-1)[self.flat].double(), weights.double()
        samples, tolerance = weights.shape[0], _TOLERANCE.get(g.dtype, 1e-2)
        passed = []
        for layout in layouts:
            owner = layout.owner(self.shape, samples, self.flat)
            own = weights[owner]
            # Next to a sample's larger numbers, small ones are what rounding left of a sum.
            count = torch.zeros_like(weights).index_add_(0, owner, torch.ones_like(plain))
            size = torch.zeros_like(weights).index_add_(0, owner, plain.square()).div_(count.clamp(min=1)).sqrt_()
            wrong = (self.value / own - plain).abs() > tolerance * (plain.abs() + _NOISE * size[owner])
            share = torch.zeros_like(weights).index_add_(0, owner, wrong.double()) / count.clamp(min=1)
            if bool((share <= 1 - _AGREE.get(g.dtype, _AGREE_ROUGHLY)).all()):
                passed.append(layout)
        return tuple(passed), self.flat.numel() >= 8
