"""Read arrays of an .npz that nobody trusts: what headers claim is compared with what is stored before it is read."""

from __future__ import annotations

import ast
import math
import os
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastfip.errors import DataError, printable, reason

__all__ = ["Npz", "listed"]

#: A directory of more bytes has many thousands of entries.
_DIRECTORY = 2**20
#: A header of more bytes is none of NumPy's.
_HEADER = 2**14
#: An array of more bytes must not be this many times as long as what is stored of it.
_LARGE, _EXPANSION = 2**26, 50
_MOST_SIDES = 32


class Npz:
    """The arrays of an .npz file by name; each is read when it is asked for.

    Attributes:
        names: of the arrays.
    """

    def __init__(self, path: Path) -> None:
        """Read the directory of the file.

        Raises:
            DataError: there is none, or it is no .npz.
        """
        if not path.is_file():
            raise DataError(f"{path}: is not a plain file")
        self.path = path
        try:
            with open(path, "rb") as file:
                _check_ends(file)
                self._entries = {
                    info.filename.removesuffix(".npy"): info
                    for info in zipfile.ZipFile(file).infolist()
                    if info.filename.endswith(".npy")
                }
        except (OSError, ValueError, OverflowError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from None
        self.names = list(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array, in the byte order of this machine.

        Raises:
            DataError: it is damaged, holds objects, claims more than is stored, or expands to many times its size.
        """
        info = self._entries[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            how = "encrypted" if info.flag_bits & 1 else "compressed in a way that NumPy does not write"
            raise DataError(f"{self.path}: {printable(name, 100)} is {how}")
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as entry:
                shape, dtype, fortran, start = _header(entry)  # type: ignore[arg-type]
                size = math.prod(shape) * dtype.itemsize
                if size + start != info.file_size:
                    raise ValueError(f"claims {size} bytes and stores {info.file_size - start}")
                if size > max(_LARGE, _EXPANSION * info.compress_size):
                    raise ValueError(
                        f"expands from {info.compress_size} to {size} bytes: if that is intended, "
                        "write it with np.savez instead of np.savez_compressed"
                    )
                flat = np.frombuffer(_exactly(entry, size), dtype)  # type: ignore[arg-type]
        except MemoryError:
            raise DataError(f"{self.path}: {printable(name, 100)} needs more memory than there is") from None
        except Exception as error:  # zlib, zipfile and the parser of Python each have errors of their own
            raise DataError(f"{self.path}: {printable(name, 100)} cannot be read: {reason(error)}") from None
        if not dtype.isnative:
            flat = flat.byteswap(inplace=True).view(dtype.newbyteorder("="))
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _check_ends(file: BinaryIO) -> None:
    """Look at the first bytes of a zip and at the record that ends it, which tells how long its directory is."""
    start = file.read(6)
    if start == b"\x93NUMPY":
        raise ValueError("it is one array (.npy): write images and labels with np.savez(path, x=..., y=...)")
    size = file.seek(0, os.SEEK_END)
    if not start.startswith(b"PK") or size < 22:
        raise ValueError("it is not an .npz file")
    file.seek(size - 22)
    signature, *_, length, _, comment = struct.unpack("<4s4H2LH", file.read(22))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("it does not end as an .npz must (perhaps a download was interrupted)")
    if length == 0xFFFFFFFF:
        file.seek(max(size - 22 - 20 - 16, 0))
        length = int.from_bytes(file.read(8), "little")
    if length > _DIRECTORY:
        raise ValueError("it has far more entries than arrays of images and labels")
    file.seek(0)


def _header(entry: BinaryIO) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Return shape, dtype and order of an array, and where its values begin."""
    magic = _exactly(entry, 8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it is not an array")
    field = 2 if magic[6] == 1 else 4
    length = int.from_bytes(_exactly(entry, field), "little")
    if length > _HEADER:
        raise ValueError(f"its header claims {length} bytes")
    try:
        header = ast.literal_eval(_exactly(entry, length).decode("latin1").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (MemoryError, RecursionError):
        raise ValueError("its header is nested too deep") from None
    except (SyntaxError, ValueError, TypeError, KeyError):
        raise ValueError("its header is damaged") from None
    if not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?[biufcSUmM]\d{1,6}(\[\w{1,8}\])?", descr):
        raise ValueError("it holds objects or records, not numbers")
    if not isinstance(shape, tuple) or len(shape) > _MOST_SIDES or not isinstance(fortran, bool):
        raise ValueError("its header is damaged")
    if not all(type(side) is int and 0 <= side < 2**48 for side in shape):
        raise ValueError("its header is damaged")
    return shape, np.dtype(descr), fortran, 8 + field + length


def _exactly(entry: BinaryIO, count: int) -> bytearray:
    """Return the next bytes, in memory that can be written to."""
    out = bytearray(count)
    view, filled = memoryview(out), 0
    while filled < count:
        more = entry.readinto(view[filled : filled + 2**20])  # type: ignore[attr-defined]
        if not more:
            raise EOFError("it ends too early")
        filled += more
    return out


def listed(names: Sequence[str]) -> str:
    """Return names from a file for an error."""
    return printable(", ".join(names[:20]), 300)
