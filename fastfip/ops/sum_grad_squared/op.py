"""Op `sum_grad_squared`: the sum over samples of squared per-sample weight gradients (the Fisher diagonal, times N).

    out[o, i] = sum_n (sum_t g[n, t, o] a[n, t, i])^2          grad[o, i] = sum_n sum_t g[n, t, o] a[n, t, i]

g [N, T, O] is the gradient of each sample's own loss at the output of a linear map, a [N, T, I] its input. All sizes
may be 1; N and T may be 0. float64 is summed in float64, every other dtype in float32. The convolution form takes
feature maps and never needs more of the windows than a few samples at a time.

`out` and `grad`, where given, are added to: a pass over a data set accumulates in place, in one buffer for each, and is
no part of an autograd graph. Without them the op is differentiable and can be traced and transformed (`torch.compile`,
`torch.func`): autograd.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastfip.ops.backends import cuda, native, triton
from fastfip.ops.convolution import ConvShape, columns
from fastfip.ops.memory import CHUNK, Scratch, accumulation_dtype
from fastfip.ops.registry import Backend, Op
from fastfip.ops.sum_grad_squared import native as kernel
from fastfip.ops.sum_grad_squared.autograd import define, differentiable


def reference(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None, scratch: Scratch) -> None:
    """Define the op: the product of a few samples at a time, its square added to `out` and itself to `grad`."""
    n, t, o = g.shape
    i = a.shape[2]
    acc = out.dtype
    if n == 0 or t == 0:
        return
    if t == 1:
        g1, a1 = g[:, 0].to(acc), a[:, 0].to(acc)
        g2, a2 = (torch.square(x, out=scratch.take(tuple(x.shape), out, slot=k)) for k, x in enumerate((g1, a1)))
        out.addmm_(g2.t(), a2)
        if grad is not None:
            grad.addmm_(g1.t(), a1)
        return
    step = max(1, min(n, CHUNK // max(1, o * i)))
    for low in range(0, n, step):
        part = slice(low, min(n, low + step))
        product = scratch.take((part.stop - low, o, i), out)
        product = torch_bmm(g[part].to(acc).transpose(1, 2), a[part].to(acc), product)
        _accumulate(product, out, grad)


def reference_conv(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None, scratch: Scratch
) -> None:
    """Define the convolution form, on the windows of a few samples at a time."""
    batch, o = g.shape[:2]
    if batch == 0 or g.numel() == 0:
        return
    frames, out_size, acc = batch // samples, tuple(g.shape[2:]), out.dtype
    groups, t = shape.groups, g[0, 0].numel()
    i = x.shape[1] // groups * shape.taps
    flat_out, flat_grad = (None if b is None else b.view(groups, o // groups, i) for b in (out, grad))
    assert flat_out is not None
    copied = 0 if shape.pointwise else groups * i * t
    step = max(1, min(samples, CHUNK // (frames * (copied + o * i))))
    for low in range(0, samples, step):
        many = (min(samples, low + step) - low) * frames
        part = slice(low * frames, low * frames + many)
        room = scratch.take((many, groups, i, t), out, slot=1) if copied else None
        cols = columns(x[part].to(acc), shape, out_size, room)
        product = scratch.take((many * groups, o // groups, i), out)
        left = g[part].to(acc).reshape(many * groups, o // groups, t)
        product = torch_bmm(left, cols.reshape(many * groups, i, t).transpose(1, 2), product)
        product = product.view(many, groups, o // groups, i)
        if frames > 1:
            product = product.view(-1, frames, groups, o // groups, i).sum(1)
        _accumulate(product, flat_out, flat_grad)


def torch_bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Batched product into `out`; a single product goes to the plain routine, which is the faster one."""
    if left.shape[0] == 1:
        torch.mm(left[0], right[0], out=out[0])
        return out
    return torch.bmm(left, right, out=out)


def _accumulate(product: Tensor, out: Tensor, grad: Tensor | None) -> None:
    """Add the squares of per-sample gradients to `out` and the gradients themselves to `grad`; `product` is spent."""
    if out.numel() >= 4096:  # one pass each, nothing new in memory
        for one in product:
            out.addcmul_(one, one)
            if grad is not None:
                grad.add_(one)
        return
    if grad is not None:
        grad.add_(product.sum(0))
    out.add_(product.square_().sum(0))


def _native(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None, scratch: Scratch, bf16: bool = False) -> None:
    if g.shape[1] == 1:  # a product of squares, which torch's own product does best
        return reference(g, a, out, grad, scratch)
    kernel.sum_grad_squared(g, a, out, grad, bf16=bf16)


def _native_refuses(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None, bf16: bool = False) -> str:
    return native.refuses(g, a, out, bf16=bf16)


def _native_conv(
    g: Tensor,
    x: Tensor,
    shape: ConvShape,
    samples: int,
    out: Tensor,
    grad: Tensor | None,
    scratch: Scratch,
    bf16: bool = False,
) -> None:
    if g.numel() == 0:
        return
    padding = [(size, size) for size in shape.padding]
    convolution = shape.stride, padding, shape.dilation, shape.groups
    kernel.sum_grad_squared_conv(g, x, out, grad, *convolution, frames=g.shape[0] // samples, bf16=bf16)


def _native_conv_refuses(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None, bf16: bool = False
) -> str:
    if len(shape.kernel) == 3 and samples and g.shape[0] != samples:
        return "it has no axis left for the frames of a 3-d convolution"
    return native.refuses(g, x, out, bf16=bf16)


def _triton(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None, scratch: Scratch) -> None:
    if g.shape[1] == 1:
        return reference(g, a, out, grad, scratch)
    from fastfip.ops.sum_grad_squared.triton import sum_grad_squared as run  # imports triton

    run(g, a, out, grad)


def _triton_conv(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None, scratch: Scratch
) -> None:
    from fastfip.ops.sum_grad_squared.triton import sum_grad_squared_conv as run

    run(g, x, out, grad, shape.stride, shape.padding, shape.dilation, shape.groups)


def _triton_conv_refuses(g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None) -> str:
    if samples and g.shape[0] != samples:
        return "it has no form for several frames of one sample"
    return triton.refuses(g, x, out)


def _cuda(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None, scratch: Scratch) -> None:
    if g.shape[1] == 1:
        return reference(g, a, out, grad, scratch)
    from fastfip.ops.sum_grad_squared.cuda import sum_grad_squared as run

    run(g, a, out, grad)


def _cuda_conv(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None, scratch: Scratch
) -> None:
    from fastfip.ops.sum_grad_squared.cuda import sum_grad_squared_conv as run

    frames = g.shape[0] // max(1, samples)
    run(g, x, out, grad, shape.stride, shape.padding, shape.dilation, shape.groups, frames=frames)


def _cuda_conv_refuses(g: Tensor, x: Tensor, shape: ConvShape, samples: int, out: Tensor, grad: Tensor | None) -> str:
    return cuda.refuses(g, x, out)


# native_bf16: operands rounded to bfloat16, products summed and squared in float32; up to twice as fast on CPUs with
# AVX512_BF16, for an error of 2e-3 to 3e-3 (benchmarks/results/sum_grad_squared.csv). Runs only when it is asked for.
# triton, cuda: not chosen by themselves before their tests have passed on a GPU, which none of them has met so far.
SUM_GRAD_SQUARED = Op(
    "sum_grad_squared",
    (
        Backend("native", _native, _native_refuses),
        Backend("native_bf16", partial(_native, bf16=True), partial(_native_refuses, bf16=True), automatic=False),
        Backend("triton", _triton, lambda g, a, out, grad: triton.refuses(g, a, out), automatic=False),
        Backend("cuda", _cuda, lambda g, a, out, grad: cuda.refuses(g, a, out), automatic=False),
        Backend("reference", reference),
    ),
)
SUM_GRAD_SQUARED_CONV = Op(
    "sum_grad_squared_conv",
    (
        Backend("native", _native_conv, _native_conv_refuses),
        Backend(
            "native_bf16", partial(_native_conv, bf16=True), partial(_native_conv_refuses, bf16=True), automatic=False
        ),
        Backend("triton", _triton_conv, _triton_conv_refuses, automatic=False),
        Backend("cuda", _cuda_conv, _cuda_conv_refuses, automatic=False),
        Backend("reference", reference_conv),
    ),
)


def _run(backend: str, g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None) -> None:
    SUM_GRAD_SQUARED[backend].run(g, a, out, grad, Scratch())


define(_run)


def sum_grad_squared_and_grad(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return out[o, i] of :func:`sum_grad_squared` and, from the same products, sum_n sum_t g[n, t, o] a[n, t, i].

    Differentiable any number of times.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.
    """
    _check(g, a)
    return differentiable(g, a, True, SUM_GRAD_SQUARED.choose(backend, g, a, g, None).name)


def sum_grad_squared(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    *,
    out: Tensor | None = None,  # [O, I], added to
    grad: Tensor | None = None,  # [O, I], added to
    backend: str = "auto",
    scratch: Scratch | None = None,
) -> Tensor:
    """Return out[o, i] = sum_n (sum_t g[n, t, o] a[n, t, i])^2, float64 for float64 and float32 otherwise.

    Args:
        g: gradients at the output, [N, T, O], any strides, float32, float64, bfloat16 or float16.
        a: inputs, [N, T, I].
        out: [O, I] of the accumulation dtype to add to (and return); None: zeros.
        grad: [O, I] to add sum_n sum_t g a to, from the same products; None: not computed.
        backend: "auto", or the name of one.
        scratch: memory to use again between calls.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.

    Source: the definition of the empirical Fisher's diagonal; docs/kernels.md for how the kernels compute it.
    """
    _check(g, a)
    if out is None and grad is None and scratch is None:
        return differentiable(g, a, False, SUM_GRAD_SQUARED.choose(backend, g, a, g, None).name)[0]
    g, a = g.detach(), a.detach()
    out = _target(out, (g.shape[2], a.shape[2]), g)
    _check_grad(grad, out)
    chosen = SUM_GRAD_SQUARED.choose(backend, g, a, out, grad)
    chosen.run(g, a, out, grad, scratch or Scratch())
    return out


def sum_grad_squared_conv(
    g: Tensor,  # [N*F, O, *out]
    x: Tensor,  # [N*F, C, *in]
    shape: ConvShape,
    *,
    samples: int | None = None,
    out: Tensor | None = None,  # [O, C/groups, *kernel], added to
    grad: Tensor | None = None,
    backend: str = "auto",
    scratch: Scratch | None = None,
) -> Tensor:
    """Return the same for the weight [O, C/groups, *kernel] of a convolution of x whose output has the gradient g.

    `samples` is N where several frames F of one sample lie one after the other in the batch; None: F = 1.
    For a transposed convolution exchange the roles: `g` its input, `x` the gradient at its output.

    Differentiable any number of times if neither `out` nor `grad` is given; then, and only then, the windows of all
    samples are stored.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.
    """
    samples = g.shape[0] if samples is None else samples
    if g.dim() != x.dim() or g.shape[0] != x.shape[0] or (samples and g.shape[0] % samples):
        raise ValueError(f"g {list(g.shape)} and x {list(x.shape)} are no maps of {samples} samples")
    if x.shape[1] % shape.groups or g.shape[1] % shape.groups:
        raise ValueError(f"{x.shape[1]} and {g.shape[1]} channels cannot be {shape.groups} groups")
    if out is None and grad is None and torch.is_grad_enabled() and (g.requires_grad or x.requires_grad):
        return _differentiable_conv(g, x, shape, samples, backend)
    g, x = g.detach(), x.detach()
    out = _target(out, (g.shape[1], x.shape[1] // shape.groups, *shape.kernel), g)
    _check_grad(grad, out)
    chosen = SUM_GRAD_SQUARED_CONV.choose(backend, g, x, shape, samples, out, grad)
    chosen.run(g, x, shape, samples, out, grad, scratch or Scratch())
    return out


def _differentiable_conv(g: Tensor, x: Tensor, shape: ConvShape, samples: int, backend: str) -> Tensor:
    cols = columns(x, shape, tuple(g.shape[2:]))  # [N*F, groups, I, T]
    left = g.reshape(g.shape[0], shape.groups, g.shape[1] // shape.groups, cols.shape[3])
    frames = g.shape[0] // max(1, samples)
    chosen = SUM_GRAD_SQUARED.choose(backend, g, x, g, None).name
    left, cols = (y.unflatten(0, (samples, frames)).permute(2, 0, 1, 4, 3).flatten(2, 3) for y in (left, cols))
    each = [differentiable(g1, a1, False, chosen)[0] for g1, a1 in zip(left, cols)]  # [N, F*T, O/groups], [N, F*T, I]
    return torch.cat(each).view(g.shape[1], x.shape[1] // shape.groups, *shape.kernel)


def _check(g: Tensor, a: Tensor) -> None:
    if g.dim() != 3 or a.dim() != 3 or g.shape[:2] != a.shape[:2]:
        raise ValueError(f"sum_grad_squared needs g [N, T, O] and a [N, T, I], not {list(g.shape)} and {list(a.shape)}")


def _target(out: Tensor | None, size: tuple[int, ...], like: Tensor) -> Tensor:
    acc = accumulation_dtype(like.dtype)
    if out is None:
        return like.new_zeros(size, dtype=acc)
    if tuple(out.shape) != size or out.dtype != acc:
        raise ValueError(f"out must be {list(size)} {acc}, not {list(out.shape)} {out.dtype}")
    return out


def _check_grad(grad: Tensor | None, out: Tensor) -> None:
    if grad is not None and (grad.shape != out.shape or grad.dtype != out.dtype):
        raise ValueError(f"grad must be {list(out.shape)} {out.dtype} like out, not {list(grad.shape)} {grad.dtype}")
