"""Gram matrices over positions: of rows, of the windows of a convolution, and when they are worth their products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfip.ops.convolution import ConvShape

_BLOCKED = 192  # positions from which on the half above the diagonal is copied rather than computed


def prefers_gram(t: int, o: int, i: int) -> bool:
    """Whether the Gram form of a squared norm needs fewer operations than the direct one."""
    return t * (o + i) < o * i


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x x^T [B, T, T] of x [B, T, D]; of many positions three quarters of the products are made."""
    b, t, _ = x.shape
    out = x.new_empty(b, t, t) if out is None else out
    if t < _BLOCKED:
        return torch.bmm(x, x.mT, out=out)
    cuts = [k * t // 4 for k in range(5)]
    for low, high in zip(cuts, cuts[1:]):
        torch.bmm(x[:, low:high], x[:, :high].mT, out=out[:, low:high, :high])
        out[:, :low, low:high] = out[:, low:high, :low].mT
    return out


def _box(first: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Index of a box in the axes after the first two."""
    return (slice(None), slice(None), *(slice(f, f + n) for f, n in zip(first, size)))


class Lattice:
    """Windows of a convolution of stride 1 as places of one lattice, so that tap k is at place p + k for every p.

    The Gram matrix of the windows, A[t, u] = sum_k P[t + k, u + k], is then a sum of copies of that of the places,
    P = x^T x, each moved along the diagonal: products of C numbers for two places, not of C times the taps. Likewise
    the adjoint, M[p, q] = sum_k A[p - k, q - k]. An axis has the map's places with the padding before them: the padding
    behind them is that before the next row, so a place that falls off the end of one meets zeros.
    """

    def __init__(self, shape: ConvShape, in_size: tuple[int, ...], out_size: tuple[int, ...]) -> None:
        self.in_size, self.out_size, self.padding = in_size, out_size, shape.padding
        self.size = tuple(n + p for n, p in zip(in_size, shape.padding))
        self.places = math.prod(self.size)
        step, self.moves = 1, list[tuple[int, int]]()  # taps of an axis, and how far they lie apart
        for n, k, d in zip(reversed(self.size), reversed(shape.kernel), reversed(shape.dilation)):
            self.moves.append((k, d * step))
            step *= n

    @staticmethod
    def serves(shape: ConvShape) -> bool:
        """Whether a convolution can be brought to a lattice."""
        reach = ((k - 1) * d for k, d in zip(shape.kernel, shape.dilation))
        return all(s == 1 for s in shape.stride) and all(p <= r for p, r in zip(shape.padding, reach))

    def of_input(self, x: Tensor, groups: int) -> Tensor:
        """Put x [B, C, *in] on it: [B*groups, C/groups, places]."""
        return self._put(x, groups, self.padding)

    def of_output(self, g: Tensor, groups: int) -> Tensor:
        """Put g [B, O, *out] on it: [B*groups, O/groups, places]."""
        return self._put(g, groups, (0,) * len(self.size))

    def input(self, places: Tensor, batch: int) -> Tensor:
        """Take a map like x out of it."""
        return self._take(places, batch, self.padding, self.in_size)

    def output(self, places: Tensor, batch: int) -> Tensor:
        """Take a map like g out of it."""
        return self._take(places, batch, (0,) * len(self.size), self.out_size)

    def _put(self, x: Tensor, groups: int, first: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[2:]) != self.size:
            full = x.new_zeros(*x.shape[:2], *self.size)
            full[_box(first, x.shape[2:])] = x
            x = full
        return x.reshape(x.shape[0] * groups, x.shape[1] // groups, self.places)

    def _take(self, places: Tensor, batch: int, first: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        full = places.view(batch, -1, *self.size)
        return full[_box(first, size)]

    def windows(self, gram: Tensor) -> Tensor:
        """Return A of P [B, places, places]; what it has where there is no position of the output is of no use."""
        return self._moved(gram, back=False)

    def windows_transpose(self, gram: Tensor) -> Tensor:
        """Return M of A, which must be zero where there is no position; likewise for places of the padding."""
        return self._moved(gram, back=True)

    def _moved(self, gram: Tensor, back: bool) -> Tensor:
        now = gram.view(-1)
        for taps, distance in self.moves:
            if taps == 1:
                continue
            out, step = torch.empty_like(now), distance * (self.places + 1)
            for k in range(1, taps):
                reach = min(k * step, len(now))
                low, high = slice(0, len(now) - reach), slice(reach, None)
                to, source, rest = (high, low, slice(0, reach)) if back else (low, high, slice(len(now) - reach, None))
                if k == 1:
                    torch.add(now[to], now[source], out=out[to])
                    out[rest] = now[rest]
                else:
                    out[to] += now[source]
            now = out
        return now.view_as(gram)
