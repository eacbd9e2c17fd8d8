"""Ops `spectral_linear` and `spectral_conv`: a layer whose weight moves along its singular directions only.

    y = W(delta) x + bias,    W(delta) = W + U diag(relu(sigma + delta) - sigma) V^T
    dl/ddelta_r = 1[s_r > 0] sum_{n,t} q[n,t,r] p[n,t,r],    p = x V,  q = (dl/dy) U,  s = relu(sigma + delta)

No gradient of a whole weight is formed, and of a layer's input only its image p [.., K] is kept for the backward pass.
`linear_map.py` has the products and where p and q come from, cheaply. W(delta) is kept by nobody: with
`scratch`, `weight` is W, and what a product needs beyond that is made for its length.

Shapes: a Linear weight is [O, I] with u [1, O, K], v [1, I, K], s and delta [1, K]; a convolution's is [O, C/G,
*kernel] with u [G, O/G, K], v [G, C/G * taps, K], s and delta [G, K]. u and v have orthonormal columns that are
singular vectors of `weight`. A transposed convolution is the adjoint: its input plays the part of dl/dy.

`apply.py` has the same layer as operators of torch, which take tensors only; here a layer's state is shared between
calls: what was found out about its directions, scratch memory, and which gradients a pass is for.

Differentiable any number of times with respect to x, delta and bias. Source: Fast FIP, in
FIP (arXiv 2409.00863).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import Scratch
from fastfip.ops.spectral.grad import prefers_kernel
from fastfip.ops.spectral.grad_autograd import sum_by_sample
from fastfip.ops.spectral.linear_map import (
    SpectralFactors,
    SpectralMap,
    WantedGradients,
    is_even,
    prefers_dense,
    recompose,
)

__all__ = [
    "SpectralFactors",
    "WantedGradients",
    "is_even",
    "prefers_dense",
    "project",
    "recompose",
    "spectral_conv",
    "spectral_linear",
]


class _SpectralForward(torch.autograd.Function):
    """(x, delta, bias) -> (y, p); p is an output so that second derivatives go through it."""

    @staticmethod
    def forward(x: Tensor, delta: Tensor, bias: Tensor | None, map_: SpectralMap) -> tuple[Tensor, Tensor]:
        return map_.forward(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, delta, _, ctx.map = inputs
        ctx.size = tuple(x.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(delta, output[1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gp: Tensor | None) -> tuple[Any, ...]:
        delta, p = ctx.saved_tensors
        m: SpectralMap = ctx.map
        gx = gdelta = gbias = None
        if gy is not None:
            gx, gdelta = _back(ctx, m, delta, p, gy)
            if ctx.needs_input_grad[2] and m.wanted.deltas:
                gbias = m.of_bias(gy)
        if gp is not None and ctx.needs_input_grad[0]:
            other = m.right_adjoint(gp, ctx.size)
            gx = other if gx is None else gx + other
        return gx, gdelta, gbias, None


def _back(ctx: Any, m: SpectralMap, delta: Tensor, p: Tensor, gy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if not m.wanted.deltas and not torch.is_grad_enabled():
        return (m.adjoint(gy, ctx.size) if ctx.needs_input_grad[0] else None), None
    if not torch.is_grad_enabled() and ctx.needs_input_grad[1]:
        return gradients(m, p, gy, ctx.size, ctx.needs_input_grad[0])
    if ctx.needs_input_grad[0]:
        gx, q = _SpectralAdjoint.apply(gy, delta, m, ctx.size)
    else:
        gx, q = None, m.left(gy) if ctx.needs_input_grad[1] else None
    return gx, m.total(p, q) if ctx.needs_input_grad[1] else None


def gradients(
    m: SpectralMap, p: Tensor, gy: Tensor, size: tuple[int, ...], x_too: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of x, of that size, and of delta, where nobody asks for q; the first only if wanted."""
    gx = m.adjoint_alone(gy, size) if x_too else None
    if gx is None and x_too:
        gx, q = m.backward(gy, size)
        return gx, m.total(p, q)
    gdelta = _total_without_q(m, p, gy, gx)
    return gx, m.total(p, m.left_from(gy, gx)) if gdelta is None else gdelta


def _total_without_q(m: SpectralMap, p: Tensor, gy: Tensor, gx: Tensor | None) -> Tensor | None:
    """Return sum_{n,t} p q by the op `spectral_grad`, [G, K]; None where its kernel does not run, or is the slower."""
    g, u, weak = m.left_operands(gy, gx)
    if m.conv is None:
        g, p = (t.reshape(1, -1, t.shape[-1]) for t in (g, p))
    operands = g, p, u, None, m.conv
    if not prefers_kernel(*operands):
        return None
    each = sum_by_sample(*operands, "native").sum(0)
    if weak is not None:
        direct = m.left(gy, weak).reshape(-1, len(weak))
        each[0, weak] = (p[0][:, weak] * direct).sum(0, dtype=each.dtype)
    return each.to(m.f.s.dtype) * (m.f.s > 0)


class _SpectralAdjoint(torch.autograd.Function):
    """(g, delta) -> (W(delta)^T g, g U)."""

    @staticmethod
    def forward(g: Tensor, delta: Tensor, map_: SpectralMap, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return map_.backward(g, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, delta, ctx.map, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(delta, output[1])

    @staticmethod
    def backward(ctx: Any, gx: Tensor | None, gq: Tensor | None) -> tuple[Any, ...]:
        delta, q = ctx.saved_tensors
        m: SpectralMap = ctx.map
        gg = gdelta = None
        if gx is not None:
            gg, p = _SpectralForward.apply(gx, delta, None, m)
            if ctx.needs_input_grad[1]:
                gdelta = m.total(p, q)
        if gq is not None and ctx.needs_input_grad[0]:
            other = m.left_adjoint(gq)
            gg = other if gg is None else gg + other
        return gg, gdelta, None, None


def spectral_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I]
    factors: SpectralFactors,
    delta: Tensor,  # [1, K]
    bias: Tensor | None = None,  # [O]
    *,
    scratch: Scratch | None = None,
    wanted: WantedGradients | None = None,
) -> tuple[Tensor, Tensor]:  # [..., O], [..., K]
    """Return y = x W(delta)^T + bias, and p = x V.

    `weight` is W(delta), or with `scratch` it is W, which must not change before the backward pass.
    """
    check(x, weight, factors, delta)
    return _SpectralForward.apply(x, delta, bias, SpectralMap(weight.detach(), factors, None, wanted, scratch))


def spectral_conv(
    x: Tensor,  # [N, C, *in]
    weight: Tensor,  # [O, C/G, *kernel]
    factors: SpectralFactors,
    delta: Tensor,  # [G, K]
    shape: ConvShape,
    bias: Tensor | None = None,  # [O]
    *,
    transposed_to: tuple[int, ...] | None = None,
    scratch: Scratch | None = None,
    wanted: WantedGradients | None = None,
) -> tuple[Tensor, Tensor]:  # [N, O, *out], [N, G*K, *out]
    """Return the convolution of x with W(delta), and p; `weight` and `scratch` as for `spectral_linear`.

    `transposed_to`: the size of the result of a transposed convolution, whose weight is [C, O/G, *kernel] and whose
    second result is x U.
    """
    check(x, weight, factors, delta)
    m = SpectralMap(weight.detach(), factors, shape, wanted, scratch)
    if transposed_to is not None:
        y, q = _SpectralAdjoint.apply(x, delta, m, transposed_to)
        return (y if bias is None else y + bias.reshape(-1, *[1] * len(shape.kernel))), q
    return _SpectralForward.apply(x, delta, bias, m)


def project(x: Tensor, u: Tensor, v: Tensor, shape: ConvShape | None, *, right: bool) -> Tensor:
    """Return x V (`right`) or x U, differentiable: [.., K], or [N, G*K, *out] for a convolution's map."""
    m = SpectralMap(x, SpectralFactors(u, v, u, u), shape)
    return m.right(x) if right else m.left(x)


def check(x: Tensor, weight: Tensor, factors: SpectralFactors, delta: Tensor) -> None:
    """Raise ValueError where the operands of a layer do not fit each other."""
    groups, o, k = factors.u.shape
    i = factors.v.shape[1]
    if factors.v.shape != (groups, i, k) or factors.s.shape != (groups, k) or delta.shape != (groups, k):
        raise ValueError(
            f"u {list(factors.u.shape)}, v {list(factors.v.shape)}, s {list(factors.s.shape)} and delta"
            f" {list(delta.shape)} do not fit: they are [G, O, K], [G, I, K], [G, K] and [G, K]"
        )
    if weight.numel() != groups * o * i or weight.shape[0] != groups * o:
        raise ValueError(
            f"the weight {list(weight.shape)} does not have the {groups} x {o} x {i} numbers of its factors"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"the input is {x.dtype} and the weight {weight.dtype}: cast one of them")
