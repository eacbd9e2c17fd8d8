"""Decompositions of weights that are kept in a file, so that the next run on the same checkpoint need not make them.

The file is safetensors with the name *.factors: no checkpoint has that name, so none is ever overwritten. It is of the
weights, the rank and the format that its key is the hash of, and its tensors have a hash as well: a file of other
weights, or one that is damaged, is as good as none, and is replaced. Whoever can write to it can give it other factors,
as they can give the checkpoint other weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastfip.checkpoint.read import read
from fastfip.data.fingerprint import of_values
from fastfip.errors import CheckpointError, ConfigError, reason
from fastfip.reporting.files import replacing
from fastfip.spectral.decompose import Factored, Rank, decompose

__all__ = ["SUFFIX", "check_cache", "decompose_once"]

SUFFIX = ".factors"

#: Part of the key: raise the number when the decomposition gives other factors of the same weights.
FORMAT = "fastfip factors 1"


def check_cache(path: str | os.PathLike[str] | None) -> None:
    """Refuse the name of a file that is for no cache.

    Raises:
        ConfigError: it does not end in `.factors`.
    """
    if path is not None and Path(path).suffix != SUFFIX:
        raise ConfigError(
            f"cache={os.fspath(path)!r}: name the file of the decomposition *{SUFFIX}, as no checkpoint is"
        )


def decompose_once(
    matrices: Callable[[], Iterator[Tensor]], rank: Rank = None, path: str | os.PathLike[str] | None = None
) -> list[Factored]:
    """Return what `decompose` does, from the file where it is there and of these matrices, or else kept in it.

    Args:
        matrices: gives them anew at each call, [G, O, I] each.
        rank: see `decompose`.
        path: the file; None: none is read or written.

    Raises:
        ConfigError: the rank is none, or the file has a name that is for no cache.
        CheckpointError: the file cannot be written.
    """
    check_cache(path)
    if path is None:
        return decompose(matrices(), rank)
    key = of_values(_identity(matrices, rank))
    found = _read(path, key, [m.device for m in matrices()])
    if found is None:
        found = decompose(matrices(), rank)
        _write(path, key, found)
    return found


def _identity(matrices: Callable[[], Iterator[Tensor]], rank: Rank) -> Iterator[object]:
    yield FORMAT
    yield rank
    yield from matrices()


def _read(path: str | os.PathLike[str], key: str, devices: list[torch.device]) -> list[Factored] | None:
    """Return the factors in a file, on the devices of the matrices; None if it has not those of the key, whole."""
    try:
        kind, tensors, said = read(path)
    except CheckpointError:
        return None
    if kind != "safetensors" or said.get("key") != key:
        return None
    names = [_names(k) for k in range(len(devices))]
    if set(tensors) != {name for three in names for name in three}:
        return None
    if said.get("content") != of_values(tensors[name] for three in names for name in three):
        return None
    # Copies: what safetensors gives is the file's own memory, and changes with it.
    return [
        (tensors[u].to(device, copy=True), tensors[s].to(device, copy=True), tensors[v].to(device, copy=True))
        for (u, s, v), device in zip(names, devices)
    ]


def _write(path: str | os.PathLike[str], key: str, factored: list[Factored]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: t.cpu() for k, three in enumerate(factored) for name, t in zip(_names(k), three)}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"key": key, "content": of_values(tensors.values())})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(path)}: the decomposition cannot be kept: {reason(error)}") from None


def _names(k: int) -> tuple[str, str, str]:
    return f"{k}.u", f"{k}.sigma", f"{k}.v"
