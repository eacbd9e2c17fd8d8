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

from torch import Tensor

from fastfip.ops.backends import triton
from fastfip.ops.convolution import ConvShape
from fastfip.ops.registry import Backend, Op
from fastfip.ops.spectral.apply_autograd import Pair, define, differentiable, differentiable_adjoint
from fastfip.ops.spectral.linear_map import SpectralFactors, SpectralMap
from fastfip.ops.spectral.op import check

__all__ = ["SPECTRAL_ADJOINT", "SPECTRAL_APPLY", "spectral_adjoint", "spectral_apply", "spectral_layer"]


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

define(
    lambda backend, x, bias, m: SPECTRAL_APPLY[backend].run(x, bias, m),
    lambda backend, g, size, m: SPECTRAL_ADJOINT[backend].run(g, size, m),
)


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
    return differentiable(x, delta, bias, (weight, u, v, sigma), moved, p_too, shape, chosen)


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
    return differentiable_adjoint(g, delta, tuple(size), (weight, u, v, sigma), moved, shape, chosen)
