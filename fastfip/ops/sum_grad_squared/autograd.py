"""Autograd and tracing of `sum_grad_squared`: the op as torch sees it.

With C[o,i] and D[o,i] the gradients at out and at grad, G_n = g_n^T a_n and M_n = 2 C G_n + D (elementwise in o, i):

    first:   dg_n = a_n M_n^T              da_n = g_n M_n
    second:  with u, v the gradients at dg, da and P_n = u_n^T a_n + g_n^T v_n, Q_n = 2 C P_n
             dg_n = v_n M_n^T + a_n Q_n^T  da_n = u_n M_n + g_n Q_n   dC = sum_n 2 G_n P_n   dD = sum_n P_n

Only g and a are saved; G_n is formed again, a few samples at a time. The second derivative is written in torch
operations, so higher ones exist too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.memory import CHUNK, accumulation_dtype

LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
LIBRARY.define("sum_grad_squared(Tensor g, Tensor a, bool gradient, str backend) -> (Tensor, Tensor)")
LIBRARY.define("sum_grad_squared_backward(Tensor g, Tensor a, Tensor at_out, Tensor? at_grad) -> (Tensor, Tensor)")

Implementation = Callable[[str, Tensor, Tensor, Tensor, "Tensor | None"], None]


def define(run: Implementation) -> None:
    """Give the op its implementation: run(backend, g, a, out, grad) adds to out and grad."""

    def forward(g: Tensor, a: Tensor, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
        out = g.new_zeros((g.shape[2], a.shape[2]), dtype=accumulation_dtype(g.dtype))
        grad = torch.zeros_like(out) if gradient else out.new_zeros(0)
        run(backend, g, a, out, grad if gradient else None)
        return out, grad

    LIBRARY.impl("sum_grad_squared", forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastfip::sum_grad_squared", lib=LIBRARY)
def _fake(g: Tensor, a: Tensor, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
    out = g.new_empty((g.shape[2], a.shape[2]), dtype=accumulation_dtype(g.dtype))
    return out, torch.empty_like(out) if gradient else out.new_empty(0)


def _backward(g: Tensor, a: Tensor, at_out: Tensor, at_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    dg, da = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, a))
    n, t = g.shape[:2]
    acc = at_out.dtype
    if t == 1:
        g1, a1 = g[:, 0].to(acc), a[:, 0].to(acc)
        first, second = 2 * g1 * (a1.square() @ at_out.t()), 2 * a1 * (g1.square() @ at_out)
        if at_grad is not None:
            first, second = first + a1 @ at_grad.t(), second + g1 @ at_grad
        dg[:, 0], da[:, 0] = first, second
        return dg, da
    step = max(1, min(n, CHUNK // max(1, at_out.numel())))
    for low in range(0, n, step):
        part = slice(low, low + step)
        gp, ap = g[part].to(acc), a[part].to(acc)
        m = (gp.mT @ ap).mul_(2 * at_out)
        if at_grad is not None:
            m += at_grad
        dg[part], da[part] = ap @ m.mT, gp @ m
    return dg, da


LIBRARY.impl("sum_grad_squared_backward", _backward, "CompositeExplicitAutograd")


def _loop_under_vmap(name: str) -> None:
    """Under vmap run the op once for each element: it fills the machine by itself."""
    op = getattr(torch.ops.fastfip, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        parts = [x if dim is None else x.unbind(dim) for x, dim in zip(inputs, in_dims)]
        each = [op(*(x if d is None else x[k] for x, d in zip(parts, in_dims))) for k in range(info.batch_size)]
        return tuple(torch.stack(results) for results in zip(*each)), (0, 0)

    torch.library.register_vmap(f"fastfip::{name}", rule, lib=LIBRARY)


_loop_under_vmap("sum_grad_squared")
_loop_under_vmap("sum_grad_squared_backward")


@torch.library.register_fake("fastfip::sum_grad_squared_backward", lib=LIBRARY)
def _fake_backward(g: Tensor, a: Tensor, at_out: Tensor, at_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    dg, da = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, a))
    return dg, da


class _SumGradSquaredBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, a: Tensor, at_out: Tensor, at_grad: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fastfip.sum_grad_squared_backward(g, a, at_out, at_grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        g, a, c, d = ctx.saved_tensors
        acc = c.dtype
        gw, aw, u, v = (x.to(acc) for x in (g, a, u, v))
        product, p = gw.mT @ aw, u.mT @ aw + gw.mT @ v
        m, q = 2 * c * product, 2 * c * p
        if d is not None:
            m = m + d
        dg, da = v @ m.mT + aw @ q.mT, u @ m + gw @ q
        at_c = 2 * (product * p).sum(0)
        return dg.to(g.dtype), da.to(a.dtype), at_c, None if d is None else p.sum(0)


class _SumGradSquared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, a: Tensor, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
        return torch.ops.fastfip.sum_grad_squared(g, a, gradient, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.gradient = inputs[2]

    @staticmethod
    def backward(ctx: Any, at_out: Tensor, at_grad: Tensor) -> tuple[Tensor | None, ...]:
        g, a = ctx.saved_tensors
        dg, da = _SumGradSquaredBackward.apply(g, a, at_out, at_grad if ctx.gradient else None)
        return dg, da, None, None


def differentiable(g: Tensor, a: Tensor, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Return out [O, I] and grad [O, I] (empty unless `gradient`) of g [N, T, O] and a [N, T, I], by that backend."""
    out, grad = _SumGradSquared.apply(g, a, gradient, backend)
    return out, grad
