"""spectral_grad in Triton, for matrices and for convolutions of up to three dimensions.

A program owns some directions, one sample and a share of its positions. It forms a tile of q and the tile of p that
belongs to it in registers, multiplies them, adds up over the positions and goes on to the next tile: neither reaches
memory, nor does the unfolded map. Shares are summed by a second pass in a fixed order, not by atomics, so results are
reproducible.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfip.ops.backends.triton_operands import INTERPRETED, operands, precision
from fastfip.ops.convolution import ConvShape


class SpectralTiles(NamedTuple):
    """Positions and directions of a tile, features at a time, warps, stages of the pipeline."""

    block_t: int
    block_k: int
    block_f: int
    num_warps: int
    num_stages: int


# By whether operands have 16 bits; the tests compile both ahead of time and fail if one spills.
TILES = {False: SpectralTiles(64, 32, 16, 4, 2), True: SpectralTiles(64, 64, 32, 4, 3)}

#: What the right operand is: p itself, rows of a matrix, or the windows of a map.
KNOWN, MATRIX, WINDOWS = 0, 1, 2


@triton.jit
def product(x, d, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        x = x.to(tl.float32)
        d = d.to(tl.float32)
    return tl.dot(x, d, acc, input_precision=PRECISION)


@triton.jit
def _rows(
    x_ptr,
    d_ptr,
    t,
    inside,
    k,
    K,
    F,
    x_t,
    x_f,
    d_f,
    d_k,
    PROJECTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """sum_f x[t, f] d[f, k], or x[t, k] where it is projected."""
    if PROJECTED:
        at = t[:, None] * x_t + k[None, :] * x_f
        return tl.load(x_ptr + at, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    f = tl.arange(0, BLOCK_F)
    for f0 in range(0, F, BLOCK_F):
        there = f0 + f < F
        x_at = t[:, None] * x_t + (f0 + f)[None, :] * x_f
        d_at = (f0 + f)[:, None] * d_f + k[None, :] * d_k
        x = tl.load(x_ptr + x_at, mask=inside[:, None] & there[None, :], other=0.0)
        d = tl.load(d_ptr + d_at, mask=there[:, None] & (k < K)[None, :], other=0.0)
        acc = product(x, d, acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def spectral_grad_kernel(
    g_ptr,
    u_ptr,
    x_ptr,
    v_ptr,
    part_ptr,  # [N, shares, G, K]
    T,
    O,
    I,  # of one group
    K,
    share,
    groups,
    g_n,
    g_t,
    g_f,
    u_g,
    u_f,
    u_k,
    x_n,
    x_t,  # of a map: of a channel
    x_f,  # of a map: unused
    v_g,
    v_f,
    v_k,
    x_z,
    x_y,
    x_x,
    CHANNELS,  # of one group
    D,
    H,
    W,
    POSITIONS_Y,
    POSITIONS_X,
    STEP_Z: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    PAD_Z: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Z: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    KERNEL_Z: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    LEFT: tl.constexpr,  # whether g is to be multiplied by u
    RIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    # Sizes may pass 2^31 elements: samples are found with 64 bits. Offsets in a sample fit 32.
    sample = (tl.program_id(2) // groups).to(tl.int64)
    group = tl.program_id(2) % groups
    end = min(T, (part + 1) * share)
    total = tl.zeros((BLOCK_K,), tl.float32)
    g_sample = g_ptr + sample * g_n + group * (O if LEFT else K) * g_f
    u = u_ptr + group * u_g
    v = v_ptr + group * v_g
    f = tl.arange(0, BLOCK_F)
    for t0 in range(part * share, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = t < end
        q = _rows(
            g_sample,
            u,
            t,
            inside,
            k,
            K,
            O,
            g_t,
            g_f,
            u_f,
            u_k,
            not LEFT,
            BLOCK_T,
            BLOCK_K,
            BLOCK_F,
            PRECISION,
            INTERPRET,
        )
        if RIGHT == 2:
            x_sample = x_ptr + sample * x_n
            px = t % POSITIONS_X * STEP_X
            py = t // POSITIONS_X % POSITIONS_Y * STEP_Y
            pz = t // (POSITIONS_X * POSITIONS_Y) * STEP_Z
            p = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            for f0 in range(0, I, BLOCK_F):
                i = f0 + f  # (channel, kernel position)
                mx = px[:, None] + (i % KERNEL_X * DILATION_X - PAD_X)[None, :]
                my = py[:, None] + (i // KERNEL_X % KERNEL_Y * DILATION_Y - PAD_Y)[None, :]
                mz = pz[:, None] + (i // (KERNEL_X * KERNEL_Y) % KERNEL_Z * DILATION_Z - PAD_Z)[None, :]
                channel = group * CHANNELS + i // (KERNEL_X * KERNEL_Y * KERNEL_Z)
                there = inside[:, None] & (i < I)[None, :] & (mx >= 0) & (mx < W) & (my >= 0) & (my < H)
                there = there & (mz >= 0) & (mz < D)
                x_at = channel[None, :] * x_t + mz * x_z + my * x_y + mx * x_x
                x = tl.load(x_sample + x_at, mask=there, other=0.0)
                v_at = i[:, None] * v_f + k[None, :] * v_k
                d = tl.load(v + v_at, mask=(i < I)[:, None] & (k < K)[None, :], other=0.0)
                p = product(x, d, p, PRECISION, INTERPRET)
        else:
            x_sample = x_ptr + sample * x_n + group * (I if RIGHT == 1 else K) * x_f
            p = _rows(
                x_sample, v, t, inside, k, K, I, x_t, x_f, v_f, v_k, RIGHT == 0, BLOCK_T, BLOCK_K, BLOCK_F, PRECISION,
                INTERPRET,
            )  # fmt: skip
        total += tl.sum(q * p, 0)
    where = ((sample * tl.num_programs(1) + part) * groups + group) * K + k
    tl.store(part_ptr + where, total, mask=k < K)


def _shares(programs: int, tiles: int, device: torch.device) -> int:
    """How many programs share the positions of a sample: enough to fill the device twice."""
    wanted = 4 if INTERPRETED else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, triton.cdiv(wanted, programs)))


def spectral_grad(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    """Return sum_t (g U)(x V) of every sample, [N, G, K] in float32; the shapes are the op's."""
    groups = 1 if shape is None else shape.groups
    factor = v if u is None else u
    assert factor is not None
    directions = factor.shape[2]
    right = KNOWN if v is None else MATRIX if shape is None or shape.pointwise else WINDOWS
    if shape is not None:
        g = g.flatten(2).transpose(1, 2)
        x = x if right == WINDOWS else x.flatten(2).transpose(1, 2)
    samples, positions = g.shape[:2]
    if samples == 0 or positions == 0 or directions == 0:
        return g.new_zeros((samples, groups, directions), dtype=torch.float32)
    g, x, *others = operands(g, x, *(d for d in (u, v) if d is not None))
    u = others[0] if u is not None else None
    v = others[-1] if v is not None else None
    c = TILES[g.dtype != torch.float32]
    tiles_k, tiles_t = triton.cdiv(directions, c.block_k), triton.cdiv(positions, c.block_t)
    shares = _shares(tiles_k * samples * groups, tiles_t, g.device)
    share = triton.cdiv(tiles_t, shares) * c.block_t
    shares = triton.cdiv(positions, share)
    part = torch.empty(samples, shares, groups, directions, device=g.device, dtype=torch.float32)
    outputs, inputs = g.shape[2] // groups, (0 if v is None else v.shape[1])
    x_strides, maps, window = _windows(x, shape) if right == WINDOWS else (x.stride(), _NO_MAP, _NO_WINDOW)
    u_strides, v_strides = ((0, 0, 0) if d is None else d.stride() for d in (u, v))
    channels = x.shape[1] // groups if right == WINDOWS else 0
    spectral_grad_kernel[(tiles_k, shares, samples * groups)](
        g, g if u is None else u, x, x if v is None else v, part, positions, outputs, inputs, directions, share, groups,
        *g.stride(), *u_strides, *x_strides, *v_strides, *maps[:3], channels, *maps[3:],
        *_positions(shape, x, right), *window,
        LEFT=u is not None, RIGHT=right, BLOCK_T=c.block_t, BLOCK_K=c.block_k, BLOCK_F=c.block_f, PRECISION=precision(),
        INTERPRET=INTERPRETED, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return part[:, 0] if shares == 1 else part.sum(1)


_NO_MAP = (0, 0, 0, 1, 1, 1)  # strides and sizes of z, y, x
_NO_WINDOW = (1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1)  # steps, paddings, dilations, kernel


def _windows(x: Tensor, shape: ConvShape | None) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return strides of sample and channel, strides and sizes of the map, and the window; lacking axes have size 1."""
    assert shape is not None
    fill = 3 - len(shape.kernel)
    zeros, ones = (0,) * fill, (1,) * fill
    maps = (*zeros, *x.stride()[2:], *ones, *x.shape[2:])
    window = (*ones, *shape.stride, *zeros, *shape.padding, *ones, *shape.dilation, *ones, *shape.kernel)
    return (x.stride(0), x.stride(1), 0), maps, window


def _positions(shape: ConvShape | None, x: Tensor, right: int) -> tuple[int, int]:
    """Positions of the output along y and x."""
    if right != WINDOWS or shape is None:
        return 1, 1
    axes = zip(x.shape[2:], shape.kernel, shape.stride, shape.padding, shape.dilation)
    sizes = [1, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)]
    return sizes[-2], sizes[-1]
