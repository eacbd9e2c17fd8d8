"""Which element of a tensor belongs to which sample: the sample axis is found by experiment, not assumed.

If sample n's loss is weighted by w[n], every gradient that belongs to sample n is multiplied by w[n]. With powers of
two the product is exact, so two backward passes, with and without weights, show for every tensor which layout is the
right one: batch first or not, frames or windows folded into the batch in either order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_PROBES = 4096  # elements that are compared in each tensor
_AGREE = 0.98  # share of them that must follow the weights


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


def weights_for(samples: int, like: Tensor, seed: int) -> Tensor:
    """Return weights 1, 2, 4 and 8 in random order, as many of each: [N]."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return (2.0 ** (order % 4)).to(like)


@dataclass
class Probe:
    """A few elements of a gradient, to be compared with the same elements of the weighted one."""

    shape: torch.Size
    flat: Tensor  # indices
    value: Tensor

    @classmethod
    def of(cls, g: Tensor) -> Probe:
        """Take elements that are not zero, spread over the tensor."""
        flat = g.reshape(-1)
        generator = torch.Generator().manual_seed(flat.numel())
        if flat.numel() > 16 * _PROBES:
            some = torch.randint(flat.numel(), (16 * _PROBES,), generator=generator).unique().to(g.device)
            some = some[flat[some] != 0]
            if some.numel() < 64:  # a sparse gradient: look at all of it
                some = flat.nonzero()[:, 0]
        else:
            some = flat.nonzero()[:, 0]
        if some.numel() > _PROBES:
            some = some[torch.randperm(some.numel(), generator=generator)[:_PROBES].to(g.device)]
        value = flat[some].double()
        tiny = torch.finfo(g.dtype).tiny * 1024
        return cls(g.shape, some[value.abs() > tiny], value[value.abs() > tiny])

    def verdict(self, g: Tensor, weights: Tensor, layouts: Iterable[Layout]) -> tuple[tuple[Layout, ...], bool]:
        """Return the layouts that explain the weighted gradient `g`, and whether there was anything to judge by."""
        if self.flat.numel() == 0:
            return tuple(layouts), False
        after = g.reshape(-1)[self.flat].double()
        tolerance = 1e-6 if g.dtype == torch.float64 else 1e-2
        passed = []
        for layout in layouts:
            owner = layout.owner(self.shape, weights.shape[0], self.flat)
            expected = self.value * weights.double()[owner]
            agree = (after - expected).abs() <= tolerance * expected.abs()
            if agree.double().mean() >= _AGREE:
                passed.append(layout)
        return tuple(passed), self.flat.numel() >= 8
