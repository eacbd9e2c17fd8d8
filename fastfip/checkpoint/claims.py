"""Stand-ins for what a pickle describes: names, blocks of values, tensors. None holds a value or runs anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Claim", "Global", "Odd", "Opaque", "Storage"]


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A block of `numel` values of `width` bytes, kept under `key`; `kind` is Float, Long, Untyped ..."""

    key: str
    kind: str
    width: int
    numel: int


@dataclass(frozen=True)
class Claim:
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    width: int

    def fault(self) -> str | None:
        """Return what is wrong with it, or None."""
        if len(self.size) != len(self.stride) or min((self.offset, *self.size, *self.stride), default=0) < 0:
            return f"has the size {list(self.size)} with the strides {list(self.stride)} and the offset {self.offset}"
        stored = self.storage.numel * self.storage.width // self.width
        count, last = 1, self.offset
        for size, stride in zip(self.size, self.stride):
            count *= size
            last += (size - 1) * stride
        if count == 0:
            return None
        expanded = any(size > 1 and stride == 0 for size, stride in zip(self.size, self.stride))
        if last >= stored or count > stored - self.offset or expanded:
            kept = max(stored - self.offset, 0) if not expanded else "a part of them"
            why = ": it was saved expanded; save tensor.contiguous()" if expanded and last < stored else ""
            return f"claims {count} values {list(self.size)} and stores {kept}{why}"
        return None


@dataclass(frozen=True)
class Odd:
    """A tensor of a kind that is refused."""

    what: str


@dataclass(eq=False)
class Opaque:
    """The result of a call that is not followed."""

    of: Global
    state: Any = None
