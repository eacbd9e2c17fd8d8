"""Op `spectral_apply`: a layer whose weight moves along its singular directions, as torch sees it.

    y = W x + U ((s - sigma) * (V^T x)) + bias + residual,    p = V^T x,    s = relu(sigma + delta)

and its adjoint, x = W^T g + V ((s - sigma) * (U^T g)) with q = U^T g. Both are operators of torch, so a compiled model
has them in its one graph with the derivative that forms no gradient of a whole weight (`op.py` has the same layer for
models that are not compiled, which shares what was found out about the directions between calls).

Shapes are those of `op.py`: a Linear weight is [O, I] with u [1, O, K], v [1, I, K], sigma and delta [1, K]; a
convolution's is [O, C/G, *kernel] with u [G, O/G, K], v [G, C/G * taps, K], sigma and delta [G, K]. u and v have
orthonormal columns that are singular vectors of W, and sigma their singular values: p and q are read from the narrower
side of the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.backends import triton
from fastfip.ops.convolution import ConvShape, ShapeArguments, arguments_of, shape_of
from fastfip.ops.memory import Scratch
from fastfip.ops.registry import Backend, Op
from fastfip.ops.spectral.linear_map import SpectralFactors, SpectralMap, like_input
from fastfip.ops.spectral.op import check, gradients

__all__ = ["SPECTRAL_ADJOINT", "SPECTRAL_APPLY", "spectral_adjoint", "spectral_apply", "spectral_layer"]

Pair = tuple[Tensor, Tensor]


def reference(x: Tensor, bias: Tensor | None, m: SpectralMap) -> Pair:
    """Define the op: y and p."""
    return m.forward(x, bias)


def reference_adjoint(g: Tensor, size: tuple[int, ...], m: SpectralMap) -> Pair:
    """Define the adjoint: x and q."""
    return m.backward(g, size)


def _triton(x: Tensor, bias: Tensor | None, m: SpectralMap) -> Pair:
    from fastfip.ops.spectral.apply_triton import spectral_apply as run  # imports triton

    return run(x, bias, m)


def _triton_adjoint(g: Tensor, size: tuple[int, ...], m: SpectralMap) -> Pair:
    from fastfip.ops.spectral.apply_triton import spectral_adjoint as run  # imports triton

    return run(g, size, m)


#: Triton's kernel holds the projections of a tile in registers, and offsets in a tile have 32 bits.
MOST_DIRECTIONS, LONGEST = 128, 2**24


def _triton_refuses(x: Tensor, weight: Tensor, u: Tensor, v: Tensor, shape: ConvShape | None) -> str:
    if shape is not None and not shape.pointwise:
        return "of convolutions it has those with one tap, stride 1 and no padding"
    if u.shape[-1] > MOST_DIRECTIONS:
        return f"it takes at most {MOST_DIRECTIONS} directions, not {u.shape[-1]}"
    groups, positions = (1, 1) if shape is None else (shape.groups, math.prod(x.shape[2:]))
    longest = max(weight.shape[0], groups * weight.shape[1], positions)
    if longest > LONGEST:
        return f"it takes at most {LONGEST} features, or positions of a map, not {longest}"
    return triton.refuses(x, weight, u, v)


# triton: runs only when it is asked for.
SPECTRAL_APPLY = Op(
    "spectral_apply",
    (Backend("triton", _triton, _triton_refuses, automatic=False), Backend("reference", reference)),
)
SPECTRAL_ADJOINT = Op(
    "spectral_adjoint",
    (Backend("triton", _triton_adjoint, _triton_refuses, automatic=False), Backend("reference", reference_adjoint)),
)

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


def _apply(x: Tensor, bias: Tensor | None, *rest: Any) -> Pair:
    m, backend = _parts(rest)
    y, p = SPECTRAL_APPLY[backend].run(x, bias, m)
    return like_input(y, x), like_input(p, x)


def _adjoint(g: Tensor, size: Sequence[int], *rest: Any) -> Pair:
    m, backend = _parts(rest)
    x, q = SPECTRAL_ADJOINT[backend].run(g, tuple(size), m)
    return like_input(x, g), like_input(q, g)


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


for _name, _run, _fake in (
    ("spectral_apply", _apply, _fake_apply),
    ("spectral_adjoint", _adjoint, _fake_adjoint),
    ("spectral_apply_backward", _backward, _fake_backward),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
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


def spectral_apply(
    x: Tensor,  # [..., I] or [N, C, *in]
    weight: Tensor,  # [O, I] or [O, C/G, *kernel]
    u: Tensor,  # [G, O/G, K]
    v: Tensor,  # [G, I, K]
    sigma: Tensor,  # [G, K]
    delta: Tensor,  # [G, K]
    bias: Tensor | None = None,  # [O]
    shape: ConvShape | None = None,
    *,
    residual: Tensor | None = None,  # like y
    moved: bool = False,
    backend: str = "auto",
) -> Pair:  # y [..., O] or [N, O, *out], p [..., K] or [N, G*K, *out]
    """Return y = W x + U ((s - sigma) * (V^T x)) + bias + residual and p = V^T x, with s = relu(sigma + delta).

    Differentiable any number of times with respect to x, delta, bias and residual, one graph under `torch.compile`
    (first derivatives), and usable under `torch.func`. The gradient of the whole weight is never formed; weight, u, v
    and sigma get none.

    Args:
        x: the layer's input, float32, float64, bfloat16 or float16, any strides; the weight's dtype.
        weight: W, or W(delta) itself with `moved`.
        u: orthonormal columns, left singular vectors of W in each group; float32, or float64.
        v: right singular vectors likewise.
        sigma: their singular values.
        delta: how far they have moved.
        bias: of the layer.
        shape: of a convolution; None for a Linear layer.
        residual: added to the result.
        moved: whether `weight` is W(delta), put together by the caller.
        backend: "auto", or the name of one.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
        BackendError: the backend asked for cannot run here.

    Source: Fast FIP (arXiv 2409.00863); docs/kernels.md says what it costs.
    """
    y, p = _applied(x, weight, u, v, sigma, delta, bias, shape, moved, True, backend)
    return (y if residual is None else y + residual), p


def _features(t: Tensor, u: Tensor, v: Tensor, shape: ConvShape | None, *, adjoint: bool) -> tuple[int, int]:
    """Return how many features the outputs and the inputs have; raise ValueError where t is neither."""
    groups, outputs = u.shape[0], u.shape[0] * u.shape[1]
    inputs = groups * v.shape[1] // (1 if shape is None else shape.taps)
    dims, axis = (1, -1) if shape is None else (2 + len(shape.kernel), 1)
    want = outputs if adjoint else inputs
    fits = t.dim() >= 1 if shape is None else t.dim() == dims
    if not fits or t.shape[axis] != want:
        kind = "a map of" if shape is not None else "rows of"
        raise ValueError(f"{list(t.shape)} is not {kind} {want} features, which the directions are for")
    return outputs, inputs


def _has_outputs(size: tuple[int, ...], inputs: int, g: Tensor, shape: ConvShape | None) -> bool:
    if shape is None:
        return size == (*g.shape[:-1], inputs)
    if len(size) != g.dim() or size[:2] != (g.shape[0], inputs):
        return False
    axes = zip(g.shape[2:], size[2:], shape.kernel, shape.stride, shape.padding, shape.dilation)
    return all(out == (n + 2 * p - d * (k - 1) - 1) // s + 1 for out, n, k, s, p, d in axes)


def spectral_layer(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    shape: ConvShape | None,
) -> Tensor:
    """Return y of `spectral_apply` from W(delta), for first derivatives: what a compiled model computes."""
    return _applied(x, weight, u, v, sigma, delta, bias, shape, True, False, "auto")[0]


def _applied(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    shape: ConvShape | None,
    moved: bool,
    p_too: bool,
    backend: str,
) -> Pair:
    check(x, weight, SpectralFactors(u, v, sigma, sigma), delta)
    outputs, _ = _features(x, u, v, shape, adjoint=False)
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"the bias {list(bias.shape)} is not that of {outputs} output features")
    chosen = SPECTRAL_APPLY.choose(backend, x, weight, u, v, shape).name
    constants = (t.detach() for t in (weight, u, v, sigma))
    return _Apply.apply(x, delta, bias, *constants, moved, p_too, arguments_of(shape), chosen)


def spectral_adjoint(
    g: Tensor,  # [..., O] or [N, O, *out]
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    delta: Tensor,
    size: Sequence[int],
    shape: ConvShape | None = None,
    *,
    moved: bool = False,
    backend: str = "auto",
) -> Pair:  # x of that size, q [..., K] or [N, G*K, *out]
    """Return x = W(delta)^T g, of that size, and q = U^T g: the adjoint of `spectral_apply`.

    It is a transposed convolution's forward pass.

    Arguments and errors are those of :func:`spectral_apply`; differentiable likewise with respect to g and delta.
    """
    check(g, weight, SpectralFactors(u, v, sigma, sigma), delta)
    _, inputs = _features(g, u, v, shape, adjoint=True)
    if not _has_outputs(tuple(size), inputs, g, shape):
        raise ValueError(f"an input of the size {list(size)} does not have the outputs {list(g.shape)}")
    chosen = SPECTRAL_ADJOINT.choose(backend, g, weight, u, v, shape).name
    constants = (t.detach() for t in (weight, u, v, sigma))
    return _Adjoint.apply(g, delta, tuple(size), *constants, moved, True, arguments_of(shape), chosen)
