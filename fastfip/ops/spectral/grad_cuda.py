"""Launcher of the CUDA spectral_grad (csrc/cuda/spectral_grad.cu); shapes are the caller's to check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.cuda_operands import (
    LinesArgument,
    aligned_lines,
    convolution,
    dense,
    group_lines,
    launch,
    multiprocessors,
    neighbouring,
    same_type,
)
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import accumulation_dtype


class SpectralOperands(NamedTuple):
    """The op's operands as the kernel reads them: of one dtype, maps without windows as matrices."""

    g: Tensor  # [N, T, G * O] or, with a shape, [N, G * O, *out]
    x: Tensor  # [N, T, G * I] or, with a shape, [N, C, *in]
    u: Tensor | None  # [G, O, K], aligned lines
    v: Tensor | None  # [G, I, K], aligned lines
    shape: ConvShape | None  # of windows
    groups: int
    directions: int


class SpectralCall(NamedTuple):
    """One call as csrc/fastfip.h has it."""

    g: tuple[int, list[int]]
    u: LinesArgument
    x: tuple[int, list[int]]
    v: LinesArgument
    sizes: list[int]
    axes: list[list[int]]
    directions: int
    type: int
    exact: bool


def operands(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> SpectralOperands:
    """Return them as the kernel reads them. One of u and v is given."""
    given = [d for d in (u, v) if d is not None]
    g, x, *factors = same_type(g, x, *given)
    factors = [aligned_lines(d) for d in factors]
    groups = 1 if shape is None else shape.groups
    if shape is not None and (v is None or shape.pointwise):
        g, x, shape = g.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2), None
    elif shape is not None:
        g, x = neighbouring(g), neighbouring(x)
    left, right = (None if u is None else factors[0]), (None if v is None else factors[-1])
    return SpectralOperands(g, x, left, right, shape, groups, given[0].shape[2])


def describe(found: SpectralOperands) -> SpectralCall:
    """Describe the call; the operands must outlive it."""
    g, x, u, v, shape, groups, directions = found
    if shape is None:
        call = dense(g, x, groups)
    else:
        call = convolution(g, x, shape.kernel, shape.stride, shape.padding, shape.dilation, groups, 1)
    return SpectralCall(
        call.g, group_lines(u), call.x, group_lines(v), call.sizes, call.axes, directions, call.type, call.exact
    )


def spectral_grad(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    """Return sum_t (g U)(x V) of every sample, [N, G, K], float64 for float64 and float32 otherwise."""
    found = operands(g, x, u, v, shape)
    samples, acc = g.shape[0], accumulation_dtype(g.dtype)
    if not g.numel() or not x.numel() or not found.directions:
        return g.new_zeros((samples, found.groups, found.directions), dtype=acc)
    call, module = describe(found), native.module()
    numbers = call.sizes, call.axes, call.directions, call.type
    shares = module.cuda_spectral_grad_shares(*numbers, multiprocessors(g.device))
    size = samples, shares, found.groups, found.directions
    parts = torch.empty(size, dtype=accumulation_dtype(found.g.dtype), device=g.device)
    launch(module.cuda_spectral_grad, g.device, *call, parts.data_ptr(), shares)
    return (parts[:, 0] if shares == 1 else parts.sum(1)).to(acc)
