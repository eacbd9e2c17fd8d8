"""What the ops are measured on: operands of a size, the definition in float64, torch's own weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.ops import OPS, Backend, ConvShape, sum_grad_squared, sum_grad_squared_conv
from fastfip.testing.definitions import relative_error


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ghost_norm(g: Tensor, a: Tensor) -> Tensor:
    """Squared norms of the samples' weight gradients by plain torch: direct or Gram, by the cost of the forward."""
    if a.shape[1] * (a.shape[2] + g.shape[2]) < a.shape[2] * g.shape[2]:
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
    return (g.mT @ a).square().sum((1, 2))


def gemm_rate(dtype: torch.dtype, repeat: int) -> float:
    """Operations a second of CPU time that torch.mm does."""
    x, y = torch.randn(2, 1024, 1024, dtype=dtype)
    out = torch.empty_like(x)
    return 2 * 1024**3 / harness.least(lambda: torch.mm(x, y, out=out), repeat)


def rates(seconds: float, work: int, rate: float, error: float) -> Row:
    """Return the columns that every op has: `work` operations in this time, beside the rate of the matrix product."""
    return {
        "ms": round(seconds * 1e3, 3),
        "gflops": round(work / seconds / 1e9, 1),
        "sgemm": round(work / seconds / rate, 2),
        "error": f"{error:.1e}",
    }


@dataclass
class Problem:
    """Operands of `sum_grad_squared`, or of `sum_grad_squared_conv` where there is a shape."""

    op: str
    size: str
    g: Tensor
    a: Tensor
    weight: Tensor  # only its size and dtype count
    work: int  # operations of the weight gradient
    few: int  # samples that are enough for a check
    shape: ConvShape | None = None

    @property
    def ours(self) -> Callable[..., Tensor]:
        """The op, as a function of g, a and its options."""
        return partial(sum_grad_squared_conv, shape=self.shape) if self.shape else sum_grad_squared

    def weight_gradient(self, g: Tensor, a: Tensor) -> Tensor:
        """Return torch's own gradient of the weight; of a matrix, in the memory of `weight`."""
        if self.shape is None:
            return torch.mm(g.flatten(0, 1).t(), a.flatten(0, 1), out=self.weight)
        s = self.shape
        options = (s.stride, s.padding, s.dilation, False, [0, 0], s.groups, [False, True, False])
        return torch.ops.aten.convolution_backward(g, a, self.weight.to(g.dtype), None, *options)[1]

    def exact(self) -> Tensor:
        """Return the definition in float64, for the few samples."""
        g, a = (x[: self.few].double() for x in (self.g, self.a))
        if self.shape is None:
            return torch.einsum("nto,nti->noi", g, a).square().sum(0)
        return torch.stack([self.weight_gradient(y[None], z[None]).square() for y, z in zip(g, a)]).sum(0)

    def error(self, backend: str, exact: Tensor) -> float:
        """Return the relative error of a backend on the few samples."""
        return relative_error(self.ours(self.g[: self.few], self.a[: self.few], backend=backend), exact)

    def results(self) -> Tensor:
        """Return zeros to add results to."""
        return torch.zeros_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))

    def backends(self, *results: Tensor | None) -> Iterator[tuple[Backend, str]]:
        """Every backend, and why it cannot run with these results to add to."""
        arguments = (self.shape, len(self.g)) if self.shape else ()
        for backend in OPS[self.op].backends:
            yield backend, backend.refuses(self.g, self.a, *arguments, *results)


def dense(n: int, t: int, o: int, i: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Return a matrix of O x I at T positions of N samples."""
    g, a = (random(n, t, features, dtype=dtype, device=device) for features in (o, i))
    weight = torch.empty(o, i, dtype=dtype, device=device)
    return Problem("sum_grad_squared", f"{n}x{t}x{o}x{i}", g, a, weight, 2 * n * t * o * i, min(n, 4))


def conv(
    n: int, c: int, o: int, size: int, k: int, s: int, groups: int, dtype: torch.dtype, device: str = "cpu"
) -> Problem:
    """Return a k x k convolution of C to O channels with stride s, on N images."""
    shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1), groups)
    x = random(n, c, size, size, dtype=dtype, device=device)
    weight = random(o, c // groups, k, k, dtype=dtype, device=device)
    wide = (size + 2 * (k // 2) - k) // s + 1
    g = random(n, o, wide, wide, dtype=dtype, device=device)
    text, work = f"{n}x{c}x{o}x{size} k{k} s{s} g{groups}", 2 * g.numel() * (c // groups) * k * k
    return Problem("sum_grad_squared_conv", text, g, x, weight, work, 2, shape)


def random(*size: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*size, dtype=torch.promote_types(dtype, torch.float32), device=device).to(dtype)
