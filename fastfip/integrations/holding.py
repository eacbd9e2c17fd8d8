"""What the callbacks of all trainers do alike: purify a model that a trainer holds, on every one of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.errors import ConfigError, ModelError, reason
from fastfip.methods import Method
from fastfip.nets.state import is_sharded
from fastfip.purification.purify import purify
from fastfip.purification.result import PurifyResult

__all__ = ["figures", "plain_forward", "purify_held"]


def purify_held(
    model: nn.Module, clean: Any, method: str | type[Method], options: Mapping[str, Any], copy: bool
) -> PurifyResult:
    """Purify a model that a trainer holds: its parameters stay the same objects, with other values.

    Where the trainer runs several processes, all of them have to call this. Each purifies with the same seed, and then
    takes the weights of the first one, so that they cannot drift apart.

    Args:
        model: what is purified; not a wrapper of the trainer's.
        clean: clean samples, see `fastfip.purify`.
        method: its name, or a class.
        options: of `fastfip.purify`.
        copy: tune a copy and write its weights back: for a model whose parameters have hooks of a wrapper
            (DistributedDataParallel). Otherwise the model itself is tuned.

    A model that is sharded (FSDP2) is purified by all processes together, each of which takes its parts.

    Raises:
        ConfigError: a `group` for a model that is sharded, or a method that its processes cannot share.
        ModelError: the purification failed on another process.
    """
    failed: BaseException | None = None
    result, sharded = None, is_sharded(model)
    if sharded:
        options, copy = {"group": "auto", **options}, False
    try:
        if sharded and options["group"] != "auto":
            raise ConfigError("group: leave it out, the model is sharded and all processes that have parts purify it")
        with plain_forward(model):
            result = purify(model, clean, method, **{"progress": False, "group": None, **options, "inplace": not copy})
    except Exception as error:
        failed = error
    _agree(failed)
    if failed is not None or result is None:
        raise failed or RuntimeError("no result")
    if copy:
        model.load_state_dict(result.state_dict())
        result.model = model
    if not sharded:
        _spread(model)
    return result


def _processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _agree(failed: BaseException | None) -> None:
    """Let no process go on alone: where one has failed, the others would wait for it for ever.

    Raises:
        ModelError: another process has failed, with its number and its words.
    """
    if _processes() == 1:
        return
    said: list[str | None] = [None] * _processes()
    torch.distributed.all_gather_object(said, None if failed is None else reason(failed))
    if failed is None and any(said):
        rank, words = next((rank, text) for rank, text in enumerate(said) if text)
        raise ModelError(f"the purification failed on process {rank}, so no process keeps it: {words}")


def _spread(model: nn.Module) -> None:
    """Give every process the weights of the first one."""
    if _processes() > 1:
        for value in model.state_dict().values():
            if isinstance(value, Tensor):
                torch.distributed.broadcast(value, 0)


@contextlib.contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Take off, for a block, the autocast that Accelerate puts around a model's `forward`.

    `fastfip` autocasts the clean loss itself, and leaves the Fisher terms in full precision.
    """
    wrapped = {name: model.__dict__.pop(name) for name in ("forward", "_original_forward") if _is_wrapped(model, name)}
    try:
        yield
    finally:
        model.__dict__.update(wrapped)


def _is_wrapped(model: nn.Module, name: str) -> bool:
    return name in model.__dict__ and (name == "_original_forward" or "_original_forward" in model.__dict__)


def figures(result: PurifyResult, prefix: str) -> dict[str, float]:
    """Return what a trainer's logger is told: `PREFIX/acc_before`, `PREFIX/acc_after` and so on, shares as 0..1."""
    out = {}
    for when, side in (("before", result.before), ("after", result.after)):
        for name in ("acc", "asr", "ra", "loss", "fisher_trace"):
            value = getattr(side, name)
            if value is not None:
                out[f"{prefix}/{name}_{when}"] = float(value)
    return {**out, f"{prefix}/seconds": float(result.seconds.get("total", 0.0))}
