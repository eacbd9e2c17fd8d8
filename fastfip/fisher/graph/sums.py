"""Sums over positions that the norm layers need, without temporaries of the size of the feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfip.ops.memory import accumulation_dtype

_CHUNK = 1 << 17  # numbers at a time: what stays in the cache


def _weighted(g: Tensor, a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    centred = a.to(shift.dtype) - shift[:, None]
    return (centred * g).sum(2), g.sum(2, dtype=shift.dtype)


class _CentredSums(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, size = g.shape
        step = max(1, _CHUNK // max(1, channels * size))
        parts = [_weighted(g[k : k + step], a[k : k + step], shift) for k in range(0, max(batch, 1), step)]
        dot, total = (torch.cat(both) for both in zip(*parts))
        return dot, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None, None]:
        g, a, shift = ctx.saved_tensors
        base = (u - v * shift)[..., None]
        da = v[..., None] * g if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():
            dg = base + v[..., None] * a
        else:  # one pass over memory
            dg = torch.addcmul(base, v[..., None], a.to(v.dtype))
        return dg.to(g.dtype), None if da is None else da.to(a.dtype), None


def centred_sums(g: Tensor, a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_t g[b, c, t] (a[b, c, t] - shift[c]) and sum_t g[b, c, t], both [B, C], for maps [B, C, *positions].

    Differentiable in g and a, any number of times; `shift` is constant. float64 for float64, otherwise float32.
    """
    shift = shift.detach().to(accumulation_dtype(g.dtype))
    return _CentredSums.apply(g.flatten(2) if g.dim() > 2 else g[..., None], a.reshape(*a.shape[:2], -1), shift)
