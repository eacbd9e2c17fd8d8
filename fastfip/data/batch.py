"""Nested batches: the one walk over tuples, lists and dicts of tensors, and what is done to every tensor in them.

A batch is a tensor, or a tuple, list or mapping of batches; anything else in it is a leaf that is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfip.nets.state import LOW_PRECISION

__all__ = [
    "Batch", "describe", "dtype_name", "float32_batch", "map_batch", "map_tensors", "move_to", "pick", "take",
    "to_tensors",
]  # fmt: skip

Batch = Any


def map_batch(
    function: Callable[..., Any],
    batch: Batch,
    *others: Batch,
    is_leaf: Callable[[Any], bool] | None = None,
    path: str | None = None,
) -> Batch:
    """Return a batch of the same form with `function` applied to its leaves; lists in it become tuples.

    Args:
        function: called with a leaf, and those in the same place of `others`; with `path`, with the place's name first.
        batch: what is walked.
        others: batches of the same form.
        is_leaf: tells of a container that it is handed to `function` as a whole.
        path: None, or where the batch itself is: the name of a place is ".key" or ".0" for each level below it.
    """
    if is_leaf is None or not is_leaf(batch):
        if isinstance(batch, Mapping):
            return {
                key: map_batch(
                    function, value, *(other[key] for other in others), is_leaf=is_leaf, path=_below(path, key)
                )
                for key, value in batch.items()
            }
        if isinstance(batch, (tuple, list)):
            return tuple(
                map_batch(function, *items, is_leaf=is_leaf, path=_below(path, i))
                for i, items in enumerate(zip(batch, *others))
            )
    return function(batch, *others) if path is None else function(path, batch, *others)


def _below(path: str | None, key: object) -> str | None:
    return None if path is None else f"{path}.{key}"


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return the batch with `function` applied to its tensors; all else stays as it is."""
    return map_batch(lambda value: function(value) if isinstance(value, Tensor) else value, batch)


def to_tensors(batch: Batch) -> Batch:
    """Return a batch with the numpy arrays and numbers in it as tensors; containers become plain tuples and dicts.

    Tensors are cut from a graph that they may come from: what is done to them later is nobody's else.
    """
    return map_batch(_as_tensor, batch)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, (str, bytes)) or not hasattr(value, "__array__"):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError):
        return value


def pick(batch: Batch, n: int, samples: int) -> Batch:
    """Return sample n of a batch as a batch of one: every tensor whose first dimension is `samples` is cut."""
    return map_tensors(lambda t: t[n : n + 1] if _is_rows(t, samples) else t, batch)


def take(batch: Batch, index: Tensor, samples: int) -> Batch:
    """Return the samples `index` [K] of a batch as a batch: every tensor whose first dimension is `samples` is cut."""
    return map_tensors(lambda t: t[index.to(t.device)] if _is_rows(t, samples) else t, batch)


def _is_rows(t: Tensor, samples: int) -> bool:
    return t.dim() > 0 and t.shape[0] == samples


def move_to(batch: Batch, device: torch.device | str | None) -> Batch:
    """Return a (nested) batch with its tensors on `device`; what is no tensor stays as it is."""
    return map_tensors(lambda t: t if device is None else t.to(device, non_blocking=True), batch)


def float32_batch(batch: Batch) -> Batch:
    """Return a (nested) batch with its float16 and bfloat16 tensors in float32; all else stays as it is."""
    return map_tensors(lambda t: t.float() if t.dtype in LOW_PRECISION else t, batch)


def dtype_name(t: Tensor) -> str:
    """Return the name of a tensor's dtype without torch."""
    return str(t.dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """Return what a value is, in a few words for an error."""
    if isinstance(value, Tensor):
        return f"a {dtype_name(value)} tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(describe(v) if isinstance(v, Tensor) else type(v).__name__ for v in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inner}{', ...' if len(value) > 4 else ''})"
    return f"a {type(value).__name__}"
