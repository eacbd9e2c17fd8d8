"""spectral_apply and its adjoint in Triton, for Linear layers and pointwise convolutions: one launch each.

A program owns a tile of positions and features of the result. While it multiplies its positions with the weight it
multiplies them with the directions as well, so the projections are in its registers when they are needed:

    y = x B + ((x L) * (s - sigma)) R^T + bias,    p = x L

with B = W^T, L = V, R = U for the layer and B = W, L = U, R = V for its adjoint. Nothing is divided by a singular
value, so no direction has to be strong. Every column of programs projects its positions anew, and the first one writes
p. Where the weight is W(delta) already there is nothing to correct, and p has programs of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfip.ops.backends.triton_operands import INTERPRETED, precision
from fastfip.ops.spectral.grad_triton import product
from fastfip.ops.spectral.linear_map import SpectralMap, format_of


class ApplyTiles(NamedTuple):
    """Positions and features of a tile of the result, features summed at a time, warps, stages of the pipeline."""

    block_t: int
    block_e: int
    block_f: int
    num_warps: int
    num_stages: int


# By whether operands have 16 bits; the tests compile both ahead of time and fail if one spills. The correction is added
# in a loop over a few directions: unrolled, it holds all of them in registers beside p and y, and spills.
TILES = {False: ApplyTiles(64, 128, 16, 8, 2), True: ApplyTiles(64, 128, 32, 8, 3)}


@triton.jit
def _tile(ptr, row_stride, rows, column_stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Read so many rows and columns of a tile that begins at ptr, zeros beyond."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = (row * row_stride)[:, None] + (column * column_stride)[None, :]
    return tl.load(ptr + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _write(tile, ptr, row_stride, rows, column_stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = (row * row_stride)[:, None] + (column * column_stride)[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def spectral_apply_kernel(
    x_ptr,
    w_ptr,
    l_ptr,  # [groups, F, K]
    r_ptr,  # [groups, E, K]
    s_ptr,  # [groups, K]
    sigma_ptr,  # [groups, K]
    bias_ptr,
    y_ptr,
    p_ptr,
    T,
    E,  # features of the result, of one group
    F,  # features summed over, of one group
    K,
    columns,  # of programs
    tiles,  # of positions
    groups,
    x_n,
    x_t,
    x_f,
    w_g,
    w_e,
    w_f,
    y_n,
    y_t,
    y_e,
    p_n,
    p_t,
    p_k,
    CORRECT: tl.constexpr,  # False: the weight is W(delta), and the last column of programs is that of p
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # One axis of programs: the others may not be longer than 65535. Neighbours have the same positions.
    column = tl.program_id(0) % columns
    place = tl.program_id(0) // columns
    # Sizes may pass 2^31 elements: where a tile begins is found with 64 bits. Offsets in a tile fit 32.
    t = (place % tiles).to(tl.int64) * BLOCK_T
    e = column.to(tl.int64) * BLOCK_E
    group = (place // tiles % groups).to(tl.int64)
    sample = (place // tiles // groups).to(tl.int64)
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    FEW: tl.constexpr = 16  # directions at a time; as many as a product of tiles must have
    x_ptr += sample * x_n + t * x_t + group * F * x_f
    w_ptr += group * w_g + e * w_e
    l_ptr += group * F * K
    y_ptr += sample * y_n + t * y_t + (group * E + e) * y_e
    p_ptr += sample * p_n + t * p_t + group * K * p_k
    rows = T - t
    features = E - e
    p = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    if CORRECT or column < columns - 1:
        y = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for f in range(0, F, BLOCK_F):
            x = _tile(x_ptr, x_t, rows, x_f, F - f, BLOCK_T, BLOCK_F)
            w = _tile(w_ptr, w_f, F - f, w_e, features, BLOCK_F, BLOCK_E)
            y = product(x, w, y, PRECISION, INTERPRET)
            if CORRECT:
                d = _tile(l_ptr, K, F - f, 1, K, BLOCK_F, BLOCK_K).to(TYPE)
                p = product(x, d, p, PRECISION, INTERPRET)
                l_ptr += BLOCK_F * K
            x_ptr += BLOCK_F * x_f
            w_ptr += BLOCK_F * w_f
        if CORRECT:
            s_ptr += group * K
            sigma_ptr += group * K
            r_ptr += (group * E + e) * K
            parts = tl.reshape(p, (BLOCK_T, BLOCK_K // FEW, FEW))
            number = tl.arange(0, BLOCK_K // FEW)
            direction = tl.arange(0, FEW)
            for k in tl.range(0, K, FEW, num_stages=1):
                there = k + direction < K
                s = tl.load(s_ptr + k + direction, mask=there, other=0.0).to(tl.float32)
                sigma = tl.load(sigma_ptr + k + direction, mask=there, other=0.0).to(tl.float32)
                part = tl.sum(tl.where((number == k // FEW)[None, :, None], parts, 0.0), 1)
                r = _tile(r_ptr + k, 1, K - k, K, features, FEW, BLOCK_E).to(TYPE)
                y = product((part * (s - sigma)[None, :]).to(TYPE), r, y, PRECISION, INTERPRET)
        if BIAS:
            feature = tl.arange(0, BLOCK_E)
            bias = tl.load(bias_ptr + group * E + e + feature, mask=feature < features, other=0.0)
            y += bias.to(tl.float32)[None, :]
        _write(y, y_ptr, y_t, rows, y_e, features, BLOCK_T, BLOCK_E)
        if CORRECT and column == 0:
            _write(p, p_ptr, p_t, rows, p_k, K, BLOCK_T, BLOCK_K)
    else:
        for f in range(0, F, BLOCK_F):
            x = _tile(x_ptr, x_t, rows, x_f, F - f, BLOCK_T, BLOCK_F)
            d = _tile(l_ptr, K, F - f, 1, K, BLOCK_F, BLOCK_K).to(TYPE)
            p = product(x, d, p, PRECISION, INTERPRET)
            x_ptr += BLOCK_F * x_f
            l_ptr += BLOCK_F * K
        _write(p, p_ptr, p_t, rows, p_k, K, BLOCK_T, BLOCK_K)


def spectral_apply(x: Tensor, bias: Tensor | None, m: SpectralMap) -> tuple[Tensor, Tensor]:
    """Return y = W(delta) x + bias and p = x V; the shapes are the op's."""
    axis, groups = (-1, 1) if m.conv is None else (1, m.conv.groups)
    size = list(x.shape)
    size[axis] = groups * m.o
    return _launch(x, tuple(size), _by_group(m), m.f.v, m.f.u, bias, m)


def spectral_adjoint(g: Tensor, size: tuple[int, ...], m: SpectralMap) -> tuple[Tensor, Tensor]:
    """Return x = W(delta)^T g, of that size, and q = g U."""
    return _launch(g, size, _by_group(m).mT, m.f.u, m.f.v, None, m)


def _by_group(m: SpectralMap) -> Tensor:
    """The weight as [G, O, I]."""
    return m.weight.reshape(-1, m.o, m.i)


def _launch(
    x: Tensor,
    size: tuple[int, ...],
    w: Tensor,  # [G, E, F]
    left: Tensor,  # [G, F, K]
    right: Tensor,  # [G, E, K]
    bias: Tensor | None,
    m: SpectralMap,
) -> tuple[Tensor, Tensor]:
    groups, features, directions = right.shape
    if m.conv is None:
        y, p = x.new_empty(size), x.new_empty(*x.shape[:-1], directions)
        x_in, y_out, p_out = (a.reshape(1, -1, a.shape[-1]) for a in (x, y, p))
    else:
        form = format_of(x)
        shapes = size, (size[0], groups * directions, *size[2:])
        y, p = (torch.empty(s, dtype=x.dtype, device=x.device, memory_format=form) for s in shapes)
        x_in, y_out, p_out = (a.flatten(2).transpose(1, 2) for a in (x, y, p))
    samples, positions = x_in.shape[:2]
    if samples == 0 or positions == 0:
        return y, p
    correct, c = m.scratch is not None, TILES[x.dtype != torch.float32]
    x_in, w = _near(x_in, c.block_t, c.block_f), _near(w, c.block_e, c.block_f)
    tiles = triton.cdiv(positions, c.block_t)
    columns = max(correct, triton.cdiv(features, c.block_e)) + (not correct)
    spectral_apply_kernel[(columns * tiles * groups * samples,)](
        x_in, w, *(a.contiguous() for a in (left, right, m.f.s, m.f.sigma, x[:0] if bias is None else bias)),
        y_out, p_out, positions, features, left.shape[1], directions, columns, tiles, groups,
        *x_in.stride(), *w.stride(), *y_out.stride(), *p_out.stride(),
        CORRECT=correct, BIAS=bias is not None, BLOCK_T=c.block_t, BLOCK_E=c.block_e, BLOCK_F=c.block_f,
        BLOCK_K=max(16, triton.next_power_of_2(directions)), PRECISION=precision(), INTERPRET=INTERPRETED,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return y, p


def _near(a: Tensor, *tile: int) -> Tensor:
    """Return the tensor, or a copy in which offsets in a tile of its last two axes fit 32 bits."""
    far = sum((size - 1) * stride for size, stride in zip(tile, a.stride()[1:]))
    return a if far < 2**31 else a.contiguous()
