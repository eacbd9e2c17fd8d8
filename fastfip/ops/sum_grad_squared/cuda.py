"""Launchers of the CUDA sum_grad_squared (csrc/cuda/sum_grad_squared.cu); shapes are the caller's to check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfip.errors import BackendError
from fastfip.ops.backends import native


class Call(NamedTuple):
    """One call as csrc/fastfip.h has it: maps are (address, strides of sample, frame, feature, z, y, x)."""

    g: tuple[int, list[int]]
    x: tuple[int, list[int]]
    sizes: list[int]  # samples, frames, outputs, channels, groups
    axes: list[list[int]]  # positions, kernel, step, dilation, padding, size; z, y, x each
    type: int
    exact: bool


def sum_grad_squared(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None = None) -> None:
    """Add the sum of squared per-sample gradients of g [N, T, O], a [N, T, I] to out [O, I], and their sum to grad."""
    if g.shape[0] == 0 or g.shape[1] == 0:
        return
    g, a = _same_type(g, a)
    _launch(dense(g, a), g, out, grad)


def sum_grad_squared_conv(
    g: Tensor,  # [N * F, O, *positions]
    x: Tensor,  # [N * F, C, *sizes]
    out: Tensor,  # [O, C / groups, *kernel], added to
    grad: Tensor | None,  # the same
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    *,
    frames: int = 1,  # F maps of one sample lie one after the other
) -> None:
    """Add the same for the weight of a convolution; the map is read through its windows, never unfolded."""
    if g.numel() == 0 or x.shape[1] == 0:
        return
    g, x = _same_type(g, x)
    # Neighbouring threads read neighbouring positions; of a channels-last map they would touch a sector each.
    g, x = (y if y.stride(-1) == 1 or y.shape[-1] == 1 else y.contiguous() for y in (g, x))
    call = convolution(g, x, list(out.shape[2:]), stride, padding, dilation, groups, frames)
    _launch(call, g, out, grad)


def dense(g: Tensor, a: Tensor) -> Call:
    """Describe the call for matrices g [N, T, O], a [N, T, I] of one dtype: one axis of T positions."""
    samples, positions, outputs = g.shape

    def matrix(y: Tensor) -> tuple[int, list[int]]:
        return y.data_ptr(), [y.stride(0), 0, y.stride(2), 0, 0, y.stride(1)]

    ones, along = [1, 1, 1], [1, 1, positions]
    axes = [along, ones, ones, ones, [0, 0, 0], along]
    sizes = [samples, 1, outputs, a.shape[2], 1]
    return Call(matrix(g), matrix(a), sizes, axes, native.TYPES[g.dtype], exact())


def convolution(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    frames: int,
) -> Call:
    """Describe the call for maps of one dtype; axes that a 1-d or 2-d convolution lacks have size 1."""
    fill = 3 - len(kernel)

    def strides(y: Tensor) -> list[int]:
        return [y.stride(0) * frames, y.stride(0), y.stride(1), *[0] * fill, *y.stride()[2:]]

    ones, zeros = [1] * fill, [0] * fill
    axes = [g.shape[2:], kernel, stride, dilation, padding, x.shape[2:]]
    filled = [(zeros if axis is padding else ones) + [int(size) for size in axis] for axis in axes]
    sizes = [g.shape[0] // frames, frames, g.shape[1], x.shape[1], groups]
    return Call((g.data_ptr(), strides(g)), (x.data_ptr(), strides(x)), sizes, filled, native.TYPES[g.dtype], exact())


def exact() -> bool:
    """Whether float32 products must be float32's (by three TF32 products), as torch.matmul's are by default."""
    return torch.get_float32_matmul_precision() == "highest"


def _same_type(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tensor cores multiply equal types: two different ones become the wider float."""
    if g.dtype != x.dtype:
        dtype = torch.float64 if torch.float64 in (g.dtype, x.dtype) else torch.float32
        g, x = g.to(dtype), x.to(dtype)
    return g, x


def _launch(call: Call, like: Tensor, out: Tensor, grad: Tensor | None) -> None:
    """Run it on torch's current stream of the tensors' device."""
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    results = [None if y is None else _Result(y, accumulated) for y in (out, grad)]
    module, device = native.module(), like.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    shares = module.cuda_sum_grad_squared_shares(call.sizes, call.axes, call.type, processors)
    many = shares * (1 + (grad is not None)) * math.prod(out.shape) if shares > 1 else 0
    room = torch.empty(many, dtype=accumulated, device=device)  # the allocator keeps it until this stream is past it
    addresses = [0 if r is None else r.buffer.data_ptr() for r in results]
    launch: list[Any] = [device.index, torch.cuda.current_stream(device).cuda_stream]
    try:
        module.cuda_sum_grad_squared(*call, *addresses, room.data_ptr() if many else 0, shares, *launch)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"backend cuda: {error}") from None
    for result in results:
        if result is not None:
            result.add()


class _Result:
    """A result as the kernel can write it; where it is not contiguous or of another dtype, a buffer added to it."""

    def __init__(self, result: Tensor, dtype: torch.dtype) -> None:
        self.result = result
        fits = result.is_contiguous() and result.dtype == dtype
        self.buffer = result if fits else torch.zeros(result.shape, dtype=dtype, device=result.device)

    def add(self) -> None:
        if self.buffer is not self.result:
            self.result.add_(self.buffer)
