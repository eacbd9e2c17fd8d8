"""Launcher of the CUDA gram_apply (csrc/cuda/gram_apply.cu); shapes are the caller's to check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.backends.cuda_operands import LinesArgument, aligned_lines, exact, launch, same_type, sample_lines
from fastfip.ops.memory import accumulation_dtype


class GramCall(NamedTuple):
    """One call as csrc/fastfip.h has it."""

    q: LinesArgument
    k: LinesArgument
    v: LinesArgument
    sizes: list[int]  # samples, T, U, D, E
    type: int
    exact: bool


def operands(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return them as the kernel reads them: of one dtype, rows aligned to 16 bytes."""
    return [aligned_lines(x) for x in same_type(q, k, v)]


def describe(q: Tensor, k: Tensor, v: Tensor) -> GramCall:
    """Describe the call; the operands must outlive it."""
    sizes = [*q.shape[:2], *k.shape[1:], v.shape[2]]
    return GramCall(sample_lines(q), sample_lines(k), sample_lines(v), sizes, native.TYPES[q.dtype], exact())


def gram_apply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_u (q [N, T, D] . k [N, U, D]) v [N, U, E] as [N, T, E], in the dtype of q."""
    dtype, device = q.dtype, q.device
    if not q.numel() or not v.numel():
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    q, k, v = operands(q, k, v)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=accumulation_dtype(q.dtype), device=device)
    launch(native.module().cuda_gram_apply, device, *describe(q, k, v), out.data_ptr())
    return out.to(dtype)
