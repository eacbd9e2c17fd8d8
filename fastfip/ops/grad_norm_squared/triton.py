"""grad_norm_squared in Triton: a program squares and sums one tile, of G_n or of the two Gram matrices.

Tiles stay in registers; what reaches memory is one number for each tile and sample. Those are added by a second pass in
a fixed order, not by atomics, so results are reproducible. Of the Gram matrices, which are symmetric, tiles above the
diagonal are counted twice and those below it are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfip.ops.backends.triton_operands import INTERPRETED, operands, precision


class NormTiles(NamedTuple):
    """Rows and columns of a tile, and how many products are summed at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By whether operands have 16 bits; the tests compile both ahead of time and fail if one spills.
TILES = {False: NormTiles(32, 32, 16, 4, 2), True: NormTiles(64, 64, 32, 4, 3)}


@triton.jit
def _tile(
    x_ptr,
    y_ptr,
    m,
    n,
    M,
    N,
    K,
    x_m,
    x_k,
    y_n,
    y_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """sum_k x[m, k] y[n, k]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + k < K
        x_at = m[:, None] * x_m + (k0 + k)[None, :] * x_k
        y_at = n[None, :] * y_n + (k0 + k)[:, None] * y_k
        x = tl.load(x_ptr + x_at, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        y = tl.load(y_ptr + y_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def norm_kernel(
    g_ptr,
    a_ptr,
    part_ptr,  # [N, tiles], float32
    T,
    O,
    I,
    tiles_n,
    g_n,
    g_t,
    g_o,
    a_n,
    a_t,
    a_i,
    GRAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tile // tiles_n
    column = tile % tiles_n
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    g = g_ptr + sample * g_n
    a = a_ptr + sample * a_n
    total = 0.0
    if GRAM:
        if row <= column:
            left = _tile(g, g, m, n, T, T, O, g_t, g_o, g_t, g_o, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INTERPRET)
            right = _tile(a, a, m, n, T, T, I, a_t, a_i, a_t, a_i, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INTERPRET)
            total = tl.sum(left * right)
            if row < column:
                total *= 2.0
    else:
        left = _tile(g, a, m, n, O, I, T, g_o, g_t, a_i, a_t, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INTERPRET)
        total = tl.sum(left * left)
    tl.store(part_ptr + sample * tl.num_programs(0) + tile, total)


def grad_norm_squared(g: Tensor, a: Tensor, gram: bool) -> Tensor:
    """Return s [N] of g [N, T, O] and a [N, T, I], by Gram matrices (`gram`) or by G_n."""
    samples, t, o = g.shape
    i = a.shape[2]
    if samples == 0 or t == 0:
        return g.new_zeros(samples, dtype=torch.float32)
    g, a = operands(g, a)
    c = TILES[g.dtype != torch.float32]
    rows, columns = (t, t) if gram else (o, i)
    tiles_m, tiles_n = triton.cdiv(rows, c.block_m), triton.cdiv(columns, c.block_n)
    part = torch.empty(samples, tiles_m * tiles_n, device=g.device, dtype=torch.float32)
    norm_kernel[(tiles_m * tiles_n, samples)](
        g, a, part, t, o, i, tiles_n, *g.stride(), *a.stride(),
        GRAM=gram, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, PRECISION=precision(),
        INTERPRET=INTERPRETED, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return part.sum(1)
