"""The weights that a model was fine-tuned from, under the names of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.checkpoint.prefixes import align
from fastfip.errors import ConfigError
from fastfip.nets.state import unwrapped

__all__ = ["pretrained_values", "state_of"]

#: Of the model's real numbers, the share that has to be there: with less, it is another architecture.
ENOUGH = 0.5
#: Names that an error or a note shows at most.
SHOWN = 4
#: Files of a folder that holds a model, in the order in which they are looked for.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def pretrained_values(pretrained: Any, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return what `pretrained` holds under the names of the model, and a sentence on it.

    Args:
        pretrained: a module, a state dict, a file that `fastfip.load_checkpoint` reads, or a folder with one, as
            `save_pretrained` writes it. Its names may have other prefixes than the model's: those of the encoder alone,
            where the model has a head as well.
        model: the received one.

    Raises:
        ConfigError: it is nothing of that kind, has less than half of the model's weights, other numbers than finite
            ones, or the received values themselves.
        CheckpointError: a file that cannot be read.
    """
    state = state_of(pretrained)
    own = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    found = {name: state[theirs] for name, theirs in align(state, own).items() if name in own}
    found = {name: value for name, value in found.items() if value.shape == own[name].shape}
    size = sum(t.numel() for t in own.values())
    met = sum(own[name].numel() for name in found)
    if met < ENOUGH * size:
        raise ConfigError(
            f"pretrained= has {met:,} of the model's {size:,} numbers under the same names and shapes: give the "
            f"weights that it was fine-tuned from (the model's names are {_names(own)}, the others {_names(state)})"
        )
    odd = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if odd:
        raise ConfigError(f"pretrained= has values that are not finite: {_names(odd)}")
    if all(torch.equal(value.to(own[name]), own[name]) for name, value in found.items()):
        raise ConfigError("pretrained= holds the received weights: give those that the model had before fine-tuning")
    rest = [name for name in own if name not in found]
    said = f"pretrained= has {100 * met / size:.1f} % of the model's weights"
    return found, said + (f", and not {_names(rest)}" if rest else "")


def state_of(pretrained: Any) -> dict[str, Tensor]:
    """Return the real numbers of a module, a state dict, a file or a folder, by name.

    Raises:
        ConfigError: it is nothing of that kind.
        CheckpointError: a file that cannot be read.
    """
    if isinstance(pretrained, nn.Module):
        pretrained = unwrapped(pretrained).state_dict()
    elif isinstance(pretrained, (str, os.PathLike)):
        from fastfip.checkpoint import load_checkpoint

        path = Path(pretrained)
        inside = next((path / name for name in FILES if path.is_dir() and (path / name).exists()), path)
        pretrained = load_checkpoint(inside)
    if not isinstance(pretrained, Mapping):
        raise ConfigError(
            f"pretrained is a {type(pretrained).__name__}: give a module, a state dict, or a file with one"
        )
    return {
        name: value.detach()
        for name, value in pretrained.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }


def _names(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else "")
