"""Launchers of the native sum_grad_squared (csrc/cpu/sum_grad_squared.cpp); shapes are the caller's to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.errors import BackendError
from fastfip.ops.backends import native

# csrc/fastfip.h, enum Type
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def refuses(*tensors: Tensor, bf16: bool = False) -> str:
    """Why these tensors cannot be given to the kernels, or ""."""
    if bf16:
        if any(x.dtype == torch.float64 for x in tensors):
            return "bfloat16 products are not for float64"
        if native.available() and not native.has_bf16():
            return f"bfloat16 products need AVX512_BF16, this CPU has {native.isa()}"
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on the CPU, not on {x.device.type}"
        if x.dtype not in TYPES:
            return f"it has no {x.dtype}"
    return native.reason()


def sum_grad_squared(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    out: Tensor,  # [O, I], added to
    grad: Tensor | None = None,  # [O, I], added to
    *,
    bf16: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Add the sum of squared per-sample gradients to out, and the gradient to grad.

    Any strides; out and grad are float64 (and so are the sums) or float32. `threads` None: as many as torch uses.
    `isa` None: the best instruction set of this CPU. `bf16`: operands are rounded to bfloat16, sums stay float32.
    """
    samples, positions, outputs = g.shape
    with _Results(out, grad) as (out_address, grad_address):
        native.module().sum_grad_squared(
            matrix_argument(g),
            matrix_argument(a),
            samples,
            positions,
            outputs,
            a.shape[2],
            out_address,
            grad_address,
            out.dtype == torch.float64,
            bf16,
            torch.get_num_threads() if threads is None else threads,
            isa_argument(isa),
        )


def sum_grad_squared_conv(
    g: Tensor,  # [N * F, O, *positions]
    x: Tensor,  # [N * F, C, *sizes]
    out: Tensor,  # [O, C / groups, *kernel], added to
    grad: Tensor | None,  # the same
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],  # before and after each axis
    dilation: Sequence[int],
    groups: int = 1,
    mode: str = "zeros",  # any padding_mode of torch.nn.Conv2d
    *,
    frames: int = 1,  # F maps of one sample lie one after the other; 1- and 2-d only
    bf16: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Add the same for the weight of a convolution, read through its windows: the unfolded map is never stored."""
    positions, windows = convolution_arguments(g, x, out.shape[2:], stride, padding, dilation, groups, mode, frames)
    with _Results(out, grad) as (out_address, grad_address):
        native.module().sum_grad_squared_windows(
            matrix_argument(positions),
            windows,
            positions.shape[0],
            positions.shape[2],
            groups,
            out_address,
            grad_address,
            out.dtype == torch.float64,
            bf16,
            torch.get_num_threads() if threads is None else threads,
            isa_argument(isa),
        )


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
        TYPES[x.dtype],
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


class _Results:
    """Addresses of out and grad; where one is not contiguous, of a buffer that is added to it at the end."""

    def __init__(self, *results: Tensor | None) -> None:
        self.results = results
        self.buffers = [
            y if y is None or y.is_contiguous() else torch.zeros_like(y, memory_format=torch.contiguous_format)
            for y in results
        ]

    def __enter__(self) -> list[int]:
        return [0 if buffer is None else buffer.data_ptr() for buffer in self.buffers]

    def __exit__(self, error: object, *_: object) -> None:
        for result, buffer in zip(self.results, self.buffers):
            if error is None and result is not None and buffer is not None and buffer is not result:
                result.add_(buffer)


def matrix_argument(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What the module takes for x [N, T, F]."""
    return x.data_ptr(), TYPES[x.dtype], x.stride()


def isa_argument(name: str | None) -> int:
    """Number of an instruction set; None: the best one of this CPU."""
    module = native.module()
    if name is None:
        return int(module.best_isa())
    wanted = module.Isa.__members__.get(name)
    if wanted is None:
        raise BackendError(f"no instruction set {name!r}: use one of {', '.join(module.Isa.__members__)}")
    if int(wanted) > int(module.best_isa()):
        raise BackendError(f"this CPU lacks {name}: it has {native.isa()}")
    return int(wanted)
