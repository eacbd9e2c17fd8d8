"""Launchers of the CUDA sum_grad_squared (csrc/cuda/sum_grad_squared.cu); shapes are the caller's to check."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.cuda_operands import (
    Call,
    convolution,
    dense,
    launch,
    multiprocessors,
    neighbouring,
    same_type,
)


def sum_grad_squared(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None = None) -> None:
    """Add the sum of squared per-sample gradients of g [N, T, O], a [N, T, I] to out [O, I], and their sum to grad."""
    if g.shape[0] == 0 or g.shape[1] == 0:
        return
    g, a = same_type(g, a)
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
    g, x = (neighbouring(y) for y in same_type(g, x))
    call = convolution(g, x, list(out.shape[2:]), stride, padding, dilation, groups, frames)
    _launch(call, g, out, grad)


def _launch(call: Call, like: Tensor, out: Tensor, grad: Tensor | None) -> None:
    """Run it on torch's current stream of the tensors' device."""
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    results = [None if y is None else _Result(y, accumulated) for y in (out, grad)]
    module, device = native.module(), like.device
    shares = module.cuda_sum_grad_squared_shares(call.sizes, call.axes, call.type, multiprocessors(device))
    many = shares * (1 + (grad is not None)) * math.prod(out.shape) if shares > 1 else 0
    room = torch.empty(many, dtype=accumulated, device=device)  # the allocator keeps it until this stream is past it
    addresses = [0 if r is None else r.buffer.data_ptr() for r in results]
    function = module.cuda_sum_grad_squared
    launch(function, device, *call, *addresses, room.data_ptr() if many else 0, shares)
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
