"""Launchers of the CUDA grad_norm_squared (csrc/cuda/grad_norm_squared.cu); shapes are the caller's to check."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.cuda_operands import (
    Call,
    aligned_lines,
    convolution,
    dense,
    launch,
    multiprocessors,
    neighbouring,
    same_type,
)
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import accumulation_dtype


def operands(g: Tensor, a: Tensor, gram: bool) -> list[Tensor]:
    """Return g [N, T, O] and a [N, T, I] as the kernel reads them: of one dtype, and for Gram matrices aligned."""
    pair = same_type(g, a)
    return [aligned_lines(x) for x in pair] if gram else pair


def grad_norm_squared(g: Tensor, a: Tensor, gram: bool) -> Tensor:
    """Return s [N] of g [N, T, O] and a [N, T, I], by Gram matrices (`gram`) or by G_n."""
    if not g.numel() or not a.numel():
        return g.new_zeros(g.shape[0], dtype=accumulation_dtype(g.dtype))
    left, right = operands(g, a, gram)
    return _launch(dense(left, right), left, gram).to(accumulation_dtype(g.dtype))


def grad_norm_squared_conv(g: Tensor, x: Tensor, shape: ConvShape, frames: int) -> Tensor:
    """Return s [N] of maps g [N*F, O, *out] and x [N*F, C, *in], by G_n; the map is read through its windows."""
    if not g.numel() or not x.numel():
        return g.new_zeros(g.shape[0] // frames, dtype=accumulation_dtype(g.dtype))
    left, right = (neighbouring(y) for y in same_type(g, x))
    options = shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups, frames
    return _launch(convolution(left, right, *options), left, False).to(accumulation_dtype(g.dtype))


def _launch(call: Call, like: Tensor, gram: bool) -> Tensor:
    module, device = native.module(), like.device
    numbers = call.sizes, call.axes, call.type, gram
    shares, many = module.cuda_grad_norm_squared_plan(*numbers, multiprocessors(device))
    parts = torch.empty(call.sizes[0], many, dtype=accumulation_dtype(like.dtype), device=device)
    launch(module.cuda_grad_norm_squared, device, *call, gram, parts.data_ptr(), shares)
    return parts.sum(1)
