"""Autograd and tracing of `spectral_apply` and `spectral_adjoint`: the ops as torch sees them.

Each is the other's derivative with respect to its first operand; with p and q from both, dl/ddelta = sum p q. A first
derivative that nobody differentiates again is an operator of its own, which forms no q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.convolution import ConvShape, ShapeArguments, arguments_of, shape_of
from fastfip.ops.memory import Scratch
from fastfip.ops.spectral.linear_map import SpectralFactors, SpectralMap, like_input
from fastfip.ops.spectral.op import gradients

Pair = tuple[Tensor, Tensor]

LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
_FACTORS = "Tensor weight, Tensor u, Tensor v, Tensor sigma, Tensor delta, bool moved"
_OPTIONS = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, str backend"
# The reference looks at numbers to find the weak directions, which no graph of a CUDA stream can hold. Results have the
# memory format of the input, so a compiler may lay maps out as it likes: channels last, convolutions are faster.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe", "flexible_layout") if hasattr(torch.Tag, name))
for _schema in (
    f"spectral_apply(Tensor x, Tensor? bias, {_FACTORS}, {_OPTIONS})",
    f"spectral_adjoint(Tensor g, SymInt[] size, {_FACTORS}, {_OPTIONS})",
    f"spectral_apply_backward(Tensor g, Tensor p, SymInt[] size, bool x_too, {_FACTORS}, {_OPTIONS})",
):
    LIBRARY.define(f"{_schema} -> (Tensor, Tensor)", tags=_TAGS)


def define(
    apply: Callable[[str, Tensor, Tensor | None, SpectralMap], Pair],
    adjoint: Callable[[str, Tensor, tuple[int, ...], SpectralMap], Pair],
) -> None:
    """Give the ops their implementations: apply(backend, x, bias, map) and adjoint(backend, g, size, map)."""

    def forward(x: Tensor, bias: Tensor | None, *rest: Any) -> Pair:
        m, backend = _parts(rest)
        y, p = apply(backend, x, bias, m)
        return like_input(y, x), like_input(p, x)

    def backward(g: Tensor, size: Sequence[int], *rest: Any) -> Pair:
        m, backend = _parts(rest)
        x, q = adjoint(backend, g, tuple(size), m)
        return like_input(x, g), like_input(q, g)

    LIBRARY.impl("spectral_apply", forward, "CompositeExplicitAutograd")
    LIBRARY.impl("spectral_adjoint", backward, "CompositeExplicitAutograd")


def _backward(g: Tensor, p: Tensor, size: Sequence[int], x_too: bool, *rest: Any) -> Pair:
    m, _ = _parts((*rest[:-1], "reference"))  # no other backend has both gradients
    gx, gdelta = gradients(m, p, g, tuple(size), x_too)
    return (g.new_empty(0) if gx is None else like_input(gx, g)), gdelta


def _parts(rest: Sequence[Any]) -> tuple[SpectralMap, str]:
    weight, u, v, sigma, delta, moved, *options, backend = rest
    scratch = None if moved else Scratch()
    if backend == "triton":
        m = _plain_map(rest)
        m.scratch = scratch
        return m, backend
    factors = SpectralFactors.of(u, v, sigma, delta, weight.dtype, even=False if moved else None)
    return SpectralMap(weight, factors, shape_of(options), scratch=scratch), backend


def _plain_map(rest: Sequence[Any]) -> SpectralMap:
    """The map for what divides by no singular value: a look for weak ones would wait for the device."""
    weight, u, v, sigma, delta, _, *options, _ = rest
    factors = SpectralFactors(u, v, sigma, torch.relu(sigma + delta.detach()))
    return SpectralMap(weight, factors, shape_of(options))


def _fake_apply(x: Tensor, bias: Tensor | None, *rest: Any) -> Pair:
    m = _plain_map(rest)
    return like_input(m.product(x, m.weight, bias), x), like_input(m.right(x), x)


def _fake_adjoint(g: Tensor, size: Sequence[int], *rest: Any) -> Pair:
    return like_input(g.new_empty(size), g), like_input(_plain_map(rest).left(g), g)


def _fake_backward(g: Tensor, p: Tensor, size: Sequence[int], x_too: bool, *rest: Any) -> Pair:
    sigma = rest[3]
    return (like_input(g.new_empty(size), g) if x_too else g.new_empty(0)), torch.empty_like(sigma)


LIBRARY.impl("spectral_apply_backward", _backward, "CompositeExplicitAutograd")
for _name, _fake in (
    ("spectral_apply", _fake_apply),
    ("spectral_adjoint", _fake_adjoint),
    ("spectral_apply_backward", _fake_backward),
):
    torch.library.register_fake(f"fastfip::{_name}", _fake, lib=LIBRARY)


class _Apply(torch.autograd.Function):
    """(x, delta, bias) -> (y, p). `p_too` False: p is for the backward pass only, and of no further derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        moved: bool,
        p_too: bool,
        options: ShapeArguments,
        backend: str,
    ) -> Pair:  # every parameter by name: dynamo counts those of a call within a backward pass
        return torch.ops.fastfip.spectral_apply(x, bias, weight, u, v, sigma, delta, moved, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        x, delta, _, weight, u, v, sigma, *ctx.rest = inputs
        ctx.size = x.shape
        if not ctx.rest[1]:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(delta, output[1], weight, u, v, sigma)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gp: Tensor | None) -> tuple[Any, ...]:
        delta, p, weight, u, v, sigma = ctx.saved_tensors
        moved, p_too, options, backend = ctx.rest
        need, size = ctx.needs_input_grad, ctx.size
        gx = gdelta = gbias = None
        m = _plain_map((weight, u, v, sigma, delta, moved, *options, backend))
        if need[2]:
            gbias = m.of_bias(gy)
        if not torch.is_grad_enabled() and need[1]:
            gx, gdelta = torch.ops.fastfip.spectral_apply_backward(
                gy, p, size, need[0], weight, u, v, sigma, delta, moved, *options, backend
            )
        elif need[0] or need[1]:
            gx, q = _Adjoint.apply(gy, delta, size, weight, u, v, sigma, *ctx.rest)
            gdelta = m.total(p, q) if need[1] else None
        if p_too and gp is not None and need[0]:
            assert gx is not None
            gx = gx + m.right_adjoint(gp, size)
        return (gx if need[0] else None, gdelta, gbias, *[None] * 8)


class _Adjoint(torch.autograd.Function):
    """(g, delta) -> (W(delta)^T g, g U)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor,
        delta: Tensor,
        size: Sequence[int],
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        moved: bool,
        p_too: bool,
        options: ShapeArguments,
        backend: str,
    ) -> Pair:
        return torch.ops.fastfip.spectral_adjoint(g, size, weight, u, v, sigma, delta, moved, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        _, delta, _, weight, u, v, sigma, *ctx.rest = inputs
        ctx.save_for_backward(delta, output[1], weight, u, v, sigma)

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gq: Tensor) -> tuple[Any, ...]:
        delta, q, weight, u, v, sigma = ctx.saved_tensors
        moved, _, options, backend = ctx.rest
        need = ctx.needs_input_grad
        m = _plain_map((weight, u, v, sigma, delta, moved, *options, backend))
        y, p = _Apply.apply(gx, delta, None, weight, u, v, sigma, moved, True, options, backend)
        gg = y + m.left_adjoint(gq) if need[0] else None
        return (gg, m.total(p, q) if need[1] else None, *[None] * 9)


def _only_first(in_dims: Sequence[Any]) -> bool:
    return in_dims[0] is not None and not any(isinstance(dim, int) for dim in in_dims[1:])


def _one_by_one(op: Any, size: int, in_dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Pair, tuple[int, int]]:
    dims = [dim if isinstance(t, Tensor) else None for t, dim in zip(inputs, in_dims)]
    rows = [op(*(t if dim is None else t.select(dim, k) for t, dim in zip(inputs, dims))) for k in range(size)]
    first, second = (torch.stack(parts) for parts in zip(*rows))
    return (first, second), (0, 0)


def _apply_under_vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Pair, tuple[int, int]]:
    """One more axis of x alone is more samples."""
    op = torch.ops.fastfip.spectral_apply
    if not _only_first(in_dims):
        return _one_by_one(op, info.batch_size, in_dims, inputs)
    x, linear = inputs[0].movedim(in_dims[0], 0), len(inputs[8]) == 0
    y, p = op(x if linear else x.flatten(0, 1), *inputs[1:])
    return ((y, p) if linear else (y.unflatten(0, x.shape[:2]), p.unflatten(0, x.shape[:2]))), (0, 0)


def _adjoint_under_vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Pair, tuple[int, int]]:
    op = torch.ops.fastfip.spectral_adjoint
    if not _only_first(in_dims):
        return _one_by_one(op, info.batch_size, in_dims, inputs)
    g, size, linear = inputs[0].movedim(in_dims[0], 0), list(inputs[1]), len(inputs[8]) == 0
    if linear:
        return op(g, [len(g), *size], *inputs[2:]), (0, 0)
    x, q = op(g.flatten(0, 1), [len(g) * size[0], *size[1:]], *inputs[2:])
    return (x.unflatten(0, g.shape[:2]), q.unflatten(0, g.shape[:2])), (0, 0)


def _backward_under_vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Pair, tuple[int, int]]:
    return _one_by_one(torch.ops.fastfip.spectral_apply_backward, info.batch_size, in_dims, inputs)


for _name, _rule in (
    ("spectral_apply", _apply_under_vmap),
    ("spectral_adjoint", _adjoint_under_vmap),
    ("spectral_apply_backward", _backward_under_vmap),
):
    torch.library.register_vmap(f"fastfip::{_name}", _rule, lib=LIBRARY)


#: W, u, v and sigma, which get no gradient.
Constants = tuple[Tensor, Tensor, Tensor, Tensor]


def differentiable(
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    constants: Constants,
    moved: bool,
    p_too: bool,
    shape: ConvShape | None,
    backend: str,
) -> Pair:
    """Return y and p, by that backend; `p_too` False: p has no derivative of its own."""
    return _Apply.apply(x, delta, bias, *_held(constants), moved, p_too, arguments_of(shape), backend)


def differentiable_adjoint(
    g: Tensor,
    delta: Tensor,
    size: tuple[int, ...],
    constants: Constants,
    moved: bool,
    shape: ConvShape | None,
    backend: str,
) -> Pair:
    """Return x of that size and q, by that backend."""
    return _Adjoint.apply(g, delta, size, *_held(constants), moved, True, arguments_of(shape), backend)


def _held(constants: Constants) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in constants)
