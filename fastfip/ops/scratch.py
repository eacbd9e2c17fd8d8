"""One buffer that is used again and again: fresh memory costs more than the arithmetic that fills it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Numbers (not bytes) that a chunked reference op may hold at once, where one sample alone does not need more.
CHUNK = 1 << 20


class Scratch:
    """Uninitialised memory for one pass. Every `take` may return the same memory, unless the slots differ."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None, slot: int = 0) -> Tensor:
        """Return an uninitialised contiguous tensor of that shape on the device of `like`."""
        numel = math.prod(shape)
        key = (slot, dtype or like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=key[1], device=key[2])
        return buffer[:numel].view(shape)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which squares of `dtype` are summed: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
