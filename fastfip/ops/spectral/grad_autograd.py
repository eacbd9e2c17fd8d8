"""Autograd and tracing of `spectral_grad`: the op as torch sees it.

With w [N, G, K] the gradient at each, and w q, w p the products in every position:

    dg = (w p) U^T    dx = (w q) V^T (the adjoint of the windows)    du = sum_nt g (w p)^T    dv = sum_nt x (w q)^T

Only the op's own operands are saved: p and q are formed again, so a layer keeps nothing for them between the passes.
The first derivative is written in torch operations, so all others exist too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.convolution import ConvShape, ShapeArguments, arguments_of, shape_of
from fastfip.ops.memory import accumulation_dtype
from fastfip.ops.spectral.linear_map import SpectralFactors, SpectralMap

LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
LIBRARY.define(
    "spectral_grad(Tensor g, Tensor x, Tensor? u, Tensor? v, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " int groups, str backend) -> Tensor"
)

SpectralImplementation = Callable[[str, Tensor, Tensor, "Tensor | None", "Tensor | None", "ConvShape | None"], Tensor]


def define(run: SpectralImplementation) -> None:
    """Give the op its implementation: run(backend, g, x, u, v, shape) returns each [N, G, K]."""

    def forward(
        g: Tensor,
        x: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        backend: str,
    ) -> Tensor:
        return run(backend, g, x, u, v, shape_of((kernel, stride, padding, dilation, groups)))

    LIBRARY.impl("spectral_grad", forward, "CompositeExplicitAutograd")


def result_size(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None
) -> tuple[int, int, int]:
    """N, G and K."""
    groups = 1 if shape is None else shape.groups
    if u is not None or v is not None:
        return g.shape[0], groups, (u if u is not None else v).shape[2]  # type: ignore[union-attr]
    return g.shape[0], groups, g.shape[2 if shape is None else 1] // groups


def _map(factor: Tensor, shape: ConvShape | None) -> SpectralMap:
    return SpectralMap(factor, SpectralFactors(factor, factor, factor, factor), shape)


def project(t: Tensor, factor: Tensor | None, shape: ConvShape | None, *, right: bool) -> Tensor:
    """Return t times its directions, in the dtype of t: x V (`right`) or g U; t itself where there are none."""
    if factor is None:
        return t
    m = _map(factor, shape)
    return m.right(t) if right else m.left(t)


@torch.library.register_fake("fastfip::spectral_grad", lib=LIBRARY)
def _fake(
    g: Tensor,
    x: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    size = result_size(g, x, u, v, shape_of((kernel, stride, padding, dilation, groups)))
    return g.new_empty(size, dtype=accumulation_dtype(g.dtype))


def _under_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """One more axis of g and x is more samples; with directions of its own each element is a call of its own."""
    size, op = info.batch_size, torch.ops.fastfip.spectral_grad
    if in_dims[2] is None and in_dims[3] is None:
        pairs = zip(inputs[:2], in_dims[:2])
        g, x = (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs)
        each = op(g.flatten(0, 1), x.flatten(0, 1), *inputs[2:])
        return each.unflatten(0, (size, g.shape[1])), 0
    parts = [t if dim is None else t.unbind(dim) for t, dim in zip(inputs[:4], in_dims)]
    rows = [
        op(*(t if d is None else t[k] for t, d in zip(parts, in_dims)), *inputs[4:]) for k in range(info.batch_size)
    ]
    return torch.stack(rows), 0


torch.library.register_vmap("fastfip::spectral_grad", _under_vmap, lib=LIBRARY)


class _SpectralGrad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, options: ShapeArguments, backend: str
    ) -> Tensor:
        return torch.ops.fastfip.spectral_grad(g, x, u, v, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        shape, need = shape_of(ctx.options), ctx.needs_input_grad
        g, x = (t.to(w.dtype) for t in saved[:2])
        u, v = (None if t is None else t.to(w.dtype) for t in saved[2:])
        w = w if shape is None else w.reshape(w.shape[0], -1, *[1] * len(shape.kernel))
        dg = dx = du = dv = None
        if need[0] or need[2]:
            wp = w * project(x, v, shape, right=True)
            dg = (wp if u is None else _map(u, shape).left_adjoint(wp)) if need[0] else None
            du = _left_factor(g, wp, shape) if need[2] else None
        if need[1] or need[3]:
            wq = w * project(g, u, shape, right=False)
            dx = (wq if v is None else _map(v, shape).right_adjoint(wq, tuple(x.shape))) if need[1] else None
            dv = _right_factor(x, wq, v, shape) if v is not None and need[3] else None
        first = (None if d is None else d.to(t.dtype) for d, t in zip((dg, dx, du, dv), saved))
        return *first, None, None


def _left_factor(g: Tensor, wp: Tensor, shape: ConvShape | None) -> Tensor:
    """sum_nt g (w p)^T as [G, O/G, K]."""
    if shape is None:
        return (g.flatten(0, 1).mT @ wp.flatten(0, 1)).unsqueeze(0)
    left, right = (t.reshape(t.shape[0], shape.groups, -1, t[0, 0].numel()) for t in (g, wp))
    return (left @ right.mT).sum(0)


def _right_factor(x: Tensor, wq: Tensor, v: Tensor, shape: ConvShape | None) -> Tensor:
    """sum_nt x (w q)^T as [G, I, K]: of a convolution the gradient of its kernels."""
    if shape is None:
        return (x.flatten(0, 1).mT @ wq.flatten(0, 1)).unsqueeze(0)
    kernel = v.mT.reshape(-1, v.shape[1] // shape.taps, *shape.kernel)
    options = shape.stride, shape.padding, shape.dilation, False, [0] * len(shape.kernel), shape.groups
    found = torch.ops.aten.convolution_backward(wq, x, kernel, None, *options, [False, True, False])[1]
    return found.reshape(v.shape[0], v.shape[2], v.shape[1]).mT


def sum_by_sample(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None, backend: str
) -> Tensor:
    """Return each [N, G, K], by that backend and outside of any autograd graph."""
    return torch.ops.fastfip.spectral_grad(g, x, u, v, *arguments_of(shape), backend)


def differentiable(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None, backend: str
) -> Tensor:
    """Return each [N, G, K], by that backend."""
    return _SpectralGrad.apply(g, x, u, v, arguments_of(shape), backend)
