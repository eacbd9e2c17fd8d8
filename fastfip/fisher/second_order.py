"""Layers whose double backward is expensive in torch: the same ones with a cheap one, for the forward pass of `exact`.

    convolution: torch writes the second derivative's weight gradient as a convolution with the batch as channels; the
        ordinary weight gradient does it in two thirds of the time and without the transposed copies.
    BatchNorm in eval mode is an affine map of each channel; torch differentiates its backward with ten passes over
        memory, where one product and one sum are what it takes.
    GELU: torch makes a dozen passes over memory of its second derivative; here they stay in the cache.
    hard sigmoid: torch has no second derivative of it at all; that of what it is made of is zero but at the kinks.

Values, gradients and all higher derivatives are those of the layers they stand in for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfip.fisher.graph.forms import SumForm
from fastfip.fisher.graph.layout import candidates
from fastfip.fisher.graph.norm_rules import batch_norm_builders
from fastfip.fisher.graph.recipe import Recipe, Slots, output_shape, rule
from fastfip.fisher.graph.rules import convolution_recipe
from fastfip.fisher.graph.sums import centred_sums
from fastfip.nets.state import LOW_PRECISION
from fastfip.ops.convolution import ConvolutionOptions

_DENSITY = (2 * math.pi) ** -0.5  # of the normal distribution at 0
_CHUNK = 1 << 14  # numbers at a time: what stays in the cache


def _wanted(ctx: Any) -> list[bool]:
    """Which tensors the backward pass in progress goes on to: Python functions are not told by torch."""
    return [node is not None and _executed(node) for node, _ in ctx.next_functions] + [False] * 5


def _executed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient was asked for
        return True


class _ConvBackward(torch.autograd.Function):
    """Gradients of a convolution with respect to x and w, those that are wanted."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: ConvolutionOptions, wanted: list[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        ctx.set_materialize_grads(False)
        dx, dw, _ = torch.ops.aten.convolution_backward(g, x, w, None, *options, [*wanted, False])
        return dx, dw

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        dg = dx = dw = None
        need_g, need_x, need_w = ctx.needs_input_grad[:3]
        if u is not None:  # <u, dx> is <g, conv(u, w)>
            if need_g:
                dg = _convolve(u, w, None, ctx.options)
            if need_w:
                dw = _ConvBackward.apply(g, u, w, ctx.options, [False, True])[1]
        if v is not None:  # <v, dw> is <g, conv(x, v)>
            if need_g:
                other = _convolve(x, v, None, ctx.options)
                dg = other if dg is None else dg + other
            if need_x:
                dx = _ConvBackward.apply(g, x, v, ctx.options, [True, False])[0]
        return dg, dx, dw, None, None


class _SecondOrderConvolution(torch.autograd.Function):
    """A convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, options: ConvolutionOptions) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options = options
        return torch.ops.aten.convolution(x, w, bias, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias = _wanted(ctx)[:3]
        dx = dw = None
        if need_x or need_w:
            dx, dw = _ConvBackward.apply(g, x, w, ctx.options, [need_x, need_w])
        return dx, dw, g.sum([0, *range(2, g.dim())]) if need_bias else None, None


def _convolve(x: Tensor, w: Tensor, bias: Tensor | None, options: ConvolutionOptions) -> Tensor:
    return _SecondOrderConvolution.apply(x, w, bias, options)


class _ScaleBackward(torch.autograd.Function):
    """u -> u * s of each channel, and for s the sum of what it multiplies: the map is symmetric in u and its result."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(g, s)
        return g * _channels(s, g)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, s = ctx.saved_tensors
        dg = _ScaleBackward.apply(u, s) if ctx.needs_input_grad[0] else None
        ds = centred_sums(u, g, torch.zeros_like(s))[0].sum(0).to(s.dtype) if ctx.needs_input_grad[1] else None
        return dg, ds


class _SecondOrderNorm(torch.autograd.Function):
    """BatchNorm with running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        scale = rstd if weight is None else rstd * weight
        ctx.save_for_backward(x, weight, mean, rstd)
        shift = -mean * scale if bias is None else bias - mean * scale
        return torch.addcmul(_channels(shift, x), x, _channels(scale, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, _, _, need_weight, need_bias = _wanted(ctx)[:5]
        dx = dw = db = None
        if need_x:
            dx = _ScaleBackward.apply(g, rstd if weight is None else rstd * weight)
        if need_weight or need_bias:
            dot, total = centred_sums(g, x, mean)
            dw = (dot.sum(0) * rstd).to(g.dtype) if need_weight else None
            db = total.sum(0).to(g.dtype) if need_bias else None
        return dx, None, None, dw, db


class _GeluBackward(torch.autograd.Function):
    """g f'(x), with f the exact GELU: f' = Phi(x) + x phi(x) and f'' = (2 - x^2) phi(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        dg = _GeluBackward.apply(u, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dg, None
        if torch.is_grad_enabled():  # a third derivative is wanted
            return dg, u * g * (2 - x.square()) * (x.square() * -0.5).exp() * _DENSITY
        flat = [t.reshape(-1) for t in (u, g, x)]
        dx, room = torch.empty_like(flat[2]), torch.empty(min(_CHUNK, x.numel()), dtype=x.dtype, device=x.device)
        for k in range(0, x.numel(), _CHUNK):
            part = slice(k, k + _CHUNK)
            un, gn, xn, out = (t[part] for t in (*flat, dx))
            density = room[: len(xn)]
            torch.mul(xn, xn, out=out)
            torch.mul(out, -0.5, out=density).exp_().mul_(_DENSITY)
            out.neg_().add_(2).mul_(density).mul_(un).mul_(gn)
        return dg, dx.view(x.shape)


class _SecondOrderGelu(torch.autograd.Function):
    """The exact GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _GeluBackward.apply(g, ctx.saved_tensors[0])


def _channels(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *(1,) * (like.dim() - 2))


# ------------------------------------------------------------------------------------------- in place of torch's own


def _convolution(dims: int) -> Callable[..., Tensor | None]:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str) or x.dim() != dims + 2 or not _float(x, weight):
            return None
        sizes = [_many(value, dims) for value in (stride, padding, dilation)]
        return _convolve(x, weight, bias, (*sizes, False, [0] * dims, groups))  # type: ignore[arg-type]

    return call


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or x.dim() < 2 or not _float(x, running_var):
        return None
    if running_mean.requires_grad or running_var.requires_grad or (weight is None and bias is not None):
        return None
    return _SecondOrderNorm.apply(x, running_mean, (running_var + eps).rsqrt(), weight, bias)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    plain = approximate == "none" and x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    return _SecondOrderGelu.apply(x) if plain and x.requires_grad else None


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor | None:
    if not x.requires_grad:
        return None
    wide = x.float() if x.dtype in LOW_PRECISION else x  # as torch does: x + 3 alone rounds x away
    out = (F.relu6(wide + 3) / 6).to(x.dtype)
    return x.copy_(out) if inplace else out


def _many(value: Any, dims: int) -> list[int]:
    sizes = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return sizes * dims if len(sizes) == 1 else sizes


def _float(x: Tensor, other: Tensor) -> bool:
    """Types that are the same here and there: autocast and mixed types go torch's own way."""
    return (
        x.dtype == other.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


STANDS_IN: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    F.batch_norm: _batch_norm,
    F.gelu: _gelu,
    F.hardsigmoid: _hardsigmoid,
}


class CheapSecondOrder(TorchFunctionMode):
    """While it is entered, the layers above are computed by the functions of this file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute a layer by its stand-in, where one applies; None from a stand-in says that it does not."""
        kwargs = kwargs or {}
        out = None
        if func in STANDS_IN and torch.is_grad_enabled() and {*types} <= {Tensor, torch.nn.Parameter}:
            out = STANDS_IN[func](*args, **kwargs)
        return func(*args, **kwargs) if out is None else out


# ------------------------------------------------------------------------------------------------------------- rules


@rule("_SecondOrderConvolutionBackward")
def _convolution_rule(node: Any, slots: Slots, samples: int) -> Recipe | None:
    stride, padding, dilation, _, _, groups = node.options
    return convolution_recipe(
        node, slots, samples, (stride, padding, dilation), groups, False, lambda: node.saved_tensors[0]
    )


@rule("_SecondOrderNormBackward")
def _batch_norm_rule(node: Any, slots: Slots, samples: int) -> Recipe | None:
    z = output_shape(node)
    if 0 in slots:
        return None

    def saved() -> tuple[Tensor, Tensor, Tensor]:
        x, _, mean, rstd = node.saved_tensors
        return x, mean, rstd

    builders = batch_norm_builders(slots, 3, saved)
    return Recipe("norm", z, candidates((0,), z, samples), slots, builders, dict.fromkeys(slots, SumForm))
