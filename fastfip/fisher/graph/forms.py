"""What per-sample gradients can look like. A rule brings every use of a parameter to one of these; they compute.

Index letters: sample n, position t, output o, input i. Every form stands for gradients G_n of one tensor, and can add
the sum of their squares (and their sum) to a buffer, give their squared norms (differentiable), or give one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fastfip.ops.convolution import ConvShape, columns
from fastfip.ops.grad_norm_squared.convolution import grad_norm_squared_conv
from fastfip.ops.grad_norm_squared.op import grad_norm_squared
from fastfip.ops.memory import Scratch, accumulation_dtype, kept_scratch
from fastfip.ops.sum_grad_squared.op import sum_grad_squared, sum_grad_squared_conv


@dataclass(frozen=True)
class Workspace:
    """What a pass over the data uses for its products."""

    scratch: Scratch = field(default_factory=kept_scratch)
    backend: str = "auto"


class GradientForm:
    """Per-sample gradients of one tensor."""

    def add_squares(self, out: Tensor, grad: Tensor | None, workspace: Workspace) -> None:
        """Add sum_n G_n^2 to `out` and, if there is one, sum_n G_n to `grad`; both have the tensor's shape."""
        raise NotImplementedError

    def norms(self) -> Tensor:
        """Squared norm of each G_n, [N]; differentiable."""
        raise NotImplementedError

    def one(self, n: int) -> Tensor:
        """G_n, differentiable."""
        raise NotImplementedError

    def scale(self, n: int) -> Tensor:
        """A number that rounding errors of G_n are small against, even where G_n itself cancels."""
        raise NotImplementedError

    @staticmethod
    def join(forms: Sequence[GradientForm]) -> GradientForm:
        """The sum of several forms of one tensor as one form; they are of one kind, and of one that JOINED names."""
        if len(forms) == 1:
            return forms[0]
        return type(forms[0])._join(forms)

    @classmethod
    def _join(cls, forms: Sequence[Any]) -> GradientForm:
        raise NotImplementedError


@dataclass
class DenseForm(GradientForm):
    """G_n = sum_t g[n, t] a[n, t]^T of a tensor [O, I], or its transpose of a tensor [I, O] if `flip`."""

    g: Tensor  # [N, T, O]
    a: Tensor  # [N, T, I]
    flip: bool = False

    @override
    def add_squares(self, out: Tensor, grad: Tensor | None, workspace: Workspace) -> None:
        g, a = (self.a, self.g) if self.flip else (self.g, self.a)
        if not out.is_contiguous() and out.t().is_contiguous():
            g, a, out, grad = a, g, out.t(), None if grad is None else grad.t()
        sum_grad_squared(g, a, out=out, grad=grad, scratch=workspace.scratch, backend=workspace.backend)

    @override
    def norms(self) -> Tensor:
        return grad_norm_squared(self.g, self.a)

    @override
    def one(self, n: int) -> Tensor:
        acc = accumulation_dtype(self.g.dtype)
        product = self.g[n].to(acc).t() @ self.a[n].to(acc)
        return product.t() if self.flip else product

    @override
    def scale(self, n: int) -> Tensor:
        return self.g[n].double().norm() * self.a[n].double().norm()

    @classmethod
    @override
    def _join(cls, forms: Sequence[DenseForm]) -> GradientForm:
        turned = [(f.a, f.g) if f.flip else (f.g, f.a) for f in forms]
        return DenseForm(torch.cat([g for g, _ in turned], 1), torch.cat([a for _, a in turned], 1))


@dataclass
class ConvForm(GradientForm):
    """Gradients of a convolution's weight; for a transposed one `g` is its input and `x` the gradient at its output."""

    g: Tensor  # [N*F, O, *out]
    x: Tensor  # [N*F, C, *in]
    shape: ConvShape
    samples: int

    @override
    def add_squares(self, out: Tensor, grad: Tensor | None, workspace: Workspace) -> None:
        sum_grad_squared_conv(
            self.g,
            self.x,
            self.shape,
            samples=self.samples,
            out=out,
            grad=grad,
            scratch=workspace.scratch,
            backend=workspace.backend,
        )

    @override
    def norms(self) -> Tensor:
        return grad_norm_squared_conv(self.g, self.x, self.shape, samples=self.samples)

    def _of(self, n: int) -> tuple[Tensor, Tensor]:
        frames = self.g.shape[0] // self.samples
        part = slice(n * frames, (n + 1) * frames)
        acc = accumulation_dtype(self.g.dtype)
        return self.g[part].to(acc), self.x[part].to(acc)

    @override
    def one(self, n: int) -> Tensor:
        g, x = self._of(n)
        cols = columns(x, self.shape, tuple(g.shape[2:]))  # [F, groups, I, T]
        left = g.reshape(*cols.shape[:2], -1, cols.shape[3])
        product = (left @ cols.transpose(2, 3)).sum(0)
        return product.reshape(g.shape[1], x.shape[1] // self.shape.groups, *self.shape.kernel)

    @override
    def scale(self, n: int) -> Tensor:
        g, x = self._of(n)
        return g.double().norm() * x.double().norm() * self.shape.taps**0.5


@dataclass
class SumForm(GradientForm):
    """Gradients that are at hand: h[n] is G_n (biases, norm affine parameters, tokens)."""

    h: Tensor  # [N, *shape]
    parts: Tensor | None = None  # [N, ...] what was added up

    @override
    def add_squares(self, out: Tensor, grad: Tensor | None, workspace: Workspace) -> None:
        squares = workspace.scratch.take(tuple(self.h.shape), self.h)
        out.add_(torch.square(self.h, out=squares).sum(0))
        if grad is not None:
            grad.add_(self.h.sum(0))

    @override
    def norms(self) -> Tensor:
        return self.h.reshape(self.h.shape[0], -1).square().sum(1)

    @override
    def one(self, n: int) -> Tensor:
        return self.h[n]

    @override
    def scale(self, n: int) -> Tensor:
        return (self.h if self.parts is None else self.parts)[n].double().norm()

    @classmethod
    @override
    def _join(cls, forms: Sequence[SumForm]) -> GradientForm:
        total = forms[0].h
        for form in forms[1:]:
            total = total + form.h
        return SumForm(total)


@dataclass
class RowsForm(GradientForm):
    """Gradients of a table [V, *row]: position t of sample n adds g[n, t] to row `index[n, t]` (-1: to none)."""

    g: Tensor  # [N, T, *row]
    index: Tensor  # [N, T]
    size: int

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that are not zero, summed over the positions of a sample: the sample, the row, the sum."""
        n = self.index.shape[0]
        acc = accumulation_dtype(self.g.dtype)
        index = self.index.long()
        key = torch.arange(n, device=index.device)[:, None] * self.size + index
        kept = (index >= 0).reshape(-1)
        rows = self.g.reshape(kept.shape[0], -1)[kept].to(acc)
        keys, where = key.reshape(-1)[kept].unique(return_inverse=True)
        total = rows.new_zeros(keys.shape[0], rows.shape[1]).index_add(0, where, rows)
        return keys // self.size, keys % self.size, total

    @override
    def add_squares(self, out: Tensor, grad: Tensor | None, workspace: Workspace) -> None:
        _, row, total = self._summed()
        if grad is not None:
            grad.view(self.size, -1).index_add_(0, row, total)
        out.view(self.size, -1).index_add_(0, row, total.square())

    @override
    def norms(self) -> Tensor:
        sample, _, total = self._summed()
        return total.new_zeros(self.index.shape[0]).index_add(0, sample, total.square().sum(1))

    @override
    def one(self, n: int) -> Tensor:
        kept = self.index[n] >= 0
        rows = self.g[n].to(accumulation_dtype(self.g.dtype))[kept]
        return rows.new_zeros(self.size, *rows.shape[1:]).index_add(0, self.index[n][kept].long(), rows)

    @override
    def scale(self, n: int) -> Tensor:
        return self.g[n].double().norm()

    @classmethod
    @override
    def _join(cls, forms: Sequence[RowsForm]) -> GradientForm:
        return RowsForm(torch.cat([f.g for f in forms], 1), torch.cat([f.index for f in forms], 1), forms[0].size)


@dataclass
class BackwardForm(GradientForm):
    """Gradients through an operation that no rule knows: its own backward, fed with one sample's part at a time."""

    node: Any  # the autograd node
    slot: int
    g: Tensor
    owner: Tensor  # of g's shape: the sample that each element belongs to
    shape: torch.Size  # of what is in the slot

    @override
    def one(self, n: int) -> Tensor:
        call = self.node if callable(self.node) else self.node.apply
        gradients = call(self.g * (self.owner == n))
        value = gradients[self.slot] if isinstance(gradients, tuple) else gradients
        value = value.to_dense() if value.is_sparse else value
        # Outside of a backward pass nobody sums over what an operation has broadcast.
        return value if value.shape == self.shape else value.sum_to_size(self.shape)

    @override
    def scale(self, n: int) -> Tensor:
        return self.g.new_zeros((), dtype=torch.float64)


#: Forms whose sums are forms of the same kind.
JOINED = (DenseForm, SumForm, RowsForm)
