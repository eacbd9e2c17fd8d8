"""Launchers of the native grad_norm_squared (csrc/cpu/grad_norm_squared.cpp); shapes are the caller's to check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.native_arguments import convolution_arguments, isa_argument, matrix_argument


def grad_norm_squared(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    product: Tensor | None = None,  # [N, O, I], contiguous; set to each sample's gradient
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:  # [N]
    """Return the squared norm of each sample's gradient, float64 for float64 (and so are the sums), else float32.

    Any strides. `threads` None: as many as torch uses. `isa` None: the best instruction set of this CPU.
    """
    samples, positions, outputs = g.shape
    norms = torch.zeros(samples, dtype=torch.float64)
    is_double = g.dtype == torch.float64
    native.module().grad_norm_squared(
        matrix_argument(g),
        matrix_argument(a),
        samples,
        positions,
        outputs,
        a.shape[2],
        norms.data_ptr(),
        _address(product),
        is_double,
        torch.get_num_threads() if threads is None else threads,
        isa_argument(isa),
    )
    return norms if is_double else norms.float()


def grad_norm_squared_conv(
    g: Tensor,  # [N * F, O, *positions]
    x: Tensor,  # [N * F, C, *sizes]
    product: Tensor | None,  # [N, O, C / groups, *kernel], contiguous; set to each sample's gradient
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],  # before and after each axis
    dilation: Sequence[int],
    groups: int = 1,
    mode: str = "zeros",  # any padding_mode of torch.nn.Conv2d
    *,
    frames: int = 1,  # F maps of one sample lie one after the other; 1- and 2-d only
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:  # [N]
    """Return the same for the weight of a convolution, read through its windows: the unfolded map is never stored."""
    positions, windows = convolution_arguments(g, x, kernel, stride, padding, dilation, groups, mode, frames)
    norms = torch.zeros(positions.shape[0], dtype=torch.float64)
    is_double = g.dtype == torch.float64
    native.module().grad_norm_squared_windows(
        matrix_argument(positions),
        windows,
        positions.shape[0],
        positions.shape[2],
        groups,
        norms.data_ptr(),
        _address(product),
        is_double,
        torch.get_num_threads() if threads is None else threads,
        isa_argument(isa),
    )
    return norms if is_double else norms.float()


def _address(product: Tensor | None) -> int:
    assert product is None or product.is_contiguous()
    return 0 if product is None else product.data_ptr()
