"""Op `spectral_grad`: the gradient of a layer's singular values, for each sample or for all of them together.

    each[n, k] = 1[s_k > 0] sum_t q[n, t, k] p[n, t, k],    q = g U,  p = x V
    spectral_grad = sum_n each[n],                          spectral_sum_grad_squared = sum_n each[n]^2

g is the gradient at the layer's output and x its input: [N, T, O] and [N, T, I] for a Linear layer; for a convolution
the maps [N, O, *out] and [N, C, *in], whose windows are the rows of x. u [G, O/G, K] and v [G, C/G * taps, K] are the
directions of each of G groups (G = 1 for a Linear layer), and results are [G, K], for each sample [N, G, K]. The
gradient of the whole weight is never formed; the Fisher diagonal of the singular values is the sum of squares over N.

Where the forward pass has left p, it takes the place of x, and v is None; so does q that of g, with u None.

float64 is summed in float64, every other dtype in float32. N and T may be 0. Differentiable any number of times with
respect to g, x, u and v, traceable, and usable under `torch.func`: grad_autograd.py. Several frames of one sample are
several samples here: their results are to be added before they are squared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastfip.ops.backends import cuda, native, triton
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import CHUNK, accumulation_dtype
from fastfip.ops.registry import Backend, Op
from fastfip.ops.spectral import grad_native as kernel
from fastfip.ops.spectral.grad_autograd import define, differentiable, project, result_size

__all__ = ["SPECTRAL_GRAD", "prefers_kernel", "reference", "spectral_grad", "spectral_sum_grad_squared"]


def reference(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    """Define the op: p and q of a few samples at a time, of a few positions where one sample is long."""
    size, acc = result_size(g, x, u, v, shape), accumulation_dtype(g.dtype)
    out = g.new_zeros(size, dtype=acc)
    n, t = size[0], math.prod(g.shape[2:] if shape else g.shape[1:2])
    if out.numel() == 0 or t == 0:
        return out
    step = max(1, CHUNK // (t * size[1] * size[2]))
    if shape is None and step == 1 and n == 1:
        step = max(1, CHUNK // size[2])
        for low in range(0, t, step):
            out[:, 0] += _summed(g[:, low : low + step], x[:, low : low + step], u, v, shape, acc)
        return out
    for low in range(0, n, step):
        part = slice(low, low + step)
        out[part] = _summed(g[part], x[part], u, v, shape, acc).view(-1, *size[1:])
    return out


def _summed(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None, acc: torch.dtype
) -> Tensor:
    """Return sum_t q p as [N, G * K]."""
    q = project(g.to(acc), u, shape, right=False)
    p = project(x.to(acc), v, shape, right=True)
    return (q * p).sum(1) if shape is None else torch.linalg.vecdot(q.flatten(2), p.flatten(2))


#: Positions from which on the kernel is the faster one: below, the directions are packed for too few of them.
FEW = 512


def kernel_is_faster(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> bool:
    """Return whether the native kernel was measured to be faster than two products of torch, with one thread.

    It was with AVX2 (it has not run on a CPU with AVX-512), float32, float64 and bfloat16, more than one direction; not
    with float16, which it reads one number at a time, and not with windows of several taps, which it copies and which
    torch's convolution does not (docs/kernels.md).
    """
    n, _, k = result_size(g, x, u, v, shape)
    positions = n * math.prod(g.shape[2:] if shape else g.shape[1:2])
    windows = shape is not None and v is not None and shape.taps > 1
    half = torch.float16 in (g.dtype, x.dtype)
    return positions >= FEW and k > 1 and not windows and not half and native.isa() == "avx2"


def _native(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    """The native kernel; where that is not the faster way, the reference."""
    faster = kernel_is_faster(g, x, u, v, shape)
    return kernel.spectral_grad(g, x, u, v, shape) if faster else reference(g, x, u, v, shape)


def _native_refuses(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> str:
    if u is None and v is None:
        return "there is nothing to be projected"
    return native.refuses(*(t for t in (g, x, u, v) if t is not None))


def _triton(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    from fastfip.ops.spectral.grad_triton import spectral_grad as run  # imports triton

    return run(g, x, u, v, shape)


def _triton_refuses(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> str:
    if u is None and v is None:
        return "there is nothing to be projected"
    return triton.refuses(*(t for t in (g, x, u, v) if t is not None))


def _cuda(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    from fastfip.ops.spectral.grad_cuda import spectral_grad as run

    return run(g, x, u, v, shape)


def _cuda_refuses(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> str:
    if u is None and v is None:
        return "there is nothing to be projected"
    return cuda.refuses(*(t for t in (g, x, u, v) if t is not None))


# triton, cuda: not chosen by themselves before their tests have passed on a GPU.
SPECTRAL_GRAD = Op(
    "spectral_grad",
    (
        Backend("native", _native, _native_refuses),
        Backend("triton", _triton, _triton_refuses, automatic=False),
        Backend("cuda", _cuda, _cuda_refuses, automatic=False),
        Backend("reference", reference),
    ),
)


def _run(backend: str, g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    return SPECTRAL_GRAD[backend].run(g, x, u, v, shape)


define(_run)


def prefers_kernel(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> bool:
    """Return whether the op runs a kernel of its own on these operands, and not torch's products."""
    operands = g, x, u, v, shape
    return SPECTRAL_GRAD.choose("auto", *operands).name == "native" and kernel_is_faster(*operands)


def spectral_grad(
    g: Tensor,  # [N, T, O] or [N, O, *out]; q where u is None
    x: Tensor,  # [N, T, I] or [N, C, *in]; p where v is None
    u: Tensor | None = None,  # [G, O/G, K]
    v: Tensor | None = None,  # [G, I, K] or [G, C/G * taps, K]
    shape: ConvShape | None = None,
    *,
    s: Tensor | None = None,  # [G, K]
    per_sample: bool = False,
    backend: str = "auto",
) -> Tensor:  # [G, K] or [N, G, K]
    """Return 1[s > 0] sum_{n,t} (g U)(x V), or with `per_sample` the same for every sample.

    Args:
        g: gradients at the output, any strides; float32, float64, bfloat16 or float16. With u None it is q, [N, T, K]
            or [N, G*K, *out].
        x: inputs of the layer; with v None it is p, in the shape of q.
        u: directions of the output; of any of these dtypes.
        v: directions of the input.
        shape: of a convolution; None for a Linear layer. Paddings are zeros.
        s: the present singular values; None: all directions count. It has no gradient.
        per_sample: whether samples are kept apart.
        backend: "auto", or the name of one.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.

    Source: Fast FIP (arXiv 2409.00863); docs/kernels.md says what it costs.
    """
    _check(g, x, u, v, shape)
    if shape is None and not per_sample and g.is_contiguous() and x.is_contiguous():
        g, x = g.flatten(0, 1).unsqueeze(0), x.flatten(0, 1).unsqueeze(0)  # all positions are one sample's
    each = _each(g, x, u, v, shape, s, backend)
    return each if per_sample else each.sum(0)


def spectral_sum_grad_squared(
    g: Tensor,
    x: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    shape: ConvShape | None = None,
    *,
    s: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # [G, K]
    """Return 1[s > 0] sum_n (sum_t (g U)(x V))^2, N times the Fisher diagonal of the singular values.

    Arguments, dtypes and errors are those of :func:`spectral_grad`; g is the gradient of each sample's own loss.
    """
    _check(g, x, u, v, shape)
    return _each(g, x, u, v, shape, s, backend).square().sum(0)


def _each(
    g: Tensor,
    x: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    shape: ConvShape | None,
    s: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = SPECTRAL_GRAD.choose(backend, g, x, u, v, shape).name
    each = differentiable(g, x, u, v, shape, chosen)
    if s is None:
        return each
    if s.shape != each.shape[1:]:
        raise ValueError(f"s must be {list(each.shape[1:])}, not {list(s.shape)}")
    return torch.where(s.detach() > 0, each, 0)


def _check(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> None:
    """Raise ValueError where the shapes do not fit."""
    dims = 3 if shape is None else 2 + len(shape.kernel)
    groups = 1 if shape is None else shape.groups
    features = 2 if shape is None else 1
    if g.dim() != dims or x.dim() != dims or g.shape[0] != x.shape[0]:
        raise ValueError(f"g {list(g.shape)} and x {list(x.shape)} must have {dims} axes and be of the same samples")
    k = (u if u is not None else v).shape[-1] if u is not None or v is not None else g.shape[features] // groups  # type: ignore[union-attr]
    taps = 1 if shape is None else shape.taps
    for name, t, factor, many in (("g", g, u, 1), ("x", x, v, taps)):
        want = (groups, t.shape[features] // groups * many, k)
        if t.shape[features] % groups or (factor is not None and tuple(factor.shape) != want):
            found = "None" if factor is None else list(factor.shape)
            raise ValueError(
                f"{name} {list(t.shape)} and its directions {found} do not fit: these must be {list(want)}"
            )
        if factor is None and t.shape[features] != groups * k:
            raise ValueError(f"{name} {list(t.shape)} has no directions, so it must have {groups * k} features")
    if shape is None:
        fits = g.shape[1] == x.shape[1]
    elif v is None:
        fits = g.shape[2:] == x.shape[2:]
    else:
        sizes = zip(g.shape[2:], x.shape[2:], shape.kernel, shape.stride, shape.padding, shape.dilation)
        fits = all(out == (size + 2 * p - d * (k - 1) - 1) // s + 1 for out, size, k, s, p, d in sizes)
    if not fits:
        raise ValueError(f"g {list(g.shape)} and x {list(x.shape)} do not have the same positions")
