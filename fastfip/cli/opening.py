"""The checkpoint that a command is given: what it holds, and the model that it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfip.cli.errors import fail
from fastfip.cli.triggers import ImageReader

if TYPE_CHECKING:
    from torch import nn

    from fastfip.backdoorbench import AttackResult
    from fastfip.checkpoint import Checkpoint

__all__ = ["Opened", "as_made_for", "attack_in", "build", "restored"]


@dataclass(frozen=True)
class Opened:
    """What a command works on: a model, the file that it came from, where it runs, how images become its inputs.

    `attack` is what BackdoorBench says in that file of the images, None where it is another one.
    """

    model: nn.Module
    checkpoint: Checkpoint
    where: str
    how: ImageReader
    attack: AttackResult | None


def arguments_of(arch_args: str | None) -> dict[str, Any]:
    """Return what `--arch-args` says; nothing for None."""
    if arch_args is None:
        return {}
    try:
        arguments = json.loads(arch_args)
    except json.JSONDecodeError as error:
        raise fail(f"--arch-args is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise fail("--arch-args must be a JSON object, e.g. '{\"num_classes\": 43}'")
    return arguments


def build(arch: str, arch_args: str | None) -> nn.Module:
    """Return the model of `--arch` and `--arch-args`."""
    from fastfip.checkpoint import load_arch

    return load_arch(arch, arguments_of(arch_args))


def as_made_for(
    options: Any, how: ImageReader, arch: str | None, model: nn.Module, arch_args: str | None = None
) -> ImageReader:
    """Return how images become inputs where options leave it open: as the library says that the model is from.

    `options` has what the user gave as `size`, `mean`, `std` and `scale`. One of the last three stands for all of them.
    """
    scaled = (options.mean, options.std, options.scale) != (None, None, None)
    if arch is None or (scaled and options.size is not None):
        return how
    from fastfip.checkpoint.preprocessing import own_pixels

    own = own_pixels(arch, model, arguments_of(arch_args))
    if own is None:
        return how
    given = how.pixels
    own = replace(own, channels=given.channels or own.channels)
    if scaled:
        own = replace(own, mean=given.mean, std=given.std, scale=given.scale)
    if options.size is not None:
        own = replace(own, size=given.size, resize=None)
    return replace(how, pixels=own)


def attack_in(path: Path) -> AttackResult | None:
    """Return the result of BackdoorBench that a file holds; None: it holds something else."""
    from fastfip.backdoorbench import find

    return find(path)


def restored(
    path: Path,
    attack: AttackResult | None,
    arch: str | None,
    arch_args: str | None,
    key: str | None,
    prefix: str | None,
) -> tuple[nn.Module, Checkpoint]:
    """Return the model with the weights of a checkpoint, in eval mode, and the checkpoint."""
    from fastfip.checkpoint import load_checkpoint

    if arch is not None:
        model = build(arch, arch_args)
    elif arch_args is not None:
        raise fail("--arch-args needs --arch")
    else:
        model = _known(path, attack, key, prefix)
    return model.eval(), load_checkpoint(path, model, key=key, prefix=prefix)


def _known(path: Path, attack: AttackResult | None, key: str | None, prefix: str | None) -> nn.Module:
    """Return the architecture that a file names, or the one that its weights are of."""
    from fastfip.checkpoint import load_arch, load_checkpoint
    from fastfip.checkpoint.known import known_arch
    from fastfip.errors import CheckpointError

    if attack is not None:
        return load_arch(*attack.arch)
    weights = load_checkpoint(path, key=key, prefix=prefix)
    try:
        return load_arch(*known_arch({name: tuple(value.shape) for name, value in weights.items()}))
    except CheckpointError as error:
        raise fail(f"--arch is missing, and {path} {error}") from None
