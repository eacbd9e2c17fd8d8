"""Short names of a model's weights and of data, by which a broken run knows what it has done already."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import map_batch
from fastfip.nets.state import is_part

__all__ = ["Watched", "of_batches", "of_model", "of_values"]

_LENGTH = 16  # hexadecimal digits


def of_model(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on every value, name, shape and dtype of the state dict.

    Of a tensor of which each process has a part they depend on the name, shape and dtype: all processes get the same.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _feed(digest, value)
    return digest.hexdigest()[:_LENGTH]


def of_batches(batches: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that depend on every tensor in the batches, not on how they are cut into batches."""
    watched = Watched(batches)
    for _ in watched:
        pass
    return watched.digest


def of_values(values: Iterable[Any]) -> str:
    """Return 64 hexadecimal digits that depend on every value: tensors with shape and dtype, others as they print."""
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
        digest.update(b";")
    return digest.hexdigest()


class Watched:
    """Batches that are passed on as they are while their digest is taken; `digest` is that of the last whole walk."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.digest = ""

    def __iter__(self) -> Iterator[Any]:
        fields: dict[str, Any] = {}
        for batch in self.batches:
            map_batch(functools.partial(_add, fields), batch, path="")
            yield batch
        joined = "".join(f"{name}:{fields[name].hexdigest()};" for name in sorted(fields))
        self.digest = hashlib.sha256(joined.encode()).hexdigest()[:_LENGTH]


def _add(fields: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        _feed(fields.setdefault(name, hashlib.sha256()), value, header=False)


def _feed(digest: Any, value: Any, header: bool = True) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    if header:
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
    if is_part(value):
        return
    plain = value.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
