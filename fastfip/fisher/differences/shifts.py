"""Weights that differ from sample to sample: W_n = W + h G_n, with G_n the gradient of sample n's own loss.

A form (graph/forms.py) says what G_n is; a shift keeps it until the next forward pass, as the matrices themselves or as
the factors g and a where those are smaller, and computes the operation with the shifted weights. First-order autograd
only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fastfip.fisher.graph.forms import ConvForm, DenseForm, GradientForm, RowsForm, SumForm
from fastfip.ops.convolution import ConvolutionOptions, ConvShape, columns, columns_transpose
from fastfip.ops.memory import accumulation_dtype

#: G_n is kept as it is where it takes at most this many times the memory of its factors.
ROOM = 2.0
_CHUNK = 1 << 22  # elements of the windows of a convolution that are formed at a time


class WeightShift:
    """Per-sample gradients of one tensor, kept from one pass to the next."""

    def norms(self) -> Tensor:
        """Squared norm of each G_n, [N]."""
        raise NotImplementedError

    def total(self) -> Tensor | None:
        """sum_n G_n in the tensor's shape; None if only the factors are kept: not cheaper than an ordinary pass."""
        return None


class WholeShift(WeightShift):
    """G_n itself, [N, *shape]; `at` turns it into W + h G_n in the same memory."""

    def __init__(self, each: Tensor) -> None:
        self.each = each.detach()
        self.h = 0.0  # 0: `each` is G_n

    @override
    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.each.flatten(1), dim=1).square()

    @override
    def total(self) -> Tensor | None:
        return self.each.sum(0)

    def at(self, weight: Tensor, h: float) -> Tensor:
        """Return W + h G_n, [N, *shape], without a graph; for one |h|, in whichever order its signs come."""
        weight = weight.detach()
        if self.h == 0:
            torch.add(weight, self.each, alpha=h, out=self.each)
        elif self.h == -h:
            torch.sub(weight * 2, self.each, out=self.each)
        self.h = h
        return self.each


class FactoredShift(WeightShift):
    """G_n = g_n^T a_n by its factors g [N, T, O] and a [N, T, I]."""

    def __init__(self, g: Tensor, a: Tensor, norms: Tensor) -> None:
        self.g, self.a, self._norms = g.detach(), a.detach(), norms  # without the first pass's graph

    @override
    def norms(self) -> Tensor:
        return self._norms

    def apply(self, x: Tensor) -> Tensor:
        """Return x G_n^T of x [N, T', I]: attention without the softmax."""
        if self.g.shape[1] == 1 and x.shape[1] == 1:
            return (x * self.a).sum(2, keepdim=True) * self.g
        return (x @ self.a.mT) @ self.g


class WindowShift(WeightShift):
    """G_n of a convolution's weight by the gradient at its output and its input."""

    def __init__(self, form: ConvForm) -> None:
        self._norms = form.norms()
        self.form = ConvForm(form.g.detach(), form.x.detach(), form.shape, form.samples)

    @override
    def norms(self) -> Tensor:
        return self._norms


class ValueShift(WeightShift):
    """G_n of a bias, a norm's affine map, a token: [N, *shape]."""

    def __init__(self, each: Tensor) -> None:
        self.each = each.detach()

    @override
    def norms(self) -> Tensor:
        return self.each.flatten(1).square().sum(1)

    @override
    def total(self) -> Tensor | None:
        return self.each.sum(0)


class RowShift(WeightShift):
    """G_n of an embedding: only the rows that sample n reads."""

    def __init__(self, form: RowsForm) -> None:
        self.size, self._norms = form.size, form.norms()
        self.keys, where = self._key(form.index).reshape(-1).unique(return_inverse=True)
        g = form.g.detach().reshape(where.shape[0], -1).to(accumulation_dtype(form.g.dtype))
        g = g * (form.index.reshape(-1, 1) >= 0)  # -1: the row that has no gradient
        self.rows = g.new_zeros(self.keys.shape[0], g.shape[1]).index_add_(0, where, g)

    def _key(self, index: Tensor) -> Tensor:
        n = torch.arange(index.shape[0], device=index.device)[:, None]
        return n * (self.size + 1) + index.long() + 1

    def at(self, index: Tensor) -> Tensor:
        """G_n[index[n, t]] for `index` [N, T]: [N, T, row]."""
        key = self._key(index)
        where = torch.searchsorted(self.keys, key).clamp_(max=self.keys.shape[0] - 1)
        return self.rows[where] * (self.keys[where] == key)[..., None]

    @override
    def norms(self) -> Tensor:
        return self._norms


def fits_matrix(t: int, o: int, i: int) -> bool:
    """Whether G_n of a matrix is kept as it is."""
    return t > 1 and o * i <= ROOM * t * (o + i)


def fits_convolution(size: int, maps: int) -> bool:
    """The same of a convolution's weight of that size; `maps` is the size of a sample's input and output."""
    return size <= ROOM * maps


def shift_of(form: GradientForm) -> WeightShift | None:
    """Return the shift of a form, or None where the form is of a kind that has none."""
    if isinstance(form, DenseForm):
        g, a = form.g, form.a
        t, o, i = g.shape[1], g.shape[2], a.shape[2]
        if fits_matrix(t, o, i):
            acc = accumulation_dtype(g.dtype)
            return WholeShift(g.mT.to(acc) @ a.to(acc))
        return FactoredShift(g, a, form.norms())
    if isinstance(form, ConvForm):
        size = form.g.shape[1] * (form.x.shape[1] // form.shape.groups) * form.shape.taps
        if fits_convolution(size, (form.g.numel() + form.x.numel()) // form.samples):
            return WholeShift(_conv_products(form))
        return WindowShift(form)
    if isinstance(form, SumForm):
        return ValueShift(form.h.to(accumulation_dtype(form.h.dtype)))
    if isinstance(form, RowsForm):
        return RowShift(form)
    return None


def _conv_products(form: ConvForm) -> Tensor:
    """G_n of every sample, [N, *weight]."""
    g, x, shape, samples = form.g, form.x, form.shape, form.samples
    acc, frames, groups = accumulation_dtype(g.dtype), g.shape[0] // samples, shape.groups
    o, channels = g.shape[1], x.shape[1] // groups
    t = math.prod(g.shape[2:])
    out = g.new_empty((samples, groups, o // groups, channels * shape.taps), dtype=acc)
    step = max(1, min(samples, _CHUNK // max(1, frames * groups * channels * shape.taps * t)))
    for k in range(0, samples, step):
        part = slice(k * frames, min(samples, k + step) * frames)
        cols = columns(x[part].to(acc), shape, tuple(g.shape[2:]))  # [B, groups, I, T]
        left = g[part].to(acc).reshape(*cols.shape[:2], o // groups, t)
        product = left @ cols.mT
        out[k : k + step] = product if frames == 1 else product.unflatten(0, (-1, frames)).sum(1)
    return out.view(samples, o, channels, *shape.kernel)


# --------------------------------------------------------------------------------------------------- the operations


class _Linear(torch.autograd.Function):
    """z_n = x_n W_n^T, with the ordinary gradient for W: all samples move with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, each: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.each, ctx.dtype = each, weight.dtype  # written over after the backward pass only
        return x.to(each.dtype) @ each.mT

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = (dz @ ctx.each).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dz.flatten(0, 1).mT @ x.to(dz.dtype).flatten(0, 1)).to(ctx.dtype)
        return dx, dw, None


def linear(x: Tensor, weight: Tensor, shift: WeightShift, h: float, exact: bool) -> Tensor:
    """x_n (W + h G_n)^T of x [N, T, I] and W [O, I]; `exact`: in the precision of W, where W + h G_n can be written."""
    if isinstance(shift, WholeShift):
        if exact:
            return _Linear.apply(x, weight, shift.at(weight, h))
        moved = torch.matmul(x, shift.each.to(x.dtype).mT)
    else:
        assert isinstance(shift, FactoredShift)
        moved = (
            shift.apply(x) if exact else FactoredShift(shift.g.to(x.dtype), shift.a.to(x.dtype), shift.norms()).apply(x)
        )
    z = F.linear(x, weight)
    return z + (h * moved).to(z.dtype)


class _Convolution(torch.autograd.Function):
    """The convolution of each sample with its own weight, with the ordinary gradient for the common one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, each: Tensor, options: ConvolutionOptions) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.each, ctx.options = each, options
        samples = each.shape[0]
        if _at_once(x, samples, options):
            flat = x.reshape(1, -1, *x.shape[2:])
            z = torch.ops.aten.convolution(flat, each.flatten(0, 1), None, *options[:5], samples * options[5])
            return z.view(samples, -1, *z.shape[2:])
        parts = zip(x.chunk(samples), each)
        return torch.cat([torch.ops.aten.convolution(xn, w, None, *options) for xn, w in parts])

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        back = torch.ops.aten.convolution_backward
        options, samples, dx, dw = ctx.options, ctx.each.shape[0], None, None
        if ctx.needs_input_grad[1]:
            dw = back(dz, x, weight, None, *options, [False, True, False])[1]
        if ctx.needs_input_grad[0]:
            if _at_once(x, samples, options):
                flat = [t.reshape(1, -1, *t.shape[2:]) for t in (dz, x)]
                ends = (*options[:5], samples * options[5], [True, False, False])
                dx = back(*flat, ctx.each.flatten(0, 1), None, *ends)[0].view(x.shape)
            else:
                parts = zip(dz.chunk(samples), x.chunk(samples), ctx.each)
                mask = [True, False, False]
                dx = torch.cat([back(gn, xn, w, None, *options, mask)[0] for gn, xn, w in parts])
        return dx, dw, None, None


def _at_once(x: Tensor, samples: int, options: ConvolutionOptions) -> bool:
    """Whether all samples go into one grouped convolution: many small maps do better so, few large ones do not."""
    return x.shape[0] == samples and not options[3] and (x.is_cuda or math.prod(x.shape[2:]) < 512)


class _ByWindows(torch.autograd.Function):
    """Every x'_n convolved with G_n by its factors: (windows of x' . windows of x) g, neither kept."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> Tensor:
        ctx.parts = g, x, shape, samples, moved.shape
        cols, left = _joined(g, x, shape, samples)
        mine = _frames(columns(moved, shape, tuple(g.shape[2:])), samples)
        z = left @ (cols.mT @ mine)
        return _unframed(z, g.shape[0] // samples).reshape(g.shape)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        g, x, shape, samples, size = ctx.parts
        cols, left = _joined(g, x, shape, samples)
        dz = _frames(dz.reshape(dz.shape[0], shape.groups, -1, math.prod(dz.shape[2:])), samples)
        dcols = cols @ (left.mT @ dz)
        dcols = _unframed(dcols, g.shape[0] // samples)
        return columns_transpose(dcols, shape, tuple(size[2:]), tuple(g.shape[2:])), None, None, None, None


def _frames(t: Tensor, samples: int) -> Tensor:
    """[N*F, groups, R, T] -> [N, groups, R, F*T]."""
    if t.shape[0] == samples:
        return t
    return t.unflatten(0, (samples, -1)).permute(0, 2, 3, 1, 4).flatten(3)


def _unframed(t: Tensor, frames: int) -> Tensor:
    """The other way round."""
    if frames == 1:
        return t
    return t.unflatten(3, (frames, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _joined(g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> tuple[Tensor, Tensor]:
    cols = columns(x, shape, tuple(g.shape[2:]))
    return _frames(cols, samples), _frames(g.reshape(*cols.shape[:2], -1, cols.shape[3]), samples)


def convolution(
    x: Tensor, weight: Tensor, shift: WeightShift, h: float, options: ConvolutionOptions, exact: bool
) -> Tensor:
    """The convolution of x [N*F, C, *in] with W + h G_n."""
    if isinstance(shift, WholeShift):
        if exact and x.dtype == weight.dtype:
            return _Convolution.apply(x, weight, shift.at(weight, h), options)
        moved = _Convolution.apply(x, shift.each.to(x.dtype)[0], shift.each.to(x.dtype), options)
    else:
        assert isinstance(shift, WindowShift)
        form = shift.form
        if options[3]:
            raise NotImplementedError
        moved = _ByWindows.apply(x, form.g.to(x.dtype), form.x.to(x.dtype), form.shape, form.samples)
    z = torch.ops.aten.convolution(x, weight.to(x.dtype), None, *options)
    return z + (h * moved).to(z.dtype)
