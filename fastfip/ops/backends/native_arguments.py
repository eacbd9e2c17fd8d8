"""Tensors and options as the functions of `fastfip._native` take them: addresses, numbers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastfip.errors import BackendError
from fastfip.ops.backends import native


def matrix_argument(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What the module takes for x [N, T, F]."""
    return x.data_ptr(), native.TYPES[x.dtype], x.stride()


def isa_argument(name: str | None) -> int:
    """Number of an instruction set; None: the best one of this CPU, or that of FASTFIP_ISA."""
    module = native.module()
    wanted = module.Isa.__members__.get(native.isa() if name is None else name)
    if wanted is None:
        raise BackendError(f"no instruction set {name!r}: use one of {', '.join(module.Isa.__members__)}")
    if int(wanted) > int(module.best_isa()):
        raise BackendError(f"this CPU lacks {name}: it has {module.best_isa().name}")
    return int(wanted)


def convolution_arguments(
    g: Tensor,  # [N * F, O, *positions]
    x: Tensor,  # [N * F, C, *sizes]
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    mode: str,
    frames: int,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return g as [N, positions, O], a view where memory allows it, and what the module takes for the windows of x."""
    source = [sources(size, before, after, mode) for size, (before, after) in zip(x.shape[2:], padding)]
    ones = [1] * (3 - len(kernel))
    if frames > 1:  # one more axis: positions of the output, and no part of the window
        g, x = (y.unflatten(0, (-1, frames)).transpose(1, 2) for y in (g, x))
        ones = ones[1:]
        kernel, stride, dilation, source = [1, *kernel], [1, *stride], [1, *dilation], [list(range(frames)), *source]
    fill = [0] * len(ones)
    windows = (
        x.data_ptr(),
        native.TYPES[x.dtype],
        [*x.stride()[:2], *fill, *x.stride()[2:]],
        x.shape[1] // groups,
        [[0]] * len(ones) + source,
        ones + list(kernel),
        ones + list(stride),
        ones + list(dilation),
        ones + list(g.shape[2:]),
    )
    return g.flatten(2).transpose(1, 2), windows


def sources(size: int, before: int, after: int, mode: str) -> list[int]:
    """For each index of a padded axis the index it is copied from, -1 for a zero."""
    indices = range(-before, size + after)
    if mode == "zeros":
        return [i if 0 <= i < size else -1 for i in indices]
    if mode == "circular":
        return [i % size for i in indices]
    if mode == "replicate":
        return [min(max(i, 0), size - 1) for i in indices]
    if mode == "reflect":
        return [min(abs(i), 2 * (size - 1) - abs(i)) for i in indices]
    raise BackendError(f"no padding_mode {mode!r}: use zeros, reflect, replicate or circular")
