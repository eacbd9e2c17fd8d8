"""The weights that a model was fine-tuned from, under the names of the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.checkpoint.align import find_state, is_state
from fastfip.checkpoint.prefixes import align
from fastfip.errors import CheckpointError, ConfigError
from fastfip.nets.state import unwrapped

__all__ = ["pretrained_values", "state_of"]

#: Of the model's real numbers, the share that has to be there: with less, it is another architecture.
ENOUGH = 0.5
#: Names that an error or a note shows at most.
SHOWN = 4


def pretrained_values(
    pretrained: Any, model: nn.Module, frozen: frozenset[int] = frozenset()
) -> tuple[dict[str, Tensor], str]:
    """Return what `pretrained` holds under the names of the model, and a sentence on it.

    Args:
        pretrained: a module, a state dict, a file that `fastfip.load_checkpoint` reads, or a folder with one, as
            `save_pretrained` writes it. Its names may have other prefixes than the model's: those of the encoder alone,
            where the model has a head as well.
        model: the received one.
        frozen: ids of its parameters that stay as they are, which do not count.

    Raises:
        ConfigError: it is nothing of that kind, has less than half of the weights that are tuned, other numbers than
            finite ones, or the received values themselves.
        CheckpointError: a file that cannot be read.
    """
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = {name: t for name, t in named if t.is_floating_point()}
    state = state_of(pretrained, own)
    try:
        names = align(state, own)
    except CheckpointError as error:
        raise ConfigError(f"pretrained= {error}, or pass the state dict of one of them") from None
    found = {name: state[theirs] for name, theirs in names.items() if name in own and id(own[name]) not in frozen}
    found = {name: value for name, value in found.items() if value.shape == own[name].shape}
    tuned = {name: t for name, t in own.items() if id(t) not in frozen}
    size = sum(t.numel() for t in {id(t): t for t in tuned.values()}.values())
    met = sum(t.numel() for t in {id(own[name]): own[name] for name in found}.values())
    if met < ENOUGH * size:
        still = " Frozen ones stay as they are, unless frozen='tune'." if frozen else ""
        raise ConfigError(
            f"pretrained= has {met:,} of the {size:,} numbers that are tuned under the same names and shapes: give "
            f"the weights that the model was fine-tuned from (its names are {_names(own)}, "
            f"the others {_names(state) or 'none'}).{still}"
        )
    if any(value.is_meta for value in found.values()):
        raise ConfigError("pretrained= is on the meta device and has no values: load its weights first")
    odd = [name for name, value in found.items() if not bool(torch.isfinite(value.float()).all())]
    if odd:
        raise ConfigError(f"pretrained= has values that are not finite: {_names(odd)}")
    if all(torch.equal(value.to(own[name]), own[name]) for name, value in found.items()):
        raise ConfigError("pretrained= holds the received weights: give those that the model had before fine-tuning")
    rest = [name for name in tuned if name not in found]
    said = f"pretrained= has {100 * met / size:.1f} % of the weights that are tuned"
    said += f", and not {_names(rest)}" if rest else ""
    left = [name for name, t in own.items() if id(t) in frozen]
    return found, said + (f"; frozen, and as received: {_names(left)}" if left else "")


def state_of(pretrained: Any, expected: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the real numbers of a module, a state dict, a file or a folder, by name.

    Args:
        pretrained: one of these; a dict may hold the state dict among other things, as checkpoints do.
        expected: the names that are looked for where a dict has several.

    Raises:
        ConfigError: it is nothing of that kind.
        CheckpointError: a file that cannot be read.
    """
    if isinstance(pretrained, nn.Module):
        pretrained = unwrapped(pretrained).state_dict()
    elif isinstance(pretrained, (str, os.PathLike)):
        from fastfip.checkpoint import load_checkpoint

        pretrained = load_checkpoint(pretrained)
    if not isinstance(pretrained, Mapping):
        raise ConfigError(
            f"pretrained= is a {type(pretrained).__name__}: give a module, a state dict, a checkpoint file or a folder"
        )
    if pretrained and not is_state(pretrained):
        try:
            for part in find_state(pretrained, None, expected):
                pretrained = pretrained[part]
        except CheckpointError as error:
            raise ConfigError(f"pretrained= {error}") from None
    return {
        name: value.detach()
        for name, value in pretrained.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }


def _names(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else "")
