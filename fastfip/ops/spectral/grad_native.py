"""Launcher of the native spectral_grad (csrc/cpu/spectral_grad.cpp); shapes are the caller's to check."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.native_arguments import convolution_arguments, isa_argument, matrix_argument
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import accumulation_dtype

_NOTHING = (0, 0, (0, 0, 0))


def spectral_grad(
    g: Tensor,  # [N, T, O] or [N, O, *out]
    x: Tensor,  # [N, T, I] or [N, C, *in]
    u: Tensor | None,  # [G, O/G, K]; None: g is [N, T, K] or [N, G*K, *out]
    v: Tensor | None,  # [G, I, K]; None: x is the same
    shape: ConvShape | None,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:  # [N, G, K]
    """Return sum_t (g U)(x V) of every sample, float64 for float64 (and so are the sums), else float32.

    Any strides. Windows are read from a padded copy of a sample's map, a few positions at a time. `threads` None: as
    many as torch uses. `isa` None: the best instruction set of this CPU. One of u and v is given.
    """
    groups = 1 if shape is None else shape.groups
    factor = v if u is None else u
    assert factor is not None
    directions = factor.shape[2]
    each = torch.zeros(g.shape[0], groups, directions, dtype=accumulation_dtype(g.dtype))
    left, right = (_NOTHING if d is None else matrix_argument(d) for d in (u, v))
    last = (
        each.data_ptr(),
        each.dtype == torch.float64,
        torch.get_num_threads() if threads is None else threads,
        isa_argument(isa),
    )
    if shape is not None and v is not None and not shape.pointwise:
        padding = [(size, size) for size in shape.padding]
        options = shape.kernel, shape.stride, padding, shape.dilation, groups, "zeros", 1
        rows, windows = convolution_arguments(g, x, *options)
        run, sizes = native.module().spectral_grad_windows, (rows.shape[0], rows.shape[2] // groups, directions, groups)
        run(matrix_argument(rows), left, windows, right, *sizes, *last)
        return each
    if shape is not None:
        g, x = (t.flatten(2).transpose(1, 2) for t in (g, x))
    sizes = (*g.shape[:2], g.shape[2] // groups, x.shape[2] // groups, directions, groups)
    native.module().spectral_grad(matrix_argument(g), left, matrix_argument(x), right, *sizes, *last)
    return each
