"""Tensors as the CUDA kernels of `fastfip._native` take them: addresses, sizes and strides, and where they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfip.errors import BackendError
from fastfip.ops.backends import native

#: What a kernel takes for lines of numbers: address, strides of sample, group and line.
LinesArgument = tuple[int, list[int]]


class Call(NamedTuple):
    """One call as csrc/fastfip.h has it: maps are (address, strides of sample, frame, feature, z, y, x)."""

    g: tuple[int, list[int]]
    x: tuple[int, list[int]]
    sizes: list[int]  # samples, frames, outputs, channels, groups
    axes: list[list[int]]  # positions, kernel, step, dilation, padding, size; z, y, x each
    type: int
    exact: bool


def dense(g: Tensor, a: Tensor, groups: int = 1) -> Call:
    """Describe the call for matrices g [N, T, O], a [N, T, I] of one dtype: one axis of T positions.

    Features of `groups` groups lie one after the other.
    """
    samples, positions, outputs = g.shape

    def matrix(y: Tensor) -> tuple[int, list[int]]:
        # One sample may have any stride to a next one, which would count as a line that is not aligned.
        sample = y.stride(0) if samples > 1 else 0
        return y.data_ptr(), [sample, 0, y.stride(2), 0, 0, y.stride(1)]

    ones, along = [1, 1, 1], [1, 1, positions]
    axes = [along, ones, ones, ones, [0, 0, 0], along]
    sizes = [samples, 1, outputs, a.shape[2], groups]
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


def same_type(*tensors: Tensor) -> list[Tensor]:
    """Tensor cores multiply equal types: different ones become the wider float."""
    if len({x.dtype for x in tensors}) == 1:
        return list(tensors)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def neighbouring(x: Tensor) -> Tensor:
    """Return a map whose neighbouring positions are neighbours in memory.

    Neighbouring threads read neighbouring positions; of a channels-last map they would touch a sector each.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned_lines(x: Tensor) -> Tensor:
    """Return x [A, B, F] with its last axis dense and every line at a multiple of 16 bytes: itself, or a copy."""
    each = 16 // x.element_size()
    outer = [stride for stride, size in zip(x.stride()[:2], x.shape) if size > 1]
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(stride % each == 0 for stride in outer):
        return x
    wide = x.new_empty(*x.shape[:2], -(-x.shape[2] // each) * each)
    return wide[..., : x.shape[2]].copy_(x)


def group_lines(x: Tensor | None) -> LinesArgument:
    """What a kernel takes for directions [G, F, K] of aligned lines, the same for every sample; None: none."""
    if x is None:
        return 0, [0, 0, 0]
    group, line = (x.stride(axis) if x.shape[axis] > 1 else 0 for axis in (0, 1))
    return x.data_ptr(), [0, group, line]


def sample_lines(x: Tensor) -> LinesArgument:
    """What a kernel takes for a matrix [N, T, F] of aligned lines for each sample."""
    sample, line = (x.stride(axis) if x.shape[axis] > 1 else 0 for axis in (0, 1))
    return x.data_ptr(), [sample, 0, line]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(function: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Run it on torch's current stream of that device."""
    try:
        function(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"backend cuda: {error}") from None
