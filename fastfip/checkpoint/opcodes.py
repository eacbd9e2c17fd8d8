"""Read the instructions of a pickle one by one, within bounds that do not depend on what the file says of itself."""

from __future__ import annotations

import os
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from fastfip.errors import CheckpointError

__all__ = ["MOST_INSTRUCTIONS", "ROOM", "Budget", "Encoded", "Skipped", "Window", "instructions"]

#: What following a pickle may take beside the bytes of the pickle itself.
ROOM = 48 * 2**20
#: A list of half a million samples with their labels has about as many.
MOST_INSTRUCTIONS = 3_000_000
#: Texts and bytes that are longer are passed over: they are pictures and logs, never names or numbers.
LONGEST = 1 << 16
#: Of longer texts it is known where they stand: the values of pictures and arrays are read from there.
_SHORT = 1 << 10
_LENGTHS = {"BINUNICODE": "<I", "BINBYTES": "<I", "BINSTRING": "<I", "BINUNICODE8": "<Q", "BINBYTES8": "<Q"}
_LENGTHS |= {"BYTEARRAY8": "<Q", "LONG4": "<I"}


@dataclass(frozen=True)
class Skipped:
    """A text or bytes of `length` bytes that were passed over, from `start` on in the file."""

    length: int
    start: int
    is_text: bool

    def could_be(self, count: int) -> bool:
        """Return whether it can stand for so many bytes; a text has one or two for each."""
        return count <= self.length <= 2 * count if self.is_text else self.length == count


@dataclass(frozen=True, eq=False)
class Encoded:
    """Bytes that protocol 2 writes as a text, one character for each: `length` bytes from `start` on in the file."""

    text: str
    length: int
    start: int

    def __len__(self) -> int:
        """Return how many bytes it stands for."""
        return len(self.text)

    def __bytes__(self) -> bytes:
        """Return them."""
        return self.text.encode("latin1")


class Window:
    """A part of a file, from its position on; it never asks for more than there is, as read(n) allocates n bytes."""

    def __init__(self, file: BinaryIO, size: int | None = None) -> None:
        here = file.tell()
        self.whole = file.seek(0, os.SEEK_END)
        self.left = self.whole - here if size is None else size
        file.seek(here)
        self.file, self.taken = file, 0
        self.latest: Encoded | None = None  # the last text of more than a name, where it could stand for bytes

    def read(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        data = self.file.read(count if 0 <= count <= self.left else max(min(count, self.left), 0))
        self.left -= len(data)
        self.taken += len(data)
        return data

    def readline(self) -> bytes:
        """Return the next line, or as much of it as a name may have."""
        data = self.file.readline(min(self.left, LONGEST))
        self.left -= len(data)
        self.taken += len(data)
        return data

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self.file.seek(count, os.SEEK_CUR)
        self.left -= count


class Budget:
    """What following a pickle may take: instructions, and bytes (estimated; what is freed counts too)."""

    def __init__(self, window: Window) -> None:
        self.window, self.spent, self.steps = window, 0, 0
        self.stored = 0

    def spend(self, count: int) -> None:
        """Count bytes.

        Raises:
            CheckpointError: it was too much.
        """
        self.spent += count
        if self.spent <= ROOM:
            return  # the rest of the bound is not needed
        taken, whole = self.window.taken, self.window.whole
        if self.spent > ROOM + taken + min(self.stored, whole - taken):
            raise CheckpointError("is refused: its pickle would take many times its size in memory")

    def store(self, count: int) -> None:
        """Take note of a block of bytes that the file says it has: what describes it may take as much, up to 4 kB."""
        self.stored += min(count, 4096)

    def step(self) -> None:
        """Count an instruction.

        Raises:
            CheckpointError: it was too much.
        """
        self.steps += 1
        self.spent += 5
        if self.spent > ROOM:
            self.spend(0)  # looks closer
        if self.steps > MOST_INSTRUCTIONS:
            raise CheckpointError(f"is refused: its pickle has more than {MOST_INSTRUCTIONS} instructions")


def instructions(window: Window, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Return name and argument of each instruction, up to the one that ends the pickle.

    Raises:
        ValueError: there is none of that kind, or the file ends.
        CheckpointError: the budget is used up.
    """
    name = ""
    while name != "STOP":
        budget.step()
        code = window.read(1)
        if not code:
            raise ValueError("it ends before its last instruction")
        if code not in _CODES:
            raise ValueError(f"it has no instruction {code!r}")
        name, reader = _CODES[code]
        yield name, reader(window) if reader else None


def _long(name: str, window: Window) -> Any:
    """Return a text, bytes or number that is preceded by its length."""
    form = _LENGTHS[name]
    (length,) = struct.unpack(form, window.read(struct.calcsize(form)))
    if length > window.left:
        raise ValueError(f"{length} bytes are expected, and {window.left} are left")
    start = window.file.tell() if length > _SHORT else 0
    if length > LONGEST:
        window.skip(length)
        return Skipped(length, start, "UNICODE" in name)
    data = window.read(length)
    if name == "LONG4":
        return int.from_bytes(data, "little", signed=True)
    if name == "BINSTRING":
        return data.decode("latin-1")
    if not name.startswith("BINUNICODE"):
        return data
    text = data.decode("utf-8", "surrogatepass")
    if length > _SHORT:
        window.latest = Encoded(text, length, start)
    return text


def _reader(kind: pickletools.OpcodeInfo) -> Callable[[Any], Any] | None:
    """Return what reads the argument of an instruction; None: it has none."""
    if kind.name in _LENGTHS:
        return partial(_long, kind.name)
    return kind.arg.reader if kind.arg else None


#: The name of each instruction and what reads its argument, by the byte that stands for it.
_CODES = {kind.code.encode("latin-1"): (kind.name, _reader(kind)) for kind in pickletools.opcodes}
