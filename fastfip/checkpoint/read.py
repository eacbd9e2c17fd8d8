"""Read a checkpoint file: follow what it would do, compare what it claims with what it holds, then build it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from fastfip.checkpoint.build import build
from fastfip.checkpoint.calls import shown
from fastfip.checkpoint.claims import Claim
from fastfip.checkpoint.container import ZipRecords, check_safetensors, check_zip, kind_of, open_file
from fastfip.checkpoint.scan import Scan, scan
from fastfip.checkpoint.shards import index_of, read_shards
from fastfip.errors import CheckpointError, reason

__all__ = ["find_path", "follow", "read"]

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
#: How often the values of a file may occur in tensors that overlap: a hundred of one block would be a way to take time.
_MOST_VIEWS = 16


def read(path: str | os.PathLike[str]) -> tuple[str, Any, dict[str, str]]:
    """Return the format of a checkpoint ("zip", "legacy" or "safetensors"), what it holds, and safetensors metadata.

    Raises:
        CheckpointError: it is refused; the text says why, without the name of the file.
    """
    with _one_line():
        where = index_of(path)
        return read_shards(where, _read) if where.name.endswith(".index.json") else _read(where)


def follow(path: str | os.PathLike[str]) -> Any:
    """Return what a file of torch.save holds, all of it checked as by `read`, with stand-ins for what is no plain data.

    A tensor is the claim that is made of it, an array its description, a picture the state that it would be given.

    Returns:
        a dict; None for a file of another format.

    Raises:
        CheckpointError: it is refused; the text says why, without the name of the file.
    """
    with _one_line():
        where = index_of(path)
        if where.is_dir() or where.suffix == ".json":
            return None
        file, size = open_file(where)
        with file:
            kind = kind_of(file, size, where.suffix.lower())
            if kind not in ("zip", "legacy"):
                return None
            return _checked(file, size, kind)[0].root


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Make refusals of what a file makes of this process."""
    try:
        yield
    except MemoryError:
        raise CheckpointError("needs more memory than there is") from None
    except RecursionError:
        raise CheckpointError("is refused: what it holds is nested too deep") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or reason(error)}") from None


def _read(path: str | os.PathLike[str]) -> tuple[str, Any, dict[str, str]]:
    file, size = open_file(path)
    with file:
        kind = kind_of(file, size, Path(path).suffix.lower())
        if kind == "safetensors":
            metadata = check_safetensors(file, size)
            return kind, _load_safetensors(path), metadata
        if kind == "pickle":
            _refuse_plain_pickle(file)
        return kind, build(file, *_checked(file, size, kind)), {}


def _checked(file: BinaryIO, size: int, kind: str) -> tuple[Scan, dict[str, int], bool]:
    """Return what a file of torch.save describes, where its blocks begin, and whether they are big-endian."""
    if kind == "legacy":
        return *_check_legacy_claims(file, size), False  # torch always wrote them so
    archive = check_zip(file, size)
    scanned, starts = _check_zip_claims(file, archive)
    return scanned, starts, "byteorder" in archive.records and archive.read(file, "byteorder") == b"big"


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(os.fspath(path), device="cpu")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"is damaged, or this safetensors cannot read it: {reason(error)}") from None


def _check_zip_claims(file: BinaryIO, archive: ZipRecords) -> tuple[Scan, dict[str, int]]:
    order = archive.records.get("byteorder")
    if order is not None and (order.size > 6 or archive.read(file, "byteorder") not in (b"little", b"big")):
        raise CheckpointError("is damaged: its byte order is neither little nor big")
    pickled = archive.records["data.pkl"]
    file.seek(pickled.start)
    scanned = scan(file, pickled.size)
    scanned.refuse()
    _refuse_what_is_no_dict(scanned.root)
    starts = {}
    for key, storage in scanned.storages.items():
        record = archive.records.get(f"data/{key}")
        claimed = storage.numel * storage.width
        stored = record.size if record else 0
        if claimed != stored:
            raise CheckpointError(f"claims {claimed} bytes for {_users(scanned, key)} and stores {stored}")
        if record is not None:
            starts[key] = record.start
    _check_tensors(scanned)
    return scanned, starts


def _check_legacy_claims(file: BinaryIO, size: int) -> tuple[Scan, dict[str, int]]:
    file.seek(0)
    magic, version, _ = (scan(file).root for _ in range(3))
    if magic != _MAGIC or version != _LEGACY_VERSION:
        raise CheckpointError(f"is damaged, or of an unknown version ({version if type(version) is int else '?'})")
    scanned = scan(file)
    scanned.refuse()
    _refuse_what_is_no_dict(scanned.root)
    _check_tensors(scanned)
    keys = scan(file).root
    if not isinstance(keys, list) or {str(k) for k in keys if isinstance(k, (str, int))} != set(scanned.storages):
        raise CheckpointError("is damaged: the blocks that it stores are not those that its tensors need")
    position = file.tell()
    starts: dict[str, int] = {}
    for key in map(str, keys):
        storage = scanned.storages.get(key)
        if storage is None or key in starts:
            raise CheckpointError("is damaged: the blocks that it stores are not those that its tensors need")
        file.seek(position)
        stored = int.from_bytes(file.read(8), "little")
        if stored != storage.numel and position + 8 <= size:
            raise CheckpointError(f"claims {storage.numel} values for {_users(scanned, key)} and stores {stored}")
        starts[key] = position + 8
        position += 8 + storage.numel * storage.width
        if position > size:
            raise CheckpointError(f"is truncated: it ends {position - size} bytes before {_users(scanned, key)} does")
    return scanned, starts


def _refuse_plain_pickle(file: BinaryIO) -> NoReturn:
    file.seek(0)
    scanned = scan(file)
    if not scanned.modules and set(scanned.foreign) <= {"torch.storage._load_from_bytes"}:
        _refuse_what_is_no_dict(scanned.root)
        raise CheckpointError(
            "is a pickle that torch.save did not write: if you trust it, load it, then torch.save(state_dict, path)"
        )
    scanned.refuse()
    raise CheckpointError("is a pickle that torch.save did not write")


def _refuse_what_is_no_dict(root: Any) -> None:
    if isinstance(root, dict):
        return
    if isinstance(root, Claim):
        what = "a single tensor"
    else:
        name = type(root).__name__
        what = {"NoneType": "nothing (None)", "int": "an int", "Opaque": "an object", "NumpyArray": "an array"}.get(
            name, f"a {name.lower()}"
        )
    raise CheckpointError(f"holds {what}, not a state dict")


def _check_tensors(scanned: Scan) -> None:
    claimed = 0
    seen = set()
    for tensor in scanned.tensors:
        if not isinstance(tensor, Claim):
            raise CheckpointError(
                f"{_tensor_name(scanned, tensor)} is {tensor.what}: save a plain dense tensor instead"
            )
        fault = tensor.fault()
        if fault:
            raise CheckpointError(f"{_tensor_name(scanned, tensor)} {fault}")
        if tensor not in seen:  # tied weights are looked at once
            seen.add(tensor)
            claimed += tensor.claimed()
    stored = sum(storage.numel * storage.width for storage in scanned.storages.values())
    if claimed > _MOST_VIEWS * stored + 2**20:
        raise CheckpointError(
            f"is refused: its tensors claim {claimed} bytes of {stored}, many views of the same values: "
            "save a clone of each"
        )


def _tensor_name(scanned: Scan, tensor: Any) -> str:
    path = find_path(scanned.root, lambda value: value is tensor)
    return ".".join(path) if path else "a tensor"


def _users(scanned: Scan, key: str) -> str:
    """Return the name of a tensor that lies in a storage."""
    path = find_path(scanned.root, lambda value: isinstance(value, Claim) and value.storage.key == key)
    return ".".join(path) if path else f"storage {key}"


def find_path(root: Any, wanted: Any) -> tuple[str, ...] | None:
    """Return the keys that lead to the first value for which `wanted` is true; every container is entered once."""
    if wanted(root):
        return ()
    levels, seen = [_items(root)], {id(root)}
    names: list[Any] = [None]
    while levels:
        for name, value in levels[-1]:  # goes on where it was: a long list is not copied
            if wanted(value):
                return tuple(shown(part) for part in (*names[1:], name))
            if isinstance(value, (dict, list, tuple)) and value and id(value) not in seen:
                seen.add(id(value))
                levels.append(_items(value))
                names.append(name)
                break
        else:
            levels.pop()
            names.pop()
    return None


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        return iter(value.items())
    return enumerate(value) if isinstance(value, (list, tuple)) else iter(())
