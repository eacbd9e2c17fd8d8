"""Launchers of the native sum_grad_squared (csrc/cpu/sum_grad_squared.cpp); shapes are the caller's to check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.native_arguments import convolution_arguments, isa_argument, matrix_argument


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
