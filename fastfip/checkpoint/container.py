"""What kind of file a checkpoint is, and whether its container is sound, found out before torch reads it."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastfip.checkpoint.claims import MOST_SIDES
from fastfip.errors import CheckpointError, reason

__all__ = ["ZipRecord", "ZipRecords", "check_safetensors", "check_zip", "kind_of", "open_file", "read_json"]

#: First bytes of the files that torch.save wrote before torch 1.6: a pickle of this number.
_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_START = b"\x80\x02" + _NUMBER
#: The same in pickle protocols 3 to 5; a frame says how long it is.
_OTHER_STARTS = (b"\x80\x03" + _NUMBER, *(b"\x80" + bytes([p]) + b"\x95\x0d" + bytes(7) + _NUMBER for p in (4, 5)))

_FIRST_BYTES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 (Keras) file, not a PyTorch checkpoint"),
    (b"\x93NUMPY", "is a NumPy array, not a PyTorch checkpoint"),
    (b"GGUF", "is a GGUF file, not a PyTorch checkpoint"),
)
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
}  # fmt: skip


_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
#: A file may have this many entries, and one more for each further kilobyte.
_ENTRIES = 30_000
#: A JSON text may have this many bytes, and a 64th of what it describes: parsed it takes up to forty times as much.
_JSON = 2**20


@dataclass(frozen=True)
class ZipRecord:
    """Where the bytes of one entry of a zip lie in the file."""

    start: int
    size: int


@dataclass(frozen=True)
class ZipRecords:
    """The entries of a checked zip by name, the name of the folder that holds them all taken off."""

    records: dict[str, ZipRecord]

    def read(self, file: BinaryIO, name: str) -> bytes:
        """Return the bytes of an entry."""
        record = self.records[name]
        file.seek(record.start)
        return file.read(record.size)


def open_file(path: str | os.PathLike[str]) -> tuple[BinaryIO, int]:
    """Open a checkpoint for reading; return it with its size.

    Raises:
        CheckpointError: there is no such file, or it is a folder, empty, no plain file, or not readable.
    """
    where = Path(path)
    if where.is_dir():
        inside = sorted(p.name for p in where.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".tar"))
        hint = f", e.g. {inside[0]}" if inside else ""
        raise CheckpointError(f"is a folder: give the file itself{hint}")
    if not where.exists():
        raise CheckpointError("does not exist")
    if not where.is_file():
        raise CheckpointError("is not a plain file")
    try:
        file = open(where, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from None
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        file.close()
        raise CheckpointError("is empty")
    return file, size


def kind_of(file: BinaryIO, size: int, suffix: str) -> str:
    """Return "zip", "legacy", "safetensors" or "pickle" (one that torch.save did not write), by content, not by name.

    Raises:
        CheckpointError: it is something else, named as far as it can be told.
    """
    file.seek(0)
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith((LEGACY_START, *_OTHER_STARTS)):
        return "legacy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < max(size, 1 << 32):
        return "safetensors"
    for start, what in _FIRST_BYTES:
        if head.startswith(start):
            raise CheckpointError(what)
    if LEGACY_START.startswith(head):
        raise CheckpointError("is truncated: perhaps a download or a copy was interrupted")
    if head[257:262] == b"ustar":
        raise CheckpointError("is a tar archive: unpack it, and give the checkpoint in it")
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return "pickle"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        raise CheckpointError("is an HTML or XML page, not a checkpoint: the download got a page instead of the file")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        what = "JSON" if text[:1] in (b"{", b"[") else "text"
        raise CheckpointError(f"is a {what} file, not a checkpoint")
    if suffix == ".safetensors":
        return "safetensors"
    raise CheckpointError("is not a checkpoint: it is neither safetensors nor a file written by torch.save")


def check_zip(file: BinaryIO, size: int) -> ZipRecords:
    """Check the zip of torch.save: entries stored as they are, inside the file, apart from each other, named once.

    Raises:
        CheckpointError: it is truncated, TorchScript, or not as torch.save writes it.
    """
    directory = _directory_start(file, size)
    file.seek(directory)
    if file.read().count(b"PK\x01\x02") > _ENTRIES + size // 1024:
        raise CheckpointError("is a zip with far more entries than a file of this size can have tensors")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"is truncated or damaged: {error}") from None
    infos = archive.infolist()
    names = [info.filename for info in infos]
    bare = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in bare or any(name.startswith("code/") for name in bare):
        raise CheckpointError(
            "is a TorchScript archive, which holds code: "
            "load it with torch.jit.load if you trust it, and save torch.save(module.state_dict(), ...)"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError("is a NumPy archive (.npz), not a PyTorch checkpoint")
    if len({name.casefold() for name in names}) != len(names):
        raise CheckpointError("is a zip with two entries of the same name, which torch.save never writes")
    root = names[0].split("/", 1)[0] + "/" if names else ""
    if f"{root}data.pkl" not in names:
        raise CheckpointError("is a zip archive that torch.save did not write: it has no data.pkl")
    if not all(name.startswith(root) for name in names):
        raise CheckpointError(f"is a zip with entries outside {root}, which torch.save never writes")
    if getattr(archive, "start_dir", directory) != directory:
        raise CheckpointError("is a zip with bytes before its first entry, which torch.save never writes")
    records = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            how = "encrypted" if info.flag_bits & 1 else "compressed"
            raise CheckpointError(f"is a zip whose entry {name} is {how}; torch.save stores entries as they are")
        if info.file_size != info.compress_size or info.file_size > size:
            raise CheckpointError(
                f"is a zip whose entry {name} claims to expand from {info.compress_size} to {info.file_size} bytes"
            )
        if info.header_offset < end:
            raise CheckpointError(f"is a zip whose entry {name} overlaps another one")
        start = _data_start(file, info, directory)
        end = start + info.file_size
        if end > directory:
            raise CheckpointError(f"is a zip whose entry {name} runs beyond the data of the file")
        records[name[len(root) :]] = ZipRecord(start, info.file_size)
    return ZipRecords(records)


def _directory_start(file: BinaryIO, size: int) -> int:
    """Return where the central directory starts, by the record that must end the file."""
    broken = CheckpointError(
        "is truncated or damaged: it does not end as a zip must (perhaps a download was interrupted)"
    )
    if size < 22:
        raise broken
    end = size - 22
    file.seek(end)
    signature, *_, length, start, comment = struct.unpack("<4s4H2LH", file.read(22))
    if signature != b"PK\x05\x06" or comment:
        raise broken
    if end >= 20 + 56:
        file.seek(end - 20)
        signature, _, end64, _ = struct.unpack("<4sLQL", file.read(20))
        if signature == b"PK\x06\x07":
            if end64 > end - 20 - 56:
                raise broken
            file.seek(end64)
            signature, *_, length, start = struct.unpack("<4sQ2H2L4Q", file.read(56))
            if signature != b"PK\x06\x06":
                raise broken
            end = end64
    if start + length != end:
        raise broken
    return start


def _data_start(file: BinaryIO, info: zipfile.ZipInfo, directory: int) -> int:
    """Return where the data of an entry start, by its local header, which must say what the directory says."""
    differs = CheckpointError(f"is a zip whose entry {info.filename} has two headers that differ")
    if info.header_offset + 30 > directory:
        raise differs
    file.seek(info.header_offset)
    fields = struct.unpack("<4s5H3L2H", file.read(30))
    signature, _, flags, method, _, _, _, packed, full, n_name, n_extra = fields
    name = file.read(n_name)
    sizes = {0xFFFFFFFF, info.file_size} | ({0} if flags & 8 else set())
    if signature != b"PK\x03\x04" or method != info.compress_type or flags & 1 or not {packed, full} <= sizes:
        raise differs
    if name.decode("utf-8" if flags & 0x800 else "cp437", "replace") != info.orig_filename:
        raise differs
    return info.header_offset + 30 + n_name + n_extra


def check_safetensors(file: BinaryIO, size: int) -> dict[str, str]:
    """Check the header of a safetensors file against its size; return its metadata.

    Raises:
        CheckpointError: the header or a tensor reaches beyond the file, sizes and shapes disagree, or it is no header.
    """
    file.seek(0)
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        raise CheckpointError(
            f"is not a safetensors file, or is truncated: its header claims {length} bytes, the file "
            f"has {max(size - 8, 0)}"
        )
    if length > _JSON + size // 64:
        raise CheckpointError(
            f"is refused: its header takes {length} of {size} bytes, which is more than a safetensors file needs"
        )
    header = read_json(file.read(length), "is no safetensors file: its header")
    metadata = header.pop("__metadata__", None) or {}
    room = size - 8 - length
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(shape, list) or len(shape) > MOST_SIDES or not isinstance(dtype, str):
                raise TypeError
            sound = all(type(v) is int and 0 <= v < 2**63 for v in (*shape, start, end)) and start <= end
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(f"is a safetensors file with a damaged entry for {name}") from None
        if dtype in _PACKED:
            raise CheckpointError(
                f"holds {name} in the packed dtype {dtype}, with which torch cannot compute: unpack it"
            )
        if dtype not in _DTYPE_BITS:
            raise CheckpointError(f"is a safetensors file with an unknown dtype {dtype!r} for {name}")
        if not sound or end > room:
            raise CheckpointError(
                f"is truncated or damaged: {name} lies at bytes {start} to {end} of {room} bytes of data"
            )
        if math.prod(shape) * _DTYPE_BITS[dtype] != 8 * (end - start):
            raise CheckpointError(f"is damaged: {name} claims {dtype} {shape} and stores {end - start} bytes")
        spans.append((start, end, name))
    spans.sort()
    for (_, end, _), (start, _, name) in zip(spans, spans[1:]):
        if start < end:
            raise CheckpointError(f"is damaged: {name} overlaps another tensor")
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that a JSON text holds; `what` begins the errors.

    Raises:
        CheckpointError: it is none, or is nested too deep, or has a name twice.
    """
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{what} cannot be read ({reason(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names
