"""One buffer that is used again and again: fresh memory costs more than the arithmetic that fills it."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes from which on numpy asks the system for large pages

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

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


_KEPT = threading.local()


def kept_scratch() -> Scratch:
    """Return this thread's scratch memory, kept from pass to pass; buffers of more than CHUNK numbers are not kept."""
    scratch: Scratch = getattr(_KEPT, "scratch", None) or Scratch()
    _KEPT.scratch = scratch
    for key in [key for key, buffer in scratch._buffers.items() if buffer.numel() > CHUNK or not buffer.is_cpu]:
        del scratch._buffers[key]
    return scratch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which squares of `dtype` are summed: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def zeros_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of the shape and device of `t`, in its memory format.

    Large ones on the CPU come from numpy, which takes pages that the system has zeroed, large ones where it can:
    torch.zeros touches every small page to write zeros over zeros, a fourfold price at 64 MB.
    """
    if t.device.type != "cpu" or t.numel() * dtype.itemsize < _LARGE or not t.is_contiguous():
        return torch.zeros_like(t, dtype=dtype)
    kind = np.float64 if dtype == torch.float64 else np.float32
    memory = np.zeros(t.numel() + 16, kind)
    first = -memory.ctypes.data % 64 // dtype.itemsize  # torch's own memory starts at multiples of 64 bytes
    return torch.from_numpy(memory[first : first + t.numel()]).view(t.shape)
