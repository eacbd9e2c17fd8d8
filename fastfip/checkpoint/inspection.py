"""What a checkpoint file holds, told without running or loading any of it, also where the file is refused."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from fastfip.checkpoint.claims import Claim, Odd, Opaque
from fastfip.checkpoint.container import check_zip, kind_of, open_file
from fastfip.checkpoint.load import Checkpoint, load_checkpoint
from fastfip.checkpoint.scan import scan
from fastfip.errors import CheckpointError, printable
from fastfip.reporting.table import Report, Sheet

__all__ = ["FileContents", "StoredTensor", "fitting", "inspect_file"]

_FORMATS = {
    "zip": "torch.save, zip",
    "legacy": "torch.save before torch 1.6",
    "safetensors": "safetensors",
    "pickle": "a pickle that torch.save did not write",
}
_DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: What nn.Module keeps its parts under: left out of the names of tensors in a pickled module.
_MODULE_PARTS = ("_modules", "_parameters", "_buffers")
_HEADER = 2**25  # bytes of a safetensors header that are looked at
_DEEPEST = 64
_ROWS = 40


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file by its full name there: shape, dtype ("?" where it cannot be told)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class FileContents(Report):
    """What a file holds.

    Attributes:
        path: the file. bytes, sha256: of the whole of it. format: what kind of file.
        refused: why `load_checkpoint` does not read it; None: it does.
        key: the entry with the weights ("" for the file itself). prefix: what every name of them begins with.
        tensors: all that the file describes, those beside the weights too.
        weights: names of those that are the weights, under the names that a model would have.
        state_dicts: entries that could be weights, with their number of tensors.
        beside: plain data beside the weights. left_out: entries that are not carried over, with the reason.
        metadata: of a safetensors file. code: what loading the file without care would call.
    """

    path: str
    bytes: int
    sha256: str
    format: str
    refused: str | None = None
    key: str = ""
    prefix: str = ""
    tensors: list[StoredTensor] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    state_dicts: dict[str, int] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)

    @property
    def guesses(self) -> dict[str, int]:
        """Return what the shapes suggest: "classes" (rows of the last matrix), "channels" (of the first kernel)."""
        mine = [t for t in self.tensors if t.name.startswith(self.key)] or self.tensors
        matrices = [t.shape[0] for t in mine if len(t.shape) == 2]
        kernels = [t.shape[1] for t in mine if len(t.shape) == 4]
        out = {"classes": matrices[-1]} if matrices else {}
        return out | ({"channels": kernels[0]} if kernels and kernels[0] in (1, 3) else {})

    def facts(self) -> list[tuple[str, str]]:
        """Return what is printed above the table of tensors: names and values."""
        rows = [("format", self.format), ("size", f"{self.bytes:,} bytes"), ("sha256", self.sha256)]
        if self.refused is not None:
            rows.append(("loadable", f"no: it {self.refused}"))
        else:
            where = f"under {self.key!r}, " if self.key else ""
            rows.append(("loadable", f"yes: {where}a state dict of {len(self.weights)} entries"))
        rows += [("prefix", f"{self.prefix!r}, taken off where the model has none")] if self.prefix else []
        values = sum(math.prod(t.shape) for t in self.tensors)
        dtypes = ", ".join(sorted({t.dtype for t in self.tensors})) or "none"
        rows.append(("tensors", f"{len(self.tensors)} with {values:,} values: {dtypes}"))
        if len(self.state_dicts) > 1:
            many = ", ".join(f"{name} ({count})" for name, count in self.state_dicts.items())
            rows.append(("state dicts", f"{many}: --key NAME takes another one"))
        rows += [(f"beside: {name}", _short(value)) for name, value in self.beside.items()]
        rows += [(f"left out: {name}", why) for name, why in self.left_out.items()]
        rows += [(f"metadata: {name}", _short(value)) for name, value in self.metadata.items()]
        rows += [("would call", ", ".join(self.code[:8]))] if self.code else []
        if self.guesses:
            words = {"classes": "{} classes (rows of the last matrix)", "channels": "images of {} channels"}
            rows.append(("looks like", ", ".join(words[name].format(n) for name, n in self.guesses.items())))
        return [(printable(name), printable(value)) for name, value in rows]

    def table(self) -> Sheet:
        """Return the tensors as a table, what else is known above it."""
        facts = self.facts()
        width = max(len(name) for name, _ in facts)
        title = "\n".join([printable(self.path), *(f"  {name.ljust(width)}  {value}" for name, value in facts)])
        rows = [(printable(t.name), "x".join(map(str, t.shape)) or "1", t.dtype) for t in self.tensors[:_ROWS]]
        more = len(self.tensors) - _ROWS
        names = ("tensor", "shape", "dtype") if rows else ("", "", "")
        return Sheet(title, names, rows, [f"... and {more} more (--json)"] if more > 0 else [])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "guesses": self.guesses}


def inspect_file(path: str | os.PathLike[str], key: str | None = None) -> FileContents:
    """Say what a checkpoint file holds. Nothing in it is run; a file that is refused is described as far as it goes.

    Args:
        path: the file.
        key: the entry with the weights, as for `load_checkpoint`.

    Raises:
        CheckpointError: there is no such file, it is empty, or it is no plain file.
    """
    where = os.fspath(path)
    try:
        file, size = open_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    with file:
        out = FileContents(where, size, _sha256(file), "unknown")
        try:
            kind = kind_of(file, size, Path(where).suffix.lower())
            out.format = _FORMATS[kind]
            root = _described(file, size, kind, out)
        except CheckpointError as error:
            out.refused, root = str(error), None
    out.tensors = list(_tensors(root))
    out.state_dicts = dict(_state_dicts(root))
    try:
        _take(out, load_checkpoint(path, key=key), root)
    except CheckpointError as error:
        out.refused = str(error).removeprefix(f"{where}: ")
    return out


def fitting(path: str | os.PathLike[str], model: nn.Module, contents: FileContents, key: str | None = None) -> str:
    """Load a file into a model, trying every state dict in it where `key` is None; return the entry that fits.

    Raises:
        CheckpointError: none fits, by what `load_checkpoint` says of the first.
    """
    try:
        return ".".join(load_checkpoint(path, model, key=key).nesting)
    except CheckpointError:
        for other in contents.state_dicts if key is None else ():
            try:
                if other != contents.key:
                    load_checkpoint(path, model, key=other)
                    return other
            except CheckpointError:
                continue
        raise


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def _described(file: BinaryIO, size: int, kind: str, out: FileContents) -> Any:
    """Return what the file describes, on stand-ins; what it would call is noted in `out`."""
    if kind == "safetensors":
        return _header(file, size)
    if kind == "zip":
        scanned = scan(io.BytesIO(check_zip(file, size).read(file, "data.pkl")))
    else:
        file.seek(0)
        for _ in range(3 if kind == "legacy" else 0):
            scan(file)
        scanned = scan(file)
    out.code = [*scanned.modules, *(name for name in scanned.foreign if name not in scanned.modules)]
    return scanned.root


def _header(file: BinaryIO, size: int) -> dict[str, StoredTensor]:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _HEADER):
        return {}
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        return {}
    out = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) <= _DEEPEST and all(type(v) is int and abs(v) < 2**63 for v in shape):
            dtype = str(entry.get("dtype"))
            out[name] = StoredTensor(name, tuple(shape), _DTYPES.get(dtype, dtype[:20]))
    return out


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Opaque):
        value = value.state
    if isinstance(value, dict):
        yield from ((str(name)[:200], item) for name, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), item) for i, item in enumerate(value))


def _tensors(root: Any) -> Iterator[StoredTensor]:
    """Walk to every tensor; each container is entered once, by the way that comes first."""
    todo: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    seen: set[int] = set()
    while todo:
        value, path = todo.pop()
        name = ".".join(part for part in path if part not in _MODULE_PARTS)
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, Claim):
            yield StoredTensor(name, value.size, _DTYPES.get(value.storage.kind, "?"))
        elif isinstance(value, Odd):
            yield StoredTensor(name, (), f"({value.what})")
        elif isinstance(value, (dict, list, tuple, Opaque)) and id(value) not in seen and len(path) < _DEEPEST:
            seen.add(id(value))
            todo += [(item, (*path, key)) for key, item in reversed(list(_children(value)))]


def _state_dicts(root: Any) -> Iterator[tuple[str, int]]:
    """Walk to the dicts that name tensors, three levels deep."""
    level = [("", root)]
    for _ in range(4):
        below = []
        for path, value in level:
            if not isinstance(value, dict):
                continue
            count = sum(isinstance(item, (Claim, StoredTensor)) for item in value.values())
            if count and not all(type(name) is int for name in value):
                yield path, count
            names = [(f"{path}.{name}" if path else name, v) for name, v in value.items() if isinstance(name, str)]
            below += names
        level = below


def _take(out: FileContents, weights: Checkpoint, root: Any) -> None:
    out.key, out.prefix = ".".join(weights.nesting), weights.prefix
    out.weights, out.beside, out.metadata = list(weights), _beside(weights), dict(weights.metadata)
    known = {f"{out.key}.{theirs}" if out.key else theirs: weights[name] for name, theirs in weights.names.items()}
    dtypes = {name: str(getattr(value, "dtype", "?")).removeprefix("torch.") for name, value in known.items()}
    out.tensors = [StoredTensor(t.name, t.shape, dtypes.get(t.name, t.dtype)) for t in out.tensors]
    for name in weights.left_out:
        out.left_out[str(name)] = _why_left_out(str(name), root)


def _beside(weights: Checkpoint) -> dict[str, Any]:
    """Return the plain data beside the weights by dotted names, without the places of the weights."""
    out: dict[str, Any] = {}
    level, path = weights.extras, ""
    for depth, part in enumerate(weights.nesting):
        out |= {f"{path}{name}": value for name, value in level.items() if name != part}
        if depth + 1 < len(weights.nesting):
            level, path = level[part], f"{path}{part}."
    return out


def _why_left_out(name: str, root: Any) -> str:
    value: Any = root
    for part in name.split("."):
        value = dict(_children(value)).get(part)
    count = sum(1 for _ in _tensors(value))
    if "optim" in name.lower() or (isinstance(value, Mapping) and "param_groups" in value):
        return "state of an optimiser, which belongs to the old weights"
    if count:
        return f"{count} other tensors, which would bring the old weights back"
    return "not plain data (numbers, text, lists and dicts of them)"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
