"""What is computed of tensors of which each process has a part (DTensors) without making one of them whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastfip.nets.state import is_part, own_part

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks

__all__ = ["clip_parts", "exchanged", "norms_of_parts"]


@torch.no_grad()
def norms_of_parts(tensors: Sequence[Tensor], ranks: Ranks) -> list[float]:
    """Return the L2 norm of each whole tensor: its parts' squares are summed over the ranks, of all tensors in one sum.

    Args:
        tensors: DTensors in slices over all ranks (some of which may have the same slice), or plain ones, which are
            the same on every rank.
        ranks: all that have parts; each has to ask for the same tensors.
    """
    if not tensors:
        return []
    squares = [torch.linalg.vector_norm(own_part(t)).double().square() / _holders(t, ranks.world) for t in tensors]
    total = torch.stack([square.to(ranks.device) for square in squares])
    ranks.sum_([total], "norms")
    return cast("list[float]", total.sqrt().tolist())


def _holders(t: Any, world: int) -> int:
    """Return how many ranks have the same part of a tensor as this one, itself included."""
    if not is_part(t):
        return world
    return math.prod(t.device_mesh.size(i) for i, how in enumerate(t.placements) if how.is_replicate())


@torch.no_grad()
def clip_parts(tensors: Sequence[Tensor], most: float, ranks: Ranks) -> Tensor:
    """Shorten gradients so that their norm over all ranks is at most `most`; return what it was, a float64 scalar.

    It is `torch.nn.utils.clip_grad_norm_` for gradients on several meshes, and for plain ones among them.
    """
    gradients = [t.grad for t in tensors if t.grad is not None]
    norm = torch.tensor(math.sqrt(sum(n * n for n in norms_of_parts(gradients, ranks))), dtype=torch.float64)
    factor = min(1.0, most / (float(norm) + 1e-6))
    for gradient in gradients:
        own_part(gradient).mul_(factor)
    return norm


@contextlib.contextmanager
def exchanged(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Exchange the values of two tensors of each pair for a block, tensor by tensor: no third copy of all is made."""
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        a, b = own_part(one), own_part(other)
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
