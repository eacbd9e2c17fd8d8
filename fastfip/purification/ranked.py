"""What a purification by several processes begins with: they meet, and see whether they were given the same."""

from __future__ import annotations

from typing import Any

import torch

from fastfip.data.cleanset import CleanSet
from fastfip.data.fingerprint import of_model
from fastfip.data.rank_task import RankTask, joined, whole_loader
from fastfip.data.task import Task
from fastfip.errors import ConfigError
from fastfip.methods.base import REGISTRY, Method
from fastfip.nets.ranks import Ranks
from fastfip.nets.shards import Shards

__all__ = ["begin", "clean_of_all", "over_ranks", "parts_of", "traffic"]


def parts_of(model: torch.nn.Module, group: Any, inplace: bool) -> Shards:
    """Return the parts of a sharded model, with the whole twin that is purified in its place.

    Raises:
        ConfigError: `inplace` is False, as a sharded model cannot be copied; or the group is not that of the parts.
        ModelError: it is sharded in another way than by DTensors, or has no weights.
    """
    if not inplace:
        raise ConfigError(
            "the model is sharded over processes and cannot be copied: purify it with inplace=True on every rank, or "
            "take it as it was before fully_shard"
        )
    return Shards(model, group)


def begin(
    recipe: type[Method],
    group: Any,
    model: torch.nn.Module,
    given: dict[str, Any],
    device: torch.device,
    sharded: bool = False,
) -> Ranks:
    """Meet the other ranks of a group.

    Args:
        recipe: the method.
        group: a process group of two processes or more.
        model: the received one.
        given: what else has to be the same on every rank, by the name that an error has for it.
        device: where it computes.
        sharded: the ranks have parts of the model, so that none of them can purify it alone.

    Raises:
        ConfigError: the method works in one process only, or the ranks were given different things.
        BackendError: the others did not come.
    """
    if not recipe.over_ranks:
        able = [name for name in REGISTRY.names() if REGISTRY.get(name).over_ranks]
        other = "the model as it was before it was sharded" if sharded else "group=None on one rank"
        raise ConfigError(f"{recipe.name} works in one process: over several take one of {', '.join(able)}, or {other}")
    ranks = Ranks(group, device, "purify")
    try:
        ranks.agree(
            {"models": of_model(model), **given}, "every rank has to call purify with the same model and settings"
        )
    except BaseException as error:
        ranks.__exit__(type(error), error, None)
        raise
    return ranks


def clean_of_all(data: Any, task: Task, ranks: Ranks, notes: list[str]) -> CleanSet:
    """Return the clean set that all ranks have, or have parts of; see `joined`."""
    clean, parts = joined(CleanSet.of(whole_loader(data, ranks), task), ranks, task)
    if parts:
        notes.append(f"each of {ranks.world} processes was given a part of the clean samples: they were joined")
    return clean


def over_ranks(task: Task, ranks: Ranks) -> RankTask:
    """Return the task whose passes the ranks share."""
    return RankTask(task.forward_hook, task.loss_hook, task.most, ranks=ranks)


def traffic(ranks: Ranks, steps: int) -> dict[str, Any]:
    """Return what the result says of the processes: how many, and the bytes that rank 0 handed to collectives."""
    sent = dict(ranks.bytes)
    tuning = sum(sent.get(what, 0) for what in ("gradients", "outputs", "batchnorm", "values", "perturbations"))
    return {
        "world": ranks.world,
        "backend": ranks.backend,
        "bytes": sent,
        "bytes_a_step": tuning / max(1, steps),
        "gradient_bytes_a_step": sent.get("gradients", 0) / max(1, steps),
    }
