"""Launchers of the native sum_grad_squared (csrc/cpu/sum_grad_squared.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfip.errors import BackendError
from fastfip.kernels import native

# csrc/fastfip.h, enum Type
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _isa(name: str | None) -> int:
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


def _matrix(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return x.data_ptr(), TYPES[x.dtype], x.stride()


def sum_grad_squared(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    out: Tensor,  # [O, I], added to
    grad: Tensor | None = None,  # [O, I], added to
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Add the sum of squared per-sample gradients to out, and the gradient to grad.

    CPU tensors of any strides; out and grad contiguous, float64 if g is, else float32.
    """
    samples, positions, outputs = g.shape
    native.module().sum_grad_squared(
        _matrix(g),
        _matrix(a),
        samples,
        positions,
        outputs,
        a.shape[2],
        out.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        out.dtype == torch.float64,
        torch.get_num_threads() if threads is None else threads,
        _isa(isa),
    )


def sources(size: int, before: int, after: int, mode: str) -> list[int]:
    """For each index of a padded axis the index it is copied from, -1 for a zero. Negative padding crops."""
    indices = range(-before, size + after)
    if mode == "zeros":
        return [i if 0 <= i < size else -1 for i in indices]
    if mode == "circular":
        return [i % size for i in indices]
    if mode == "replicate":
        return [min(max(i, 0), size - 1) for i in indices]
    return [i if 0 <= i < size else (-i if i < 0 else 2 * (size - 1) - i) for i in indices]  # reflect


def sum_grad_squared_conv(
    g: Tensor,  # [N, O, *positions]
    x: Tensor,  # [N, C, *sizes]
    out: Tensor,  # [O, C / groups, *kernel], added to
    grad: Tensor | None,  # the same
    stride: Sequence[int],
    padding: Sequence[int],  # before and after each axis: 2 D numbers
    dilation: Sequence[int],
    groups: int,
    mode: str,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Add the same for the weight of a convolution, read through its windows: the unfolded map is never stored."""
    dims = x.dim() - 2
    fill = 3 - dims
    kernel = out.shape[2:]
    samples, outputs = g.shape[:2]
    # Positions on one axis: a view wherever memory allows it, as for contiguous and channels-last gradients.
    positions = g.flatten(2).transpose(1, 2)
    source = [[0]] * fill + [
        sources(size, before, after, mode) for size, before, after in zip(x.shape[2:], padding[::2], padding[1::2])
    ]
    ones = [1] * fill
    native.module().sum_grad_squared_windows(
        _matrix(positions),
        x.data_ptr(),
        TYPES[x.dtype],
        [*x.stride()[:2], *[0] * fill, *x.stride()[2:]],
        x.shape[1] // groups,
        source,
        ones + list(kernel),
        ones + list(stride),
        ones + list(dilation),
        ones + list(g.shape[2:]),
        samples,
        outputs,
        groups,
        out.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        out.dtype == torch.float64,
        torch.get_num_threads() if threads is None else threads,
        _isa(isa),
    )
