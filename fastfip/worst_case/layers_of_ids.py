"""Which layer of a model turns its token ids into vectors, found by what goes in and out of it in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, map_tensors

__all__ = ["calls_of_lookups", "chosen_lookup", "ids_of_call", "padding_of"]


def ids_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids of a call that is given whole numbers and no real ones; None: it is another call."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    ids = [t for t in tensors if t.dim() > 0 and not t.is_floating_point() and t.dtype != torch.bool]
    return ids[0] if ids and not any(t.is_floating_point() for t in tensors) else None


def calls_of_lookups(
    model: nn.Module, forward: Callable[[Batch], Any], batch: Batch
) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, ids, vectors) of every module that makes real rows of whole numbers, in the order they finish."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            ids = ids_of_call(args, kwargs)
            if ids is not None and isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1:
                calls.append((name, ids.detach().clone(), out.detach().clone()))

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        forward(batch)
    return calls


def chosen_lookup(calls: list[tuple[str, Tensor, Tensor]], batch: Batch) -> str | None:
    """Return the name of the call whose input is the batch's ids; see `places.TokenPlace.of`."""
    own = _integers(batch)
    rows = {t.shape[0] for t in own if t.dim() > 0}
    calls = [call for call in calls if call[1].shape[0] == call[2].shape[0] and call[1].shape[0] in rows]
    for name, ids, _ in calls:
        if any(_is_part(ids, t) for t in own):
            return name
    varied = [call for call in calls if bool((call[1] != call[1][:1]).any())]
    most = max(varied, key=lambda call: call[1].unique().numel(), default=None)
    return None if most is None else most[0]


def _integers(batch: Batch) -> list[Tensor]:
    """Return the tensors of whole numbers in a batch."""
    out: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            out.append(value)
        return value

    map_tensors(keep, batch)
    return out


def _is_part(ids: Tensor, whole: Tensor) -> bool:
    """Return whether ids [N, t] are the first or the last columns of another tensor [N, T], or [N] all of it."""
    if ids.dim() != whole.dim() or ids.shape[0] != whole.shape[0] or not bool((ids != ids[:1]).any()):
        return False
    if ids.dim() == 1:
        return bool((ids == whole).all())
    t = ids.shape[1]
    if ids.dim() != 2 or t == 0 or t > whole.shape[1]:
        return False
    return any(bool((ids == part).all()) for part in (whole[:, :t], whole[:, whole.shape[1] - t :]))


def padding_of(seen: list[Tensor]) -> int | None:
    """Return the id that fills rows at their ends, the one that is repeated there most; None: no row is filled."""
    counts: dict[int, int] = {}
    for ids in seen:
        for ends in (ids, ids.flip(1)):
            last = ends[:, -1:]
            run = (ends == last).flip(1).int().cumprod(1).sum(1)
            for token, length in zip(last[:, 0].tolist(), run.tolist()):
                if length > 1:
                    counts[token] = counts.get(token, 0) + length - 1
    return max(counts, key=lambda token: counts[token]) if counts else None
