"""Checkpoints in several files: a folder of Hugging Face, or the index that says which file has which weight."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastfip.checkpoint.container import open_file, read_json
from fastfip.errors import CheckpointError, printable

__all__ = ["index_of", "read_shards"]

#: What a folder of Hugging Face has, in the order in which it is looked for; the first two name shards. The last one is
#: what a run of BackdoorBench leaves.
_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "attack_result.pt",
)
#: An index has about a hundred bytes a weight; more than this many are none.
_MOST_BYTES = 3 * 2**19
_MOST_SHARDS = 1000
_PLAIN_NAME = re.compile(r"(?!\.\.?$)[^/\\\0\n]+")


def index_of(path: str | os.PathLike[str]) -> Path:
    """Return the file to read: the one that a folder is read by, else the path itself."""
    where = Path(path)
    if where.is_dir():
        return next((where / name for name in _FILES if (where / name).is_file()), where)
    return where


def read_shards(
    index: Path, read: Callable[[Path], tuple[str, Any, dict[str, str]]]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return format, weights and metadata of all the files that an index names, which lie beside it.

    Args:
        index: a JSON file with a `weight_map`: the file of each weight.
        read: reads one of them.

    Raises:
        CheckpointError: it is no index, a file is missing, lies elsewhere, is refused, or holds something else.
    """
    file, _ = open_file(index)
    with file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise CheckpointError("is not an index of shards: it is far too long")
    places = read_json(text, "is a JSON file, and as an index of shards it").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError("is a JSON file, not a checkpoint: an index of shards has a weight_map")
    files: dict[str, set[str]] = {}
    for name, file_name in places.items():
        if not isinstance(file_name, str) or not _PLAIN_NAME.fullmatch(file_name):
            shown = file_name if isinstance(file_name, str) else f"a {type(file_name).__name__}"
            raise CheckpointError(f"names a file for {name} that does not lie beside it ({printable(shown, 100)})")
        files.setdefault(file_name, set()).add(name)
    if len(files) > _MOST_SHARDS:
        raise CheckpointError(f"names {len(files)} files, more than any checkpoint has")
    out: dict[str, Any] = {}
    form = ""
    metadata: dict[str, str] = {}
    for file_name, wanted in files.items():
        if Path(file_name).suffix == ".json":
            raise CheckpointError(f"names another index ({printable(file_name, 100)}), not a file of weights")
        try:
            form, held, metadata = read(index.with_name(file_name))
        except CheckpointError as error:
            raise CheckpointError(f"its file {printable(file_name, 100)} {error}") from None
        if set(held) != wanted:
            odd = sorted(map(str, set(held) ^ wanted))[0]
            side = "holds" if odd in held else "lacks"
            raise CheckpointError(f"does not agree with its file {printable(file_name, 100)}, which {side} {odd}")
        out.update(held)
    return form, {name: out[name] for name in places}, metadata
