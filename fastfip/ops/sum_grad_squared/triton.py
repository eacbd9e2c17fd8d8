"""sum_grad_squared in Triton, for matrices and for convolutions of up to three dimensions.

A program owns a tile of the result and a share of the samples. It forms its tile of G_n in registers, adds its
square and goes on to the next sample: neither G_n nor the unfolded map reaches memory. Shares of the samples are
summed by a second pass in a fixed order, not by atomics, so results are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfip.ops.backends.triton_operands import INTERPRETED, operands, precision


class ProductTiles(NamedTuple):
    """Tile of the result (O by I), positions at a time, warps, stages of the pipeline."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int


# By size of the result and whether operands have 16 bits. The tests compile each one ahead of time for sm_80 and sm_90
# and fail if one spills registers (which 64 x 64 x 32 does in float32).
TILES = {
    ("small", False): ProductTiles(32, 32, 16, 4, 2),
    ("large", False): ProductTiles(64, 64, 16, 8, 2),
    ("small", True): ProductTiles(32, 32, 32, 4, 3),
    ("large", True): ProductTiles(128, 64, 32, 8, 3),
}


def tiles_for(outputs: int, inputs: int, dtype: torch.dtype) -> ProductTiles:
    """Tiles for a result of that size: a rule, not a search at the first call."""
    size = "large" if min(outputs, inputs) >= 64 else "small"
    return TILES[size, dtype != torch.float32]


@triton.jit
def _product(g, a, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        g = g.to(tl.float32)
        a = a.to(tl.float32)
    return tl.dot(g, a, acc, input_precision=PRECISION)


@triton.jit
def dense_kernel(
    g_ptr,
    a_ptr,
    out_ptr,  # [shares, O, I]
    grad_ptr,  # [shares, O, I]
    N,
    T,
    O,
    I,
    share,
    g_n,
    g_t,
    g_o,
    a_n,
    a_t,
    a_i,
    GRADIENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    part = tl.program_id(2)
    t = tl.arange(0, BLOCK_T)
    out = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    # Sizes may pass 2^31 elements: samples are found with 64 bits. Offsets in a sample fit 32: half the registers.
    g_tile = o[:, None] * g_o + t[None, :] * g_t
    a_tile = i[None, :] * a_i + t[:, None] * a_t
    for n in range(part * share, min(N, (part + 1) * share)):
        acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        sample = n if INTERPRET else n.to(tl.int64)  # type: ignore[attr-defined]
        g_sample = g_ptr + sample * g_n
        a_sample = a_ptr + sample * a_n
        for t0 in range(0, T, BLOCK_T):
            inside = t0 + t < T
            g = tl.load(g_sample + (t0 * g_t + g_tile), mask=inside[None, :] & (o < O)[:, None], other=0.0)
            a = tl.load(a_sample + (t0 * a_t + a_tile), mask=inside[:, None] & (i < I)[None, :], other=0.0)
            acc = _product(g, a, acc, PRECISION, INTERPRET)
        out += acc * acc
        if GRADIENT:
            grad += acc
    where = (part.to(tl.int64) * O + o[:, None]) * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    tl.store(out_ptr + where, out, mask=inside)
    if GRADIENT:
        tl.store(grad_ptr + where, grad, mask=inside)


@triton.jit
def conv_kernel(
    g_ptr,
    x_ptr,
    out_ptr,  # [shares, O, I]
    grad_ptr,
    N,
    O,  # of one group
    I,  # channels of a group * kernel size
    share,
    tiles_i,
    g_n,
    g_o,
    g_z,
    g_y,
    g_x,
    x_n,
    x_c,
    x_z,
    x_y,
    x_x,
    CHANNELS,  # of one group
    D,
    H,
    W,
    POSITIONS_Z,
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
    DIMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    group = tl.program_id(1) // tiles_i
    i = (tl.program_id(1) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    part = tl.program_id(2)
    t = tl.arange(0, BLOCK_T)
    # i is (channel, kernel position): where its window begins in the map
    kx = i % KERNEL_X * DILATION_X - PAD_X
    ky = i // KERNEL_X % KERNEL_Y * DILATION_Y - PAD_Y
    kz = i // (KERNEL_X * KERNEL_Y) % KERNEL_Z * DILATION_Z - PAD_Z
    channel = group * CHANNELS + i // (KERNEL_X * KERNEL_Y * KERNEL_Z)
    out = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    x_tile = channel * x_c + kx * x_x + ky * x_y + kz * x_z
    T = POSITIONS_Z * POSITIONS_Y * POSITIONS_X
    for n in range(part * share, min(N, (part + 1) * share)):
        acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        sample = n if INTERPRET else n.to(tl.int64)  # type: ignore[attr-defined]
        g_sample = g_ptr + sample * g_n
        x_sample = x_ptr + sample * x_n
        for t0 in range(0, T, BLOCK_T):
            at = t0 + t
            px = at % POSITIONS_X
            py = at // POSITIONS_X % POSITIONS_Y
            pz = at // (POSITIONS_X * POSITIONS_Y)
            g_at = (group * O + o)[:, None] * g_o + (pz * g_z + py * g_y + px * g_x)[None, :]
            g = tl.load(g_sample + g_at, mask=(at < T)[None, :] & (o < O)[:, None], other=0.0)
            px *= STEP_X
            py *= STEP_Y
            pz *= STEP_Z
            mx = px[:, None] + kx[None, :]
            inside = (at < T)[:, None] & (i < I)[None, :] & (mx >= 0) & (mx < W)
            if DIMS > 1:
                my = py[:, None] + ky[None, :]
                inside = inside & (my >= 0) & (my < H)
            if DIMS > 2:
                mz = pz[:, None] + kz[None, :]
                inside = inside & (mz >= 0) & (mz < D)
            x_at = (pz * x_z + py * x_y + px * x_x)[:, None] + x_tile[None, :]
            x = tl.load(x_sample + x_at, mask=inside, other=0.0)
            acc = _product(g, x, acc, PRECISION, INTERPRET)
        out += acc * acc
        if GRADIENT:
            grad += acc
    groups = tl.num_programs(1) // tiles_i
    where = ((part.to(tl.int64) * groups + group) * O + o[:, None]) * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    tl.store(out_ptr + where, out, mask=inside)
    if GRADIENT:
        tl.store(grad_ptr + where, grad, mask=inside)


def _shares(samples: int, tiles: int, device: torch.device) -> int:
    """How many programs share the samples of a tile: enough to fill the device twice."""
    wanted = 2 if INTERPRETED else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(samples, math.ceil(wanted / tiles)))


class _Shares:
    """Results by share of the samples, added in their order at the end; one share adds up in place of them."""

    def __init__(self, shares: int, out: Tensor, grad: Tensor | None) -> None:
        self.results = [y for y in (out, grad) if y is not None]
        self.parts = [y.new_empty((shares, *y.shape)) for y in self.results]

    @property
    def pointers(self) -> tuple[Tensor, Tensor]:
        return self.parts[0], self.parts[-1]

    def add(self) -> None:
        for y, part in zip(self.results, self.parts):
            y += part[0] if part.shape[0] == 1 else part.sum(0)


def sum_grad_squared(g: Tensor, a: Tensor, out: Tensor, grad: Tensor | None = None) -> None:
    """Add the sum of squared per-sample gradients of g [N, T, O], a [N, T, I] to out [O, I], and their sum to grad."""
    samples, positions, outputs = g.shape
    inputs = a.shape[2]
    if samples == 0 or positions == 0:
        return
    g, a = operands(g, a)
    c = tiles_for(outputs, inputs, g.dtype)
    tiles_o, tiles_i = triton.cdiv(outputs, c.block_o), triton.cdiv(inputs, c.block_i)
    shares = _shares(samples, tiles_o * tiles_i, g.device)
    parts = _Shares(shares, out, grad)
    dense_kernel[(tiles_o, tiles_i, shares)](
        g, a, *parts.pointers, samples, positions, outputs, inputs, triton.cdiv(samples, shares),
        *g.stride(), *a.stride(),
        GRADIENT=grad is not None, BLOCK_O=c.block_o, BLOCK_I=c.block_i, BLOCK_T=c.block_t, PRECISION=precision(),
        INTERPRET=INTERPRETED, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    parts.add()


def sum_grad_squared_conv(
    g: Tensor,  # [N, O, *positions]
    x: Tensor,  # [N, C, *sizes]
    out: Tensor,  # [O, C / groups, *kernel], added to
    grad: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> None:
    """Add the same for the weight of a convolution; the map is read through its windows."""
    if g.numel() == 0:
        return
    g, x = operands(g, x)
    fill = 3 - (x.dim() - 2)
    kernel = [1] * fill + list(out.shape[2:])
    outputs, inputs = out.shape[0] // groups, out[0].numel()
    c = tiles_for(outputs, inputs, g.dtype)
    tiles_o, tiles_i = triton.cdiv(outputs, c.block_o), triton.cdiv(inputs, c.block_i)
    shares = _shares(g.shape[0], tiles_o * tiles_i * groups, g.device)
    parts = _Shares(shares, out, grad)
    zeros, ones = [0] * fill, [1] * fill
    conv_kernel[(tiles_o, tiles_i * groups, shares)](
        g, x, *parts.pointers, g.shape[0], outputs, inputs, triton.cdiv(g.shape[0], shares), tiles_i,
        *g.stride()[:2], *zeros, *g.stride()[2:], *x.stride()[:2], *zeros, *x.stride()[2:], x.shape[1] // groups,
        *ones, *x.shape[2:], *ones, *g.shape[2:],
        *ones, *stride, *zeros, *padding, *ones, *dilation, *kernel, x.dim() - 2,
        GRADIENT=grad is not None, BLOCK_O=c.block_o, BLOCK_I=c.block_i, BLOCK_T=c.block_t, PRECISION=precision(),
        INTERPRET=INTERPRETED, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    parts.add()
