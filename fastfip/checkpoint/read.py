"""Read a checkpoint file: follow what it would do, compare what it claims with what it holds, then let torch read."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from fastfip.checkpoint.claims import Claim
from fastfip.checkpoint.container import ZipRecords, check_safetensors, check_zip, kind_of, open_file
from fastfip.checkpoint.scan import Scan, scan
from fastfip.errors import CheckpointError

__all__ = ["find_path", "read"]

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def read(path: str | os.PathLike[str]) -> tuple[str, Any, dict[str, str]]:
    """Return the format of a checkpoint ("zip", "legacy" or "safetensors"), what it holds, and safetensors metadata.

    Raises:
        CheckpointError: it is refused; the text says why, without the name of the file.
    """
    file, size = open_file(path)
    with file:
        kind = kind_of(file, size, Path(path).suffix.lower())
        if kind == "safetensors":
            metadata = check_safetensors(file, size)
            return kind, _load_safetensors(path), metadata
        if kind == "zip":
            scanned = _check_zip_claims(file, check_zip(file, size))
        elif kind == "legacy":
            scanned = _check_legacy_claims(file, size)
        else:
            _refuse_plain_pickle(file)
        return kind, _load(file, scanned), {}


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(os.fspath(path), device="cpu")
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"is damaged, or this safetensors cannot read it: {_first_line(error)}") from None


def _check_zip_claims(file: BinaryIO, archive: ZipRecords) -> Scan:
    if "byteorder" in archive.records and archive.read(file, "byteorder") not in (b"little", b"big"):
        raise CheckpointError("is damaged: its byte order is neither little nor big")
    scanned = scan(io.BytesIO(archive.read(file, "data.pkl")))
    scanned.refuse()
    _refuse_what_is_no_dict(scanned.root)
    for key, storage in scanned.storages.items():
        record = archive.records.get(f"data/{key}")
        claimed = storage.numel * storage.width
        stored = record.size if record else 0
        if claimed != stored:
            raise CheckpointError(f"claims {claimed} bytes for {_users(scanned, key)} and stores {stored}")
    _check_tensors(scanned)
    return scanned


def _check_legacy_claims(file: BinaryIO, size: int) -> Scan:
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
    for key in keys:
        storage = scanned.storages[str(key)]
        file.seek(position)
        stored = int.from_bytes(file.read(8), "little")
        if stored != storage.numel and position + 8 <= size:
            raise CheckpointError(f"claims {storage.numel} values for {_users(scanned, str(key))} and stores {stored}")
        position += 8 + storage.numel * storage.width
        if position > size:
            raise CheckpointError(
                f"is truncated: it ends {position - size} bytes before {_users(scanned, str(key))} does"
            )
    return scanned


def _refuse_plain_pickle(file: BinaryIO) -> NoReturn:
    file.seek(0)
    scanned = scan(file)
    if not scanned.modules and set(scanned.foreign) <= {"torch.storage._load_from_bytes"}:
        _refuse_what_is_no_dict(scanned.root)
        raise CheckpointError(
            "is a pickle that torch.save did not write: where you trust it, load it, then torch.save(state_dict, path)"
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
        what = {"NoneType": "nothing (None)", "int": "an int", "Opaque": "an object"}.get(name, f"a {name.lower()}")
    raise CheckpointError(f"holds {what}, not a state dict")


def _check_tensors(scanned: Scan) -> None:
    for tensor in scanned.tensors:
        if not isinstance(tensor, Claim):
            raise CheckpointError(
                f"{_tensor_name(scanned, tensor)} is {tensor.what}: save a plain dense tensor instead"
            )
        fault = tensor.fault()
        if fault:
            raise CheckpointError(f"{_tensor_name(scanned, tensor)} {fault}")


def _tensor_name(scanned: Scan, tensor: Any) -> str:
    path = find_path(scanned.root, lambda value: value is tensor)
    return ".".join(path) if path else "a tensor"


def _users(scanned: Scan, key: str) -> str:
    """Return the name of a tensor that lies in a storage."""
    path = find_path(scanned.root, lambda value: isinstance(value, Claim) and value.storage.key == key)
    return ".".join(path) if path else f"storage {key}"


def find_path(root: Any, wanted: Any) -> tuple[str, ...] | None:
    """Return the keys that lead to the first value for which `wanted` is true; every container is entered once."""
    todo: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    seen = set()
    while todo:
        value, path = todo.pop()
        if wanted(value):
            return path
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            todo += [(item, (*path, str(name))) for name, item in reversed(items)]
    return None


def _load(file: BinaryIO, scanned: Scan) -> Any:
    file.seek(0)
    try:
        with _numpy_allowed(scanned):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # whatever a damaged file makes of torch's reader, the file is what is wrong
        raise CheckpointError(f"is damaged, or this torch cannot read it: {_first_line(error)}") from None


@contextlib.contextmanager
def _numpy_allowed(scanned: Scan) -> Iterator[None]:
    """Let torch's restricted unpickler build the plain NumPy values that were found, and nothing else."""
    if not scanned.numpy:
        yield
        return
    import numpy as np

    kinds = {type(np.dtype(code)) for code in scanned.numpy_dtypes}
    wanted: list[Any] = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
    for name in scanned.numpy:
        module, _, attribute = name.rpartition(".")
        if module == "numpy.core.multiarray" and np.lib.NumpyVersion(np.__version__) >= "2.0.0b1":
            module = "numpy._core.multiarray"  # the file keeps the name that NumPy 1 used
        wanted.append((getattr(importlib.import_module(module), attribute), name))
    already = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([entry for entry in wanted if entry not in already]):
        yield


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
