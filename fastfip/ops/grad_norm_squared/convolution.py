"""The convolution form of `grad_norm_squared`: s[n] = || G_n ||_F^2 of the weight of a convolution.

Three ways, the cheapest by the number of products, counted with those of the backward:

    direct   G_n itself; the backward convolves each sample with its own G_n
    places   stride 1: the Gram matrices of g and of the map's places (`gram.Lattice`) instead of its windows, so that
             no product is made once for every tap of the kernel
    windows  the Gram matrices of g and of the windows

G_n, or the two matrices of the second way, are kept for the backward if that takes not much more memory than the maps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.backends import cuda, native
from fastfip.ops.convolution import ConvShape, columns, columns_transpose
from fastfip.ops.grad_norm_squared import native as kernel
from fastfip.ops.grad_norm_squared.gram import Lattice, gram
from fastfip.ops.memory import CHUNK, Scratch, accumulation_dtype
from fastfip.ops.registry import Backend, Op

_KEPT = 3  # numbers that may be kept for the backward, for each one of the maps
_MOVED = 100  # products in the time that the copies of one entry of a Gram matrix take


def _way(g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> str:
    """Return the way with the fewest products, forward and backward."""
    if samples == 0 or not g.numel() or not x.numel():
        return "windows"
    frames = g.shape[0] // samples
    t, o, c = g[0, 0].numel() * frames, g.shape[1] // shape.groups, x.shape[1] // shape.groups
    costs = {"direct": 3 * t * o * c * shape.taps, "windows": 3 * t * t * (o + c * shape.taps)}
    if frames == 1 and Lattice.serves(shape):
        places = Lattice(shape, tuple(x.shape[2:]), tuple(g.shape[2:])).places
        costs["places"] = 2 * places * places * (o + c + (0 if shape.taps == 1 else _MOVED))
    return min(costs, key=costs.__getitem__)


def _keeps(g: Tensor, x: Tensor, size: int, samples: int) -> bool:
    """Whether `size` numbers for each sample may be kept for the backward."""
    return samples > 0 and size * samples <= _KEPT * (g.numel() + x.numel())


class _Conv(torch.autograd.Function):
    """All three ways, the windows (or the matrices) of a few samples at a time; `by_kernel`: which code makes G_n.

    "native" does so in the backward as well, "cuda" for the norms alone, "" is torch.
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, shape: ConvShape, samples: int, keep: bool, by_kernel: str
    ) -> tuple[Tensor, Tensor]:
        way = _way(g, x, shape, samples)
        if way == "places":
            return _places_norms(g, x, shape, keep)
        frames, scratch, acc = g.shape[0] // max(1, samples), Scratch(), accumulation_dtype(g.dtype)
        o, i = g.shape[1] // shape.groups, x.shape[1] // shape.groups * shape.taps
        if way == "direct" and by_kernel == "cuda":
            return _cuda_norms(g, x, shape, frames), g.new_zeros(0, dtype=acc)
        keep = keep and way == "direct" and _keeps(g, x, g.shape[1] * i, samples)
        if way == "direct" and by_kernel == "native":
            product = g.new_empty((samples * shape.groups, o, i) if keep else 0, dtype=acc)
            return _native_norms(g, x, shape, frames, product if keep else None), product
        parts, kept = [], []
        step = _step(g, x, shape, samples, way)
        for k in range(0, samples, step):
            many = min(step, samples - k)
            left, cols = _chunk(g, x, shape, slice(k * frames, (k + many) * frames), many, scratch)
            if way == "windows":
                product = torch.linalg.vecdot(gram(left.mT).flatten(1), gram(cols.mT).flatten(1))
                parts.append(product.view(many, -1).sum(1))
                continue
            product = left @ cols.mT
            parts.append(product.view(many, -1).square().sum(1))
            if keep:
                kept.append(product)
        norms = torch.cat(parts) if parts else g.new_zeros(0, dtype=acc)
        return norms, torch.cat(kept) if kept else g.new_zeros(0, dtype=acc)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        g, x, ctx.shape, ctx.samples, _, ctx.by_kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(g, x, output[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        g, x, kept = ctx.saved_tensors
        shape, samples = ctx.shape, ctx.samples
        if torch.is_grad_enabled():
            return *_differentiable_gradients(g, x, v, shape, samples), None, None, None, None
        dg = torch.empty_like(g, dtype=v.dtype, memory_format=torch.contiguous_format)
        dx: Tensor | None = torch.empty_like(x, dtype=v.dtype) if ctx.needs_input_grad[1] else None
        way = _way(g, x, shape, samples)
        if way == "direct":
            _direct_gradients(g, x, shape, samples, v, kept, dg, dx, ctx.by_kernel)
        else:
            (_places_gradients if way == "places" else _windows_gradients)(g, x, shape, samples, v, kept, dg, dx)
        return dg.to(g.dtype), None if dx is None else dx.to(x.dtype), None, None, None, None


# ----------------------------------------------------------------------------------------------- operands as matrices


def _operands(g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> tuple[Tensor, Tensor]:
    """Return g as [N*groups, O/groups, F*T] and the windows of x as [N*groups, I, F*T]."""
    out_size, groups = tuple(g.shape[2:]), shape.groups
    cols = columns(x.to(accumulation_dtype(x.dtype)), shape, out_size)  # [N*F, groups, I, T]
    left = g.to(cols.dtype).reshape(g.shape[0], groups, g.shape[1] // groups, cols.shape[3])
    return _by_sample(left, samples), _by_sample(cols, samples)


def _by_sample(t: Tensor, samples: int) -> Tensor:
    """[N*F, groups, R, T] -> [N*groups, R, F*T]."""
    batch, groups, rows, size = t.shape
    frames = batch // max(1, samples)
    if frames == 1:
        return t.reshape(batch * groups, rows, size)
    return t.view(samples, frames, groups, rows, size).permute(0, 2, 3, 1, 4).reshape(-1, rows, frames * size)


def _frames_again(t: Tensor, frames: int, groups: int) -> Tensor:
    """The adjoint of `_by_sample`: [N*groups, R, F*T] -> [N*F, groups, R, T]."""
    rows = t.shape[1]
    if frames == 1:
        return t.view(-1, groups, rows, t.shape[2])
    return t.view(-1, groups, rows, frames, t.shape[2] // frames).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _step(g: Tensor, x: Tensor, shape: ConvShape, samples: int, way: str) -> int:
    """How many samples at a time."""
    if samples == 0:
        return 1
    frames = g.shape[0] // samples
    t, o, i = g[0, 0].numel() * frames, g.shape[1] // shape.groups, x.shape[1] // shape.groups * shape.taps
    each = shape.groups * (2 * i * t + (2 * t * t if way == "windows" else o * i))
    return max(1, min(samples, CHUNK // max(1, each)))


def _chunk(
    g: Tensor, x: Tensor, shape: ConvShape, part: slice, samples: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(g.dtype)
    out_size, groups = tuple(g.shape[2:]), shape.groups
    many, o, t = part.stop - part.start, g.shape[1] // groups, g[0, 0].numel()
    i = x.shape[1] // groups * shape.taps
    room = None if shape.pointwise else scratch.take((many, groups, i, t), g, acc)
    cols = columns(x[part].to(acc), shape, out_size, room)
    return _by_sample(g[part].to(acc).reshape(many, groups, o, t), samples), _by_sample(cols, samples)


# ------------------------------------------------------------------------------------------------------------ places


def _places_norms(g: Tensor, x: Tensor, shape: ConvShape, keep: bool) -> tuple[Tensor, Tensor]:
    lattice = Lattice(shape, tuple(x.shape[2:]), tuple(g.shape[2:]))
    samples, groups, acc = g.shape[0], shape.groups, accumulation_dtype(g.dtype)
    size = lattice.places**2 * groups
    keep = keep and _keeps(g, x, 2 * size, samples)
    kept = g.new_empty((2, samples * groups, lattice.places, lattice.places) if keep else 0, dtype=acc)
    norms, step = g.new_empty(samples, dtype=acc), max(1, CHUNK // (3 * size))
    for k in range(0, samples, step):
        one, two = _place_grams(g[k : k + step], x[k : k + step], lattice, groups)
        norms[k : k + step] = torch.linalg.vecdot(one.flatten(1), two.flatten(1)).view(-1, groups).sum(1)
        if keep:
            for to, matrix in zip(kept, (one, two)):
                to[k * groups : (k + step) * groups] = matrix
    return norms, kept


def _place_grams(g: Tensor, x: Tensor, lattice: Lattice, groups: int) -> tuple[Tensor, Tensor]:
    """The Gram matrices over positions of g and of the windows of x."""
    acc = accumulation_dtype(g.dtype)
    one = gram(lattice.of_output(g.to(acc), groups).mT)
    return one, lattice.windows(gram(lattice.of_input(x.to(acc), groups).mT))


def _places_gradients(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, v: Tensor, kept: Tensor, dg: Tensor, dx: Tensor | None
) -> None:
    lattice = Lattice(shape, tuple(x.shape[2:]), tuple(g.shape[2:]))
    groups, step = shape.groups, max(1, CHUNK // (3 * lattice.places**2 * shape.groups))
    for k in range(0, samples, step):
        part, mine = slice(k, k + step), slice(k * groups, (k + step) * groups)
        gn, xn, twice = g[part].to(v.dtype), x[part].to(v.dtype), 2 * v[part].repeat_interleave(groups)[:, None, None]
        one, two = (m[mine] for m in kept) if kept.numel() else _place_grams(gn, xn, lattice, groups)
        dg[part] = lattice.output(lattice.of_output(gn, groups) @ (two * twice), len(gn))
        if dx is not None:
            back = lattice.windows_transpose(one).mul_(twice) if shape.taps > 1 else one * twice
            dx[part] = lattice.input(lattice.of_input(xn, groups) @ back, len(xn))


# --------------------------------------------------------------------------------------------------- windows, direct


def _windows_gradients(
    g: Tensor, x: Tensor, shape: ConvShape, samples: int, v: Tensor, kept: Tensor, dg: Tensor, dx: Tensor | None
) -> None:
    frames, groups, scratch = g.shape[0] // max(1, samples), shape.groups, Scratch()
    step = _step(g, x, shape, samples, "windows")
    for k in range(0, samples, step):
        many = min(step, samples - k)
        part = slice(k * frames, (k + many) * frames)
        twice = 2 * v[k : k + many].repeat_interleave(groups)[:, None, None]
        left, cols = _chunk(g, x, shape, part, many, scratch)
        one = left @ gram(cols.mT).mul_(twice)
        dg[part] = _frames_again(one, frames, groups).reshape(dg[part].shape)
        if dx is not None:
            dcols = _frames_again(cols @ gram(left.mT).mul_(twice), frames, groups)
            dx[part] = columns_transpose(dcols, shape, tuple(x.shape[2:]), tuple(g.shape[2:]))


def _native_norms(g: Tensor, x: Tensor, shape: ConvShape, frames: int, product: Tensor | None) -> Tensor:
    padding = [(size, size) for size in shape.padding]
    options = shape.kernel, shape.stride, padding, shape.dilation, shape.groups
    return kernel.grad_norm_squared_conv(g, x, product, *options, frames=frames)


def _cuda_norms(g: Tensor, x: Tensor, shape: ConvShape, frames: int) -> Tensor:
    from fastfip.ops.grad_norm_squared.cuda import grad_norm_squared_conv as run

    return run(g, x, shape, frames)


def _direct_gradients(
    g: Tensor,
    x: Tensor,
    shape: ConvShape,
    samples: int,
    v: Tensor,
    kept: Tensor,
    dg: Tensor,
    dx: Tensor | None,
    by_kernel: str,
) -> None:
    frames, groups, scratch = g.shape[0] // samples, shape.groups, Scratch()
    step = _step(g, x, shape, samples, "direct")
    if kept.numel() and frames == 1 and _at_once(g, x, shape):  # one call, its groups are the samples
        step = samples
    for k in range(0, samples, step):
        many = min(step, samples - k)
        part = slice(k * frames, (k + many) * frames)
        if kept.numel():
            product = kept[k * groups : (k + many) * groups]
        elif by_kernel == "native":
            i = x.shape[1] // groups * shape.taps
            product = scratch.take((many * groups, g.shape[1] // groups, i), v, slot=1)
            _native_norms(g[part], x[part], shape, frames, product)
        else:
            left, cols = _chunk(g, x, shape, part, many, scratch)
            product = left @ cols.mT
        product = product * (2 * v[k : k + many].repeat_interleave(groups)[:, None, None])
        if shape.pointwise:
            left, cols = _chunk(g, x, shape, part, many, scratch)
            dg[part] = _frames_again(product @ cols, frames, groups).reshape(dg[part].shape)
            if dx is not None:
                dx[part] = _frames_again(product.mT @ left, frames, groups).reshape(dx[part].shape)
            continue
        _convolve_back(g[part], x[part], product, shape, dg[part], None if dx is None else dx[part])


def _at_once(g: Tensor, x: Tensor, shape: ConvShape) -> bool:
    """Whether all samples go into one grouped convolution: many small ones do better so, few large ones do not."""
    return g.is_cuda or (x.shape[1] >= 8 and g[0].numel() * (x.shape[1] // shape.groups) * shape.taps < 4e6)


def _convolve_back(g: Tensor, x: Tensor, product: Tensor, shape: ConvShape, dg: Tensor, dx: Tensor | None) -> None:
    """Fill dg with each x convolved with its sample's G_n, and dx with each g brought back through it."""
    weight = product.view(-1, g.shape[1], x.shape[1] // shape.groups, *shape.kernel)  # [N, O, C/groups, *kernel]
    samples = weight.shape[0]
    options = (shape.stride, shape.padding, shape.dilation, False, [0] * len(shape.kernel))
    aten = torch.ops.aten
    if g.shape[0] == samples > 1 and _at_once(g, x, shape):
        flat = [t.to(weight.dtype).reshape(1, -1, *t.shape[2:]) for t in (g, x)]
        many = weight.flatten(0, 1)
        dg.copy_(aten.convolution(flat[1], many, None, *options, samples * shape.groups).view(dg.shape))
        if dx is not None:
            back = aten.convolution_backward(*flat, many, None, *options, samples * shape.groups, [True, False, False])
            dx.copy_(back[0].view(dx.shape))
        return
    for gn, xn, w, dgn, dxn in zip(
        g.chunk(samples),
        x.chunk(samples),
        weight,
        dg.chunk(samples),
        [None] * samples if dx is None else dx.chunk(samples),
    ):
        gn, xn = gn.to(w.dtype), xn.to(w.dtype)
        dgn.copy_(aten.convolution(xn, w, None, *options, shape.groups))
        if dxn is not None:
            dxn.copy_(aten.convolution_backward(gn, xn, w, None, *options, shape.groups, [True, False, False])[0])


def _differentiable_gradients(g: Tensor, x: Tensor, v: Tensor, shape: ConvShape, samples: int) -> tuple[Tensor, Tensor]:
    frames, groups, out_size = g.shape[0] // max(1, samples), shape.groups, tuple(g.shape[2:])
    left, right = _operands(g, x, shape, samples)
    product = 2 * v.repeat_interleave(groups)[:, None, None] * (left @ right.mT)
    dg = _frames_again(product @ right, frames, groups).reshape(g.shape)
    dcols = _frames_again(product.mT @ left, frames, groups)
    return dg.to(g.dtype), columns_transpose(dcols, shape, tuple(x.shape[2:]), out_size).to(x.dtype)


def _norms(g: Tensor, x: Tensor, shape: ConvShape, samples: int, by_kernel: str = "") -> Tensor:
    again = torch.is_grad_enabled() and (g.requires_grad or x.requires_grad)
    return _Conv.apply(g, x, shape, samples, again, by_kernel)[0]


def _native_refuses(g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> str:
    if len(shape.kernel) == 3 and samples and g.shape[0] != samples:
        return "it has no axis left for the frames of a 3-d convolution"
    return native.refuses(g, x)


def _cuda_refuses(g: Tensor, x: Tensor, shape: ConvShape, samples: int) -> str:
    return cuda.refuses(g, x)


# cuda: not chosen by itself before its tests have passed on a GPU.
GRAD_NORM_SQUARED_CONV = Op(
    "grad_norm_squared_conv",
    (
        Backend("native", partial(_norms, by_kernel="native"), _native_refuses),
        Backend("cuda", partial(_norms, by_kernel="cuda"), _cuda_refuses, automatic=False),
        Backend("reference", _norms),
    ),
)


def grad_norm_squared_conv(
    g: Tensor,  # [N*F, O, *out]
    x: Tensor,  # [N*F, C, *in]
    shape: ConvShape,
    *,
    samples: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [N]
    """Return :func:`grad_norm_squared` for the weight of a convolution of x whose output has the gradient g.

    `samples` is N where several frames F of one sample lie one after the other in the batch; None: F = 1.
    For a transposed convolution exchange the roles: `g` its input, `x` the gradient at its output.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.
    """
    samples = g.shape[0] if samples is None else samples
    if g.dim() != x.dim() or g.shape[0] != x.shape[0] or (samples and g.shape[0] % samples):
        raise ValueError(f"g {list(g.shape)} and x {list(x.shape)} are no maps of {samples} samples")
    return GRAD_NORM_SQUARED_CONV.choose(backend, g, x, shape, samples).run(g, x, shape, samples)
