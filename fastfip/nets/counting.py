"""The memory that the tensors of a call take, by count."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["storage_key", "strided_tensors", "tensor_peak"]


def tensor_peak(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of tensors that a call takes above what is there, at its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Count() as count:
        call()
    return count.peak


class _Count(TorchDispatchMode):
    """Counts the memory of the tensors that operations of a block make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.present = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage_key(t) for t in strided_tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for t in strided_tensors(out):
            key = storage_key(t)
            if key not in known and key not in self.live and t.device.type != "meta":
                self.add(t, key)
        return out

    def add(self, t: Tensor, key: int) -> None:
        storage = t.untyped_storage()
        self.live[key] = storage.nbytes()
        self.present += self.live[key]
        self.peak = max(self.peak, self.present)
        weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.present -= self.live.pop(key, 0)


def storage_key(t: Tensor) -> int:
    """Return what tensors in one storage have in common, as long as it lives."""
    return t.untyped_storage()._cdata


def strided_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers that have a storage."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
