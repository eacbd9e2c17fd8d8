"""gram_apply in Triton: out = (q k^T) v with tiles of the Gram matrix in registers, as flash attention tiles it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfip.ops.backends.triton_operands import INTERPRETED, operands, precision


class GramTiles(NamedTuple):
    """Rows of the result, rows of k and v at a time, columns of q and k at a time, columns of the result."""

    block_t: int
    block_u: int
    block_d: int
    block_e: int
    num_warps: int
    num_stages: int


# By whether operands have 16 bits; the tests compile both ahead of time and fail if one spills.
TILES = {False: GramTiles(32, 32, 16, 64, 4, 2), True: GramTiles(32, 64, 32, 64, 4, 2)}


@triton.jit
def gram_apply_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [N, T, E], float32
    T,
    U,
    D,
    E,
    q_n,
    q_t,
    q_d,
    k_n,
    k_u,
    k_d,
    v_n,
    v_u,
    v_e,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    u = tl.arange(0, BLOCK_U)
    out = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for u0 in range(0, U, BLOCK_U):
        gram = tl.zeros((BLOCK_T, BLOCK_U), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            inside = d0 + d < D
            q_at = t[:, None] * q_t + (d0 + d)[None, :] * q_d
            k_at = (u0 + u)[None, :] * k_u + (d0 + d)[:, None] * k_d
            q = tl.load(q_ptr + n * q_n + q_at, mask=(t < T)[:, None] & inside[None, :], other=0.0)
            k = tl.load(k_ptr + n * k_n + k_at, mask=(u0 + u < U)[None, :] & inside[:, None], other=0.0)
            if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
                q = q.to(tl.float32)
                k = k.to(tl.float32)
            gram = tl.dot(q, k, gram, input_precision=PRECISION)
        v_at = (u0 + u)[:, None] * v_u + e[None, :] * v_e
        v = tl.load(v_ptr + n * v_n + v_at, mask=(u0 + u < U)[:, None] & (e < E)[None, :], other=0.0)
        # The Gram matrix stays float32: rounding it to 16 bits would lose what its sums have gained.
        out = tl.dot(gram, v.to(tl.float32), out, input_precision=PRECISION)
    where = (n * T + t[:, None]) * E + e[None, :]
    tl.store(out_ptr + where, out, mask=(t < T)[:, None] & (e < E)[None, :])


def gram_apply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_u (q [N, T, D] . k [N, U, D]) v [N, U, E] as [N, T, E], in the dtype of q."""
    dtype = q.dtype
    samples, t, d = q.shape
    u, e = v.shape[1:]
    out = torch.empty(samples, t, e, device=q.device, dtype=torch.float32)
    if out.numel() == 0:
        return out.to(dtype)
    q, k, v = operands(q, k, v)
    c = TILES[q.dtype != torch.float32]
    gram_apply_kernel[(triton.cdiv(t, c.block_t), triton.cdiv(e, c.block_e), samples)](
        q, k, v, out, t, u, d, e, *q.stride(), *k.stride(), *v.stride(),
        BLOCK_T=c.block_t, BLOCK_U=c.block_u, BLOCK_D=c.block_d, BLOCK_E=c.block_e, PRECISION=precision(),
        INTERPRET=INTERPRETED, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out.to(dtype)
