"""Stand-ins for what a pickle describes: names, blocks of values, tensors. None holds a value or runs anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["MOST_SIDES", "Claim", "Global", "NumpyArray", "NumpyType", "Odd", "Opaque", "Ordered", "Storage"]

#: No tensor has more sides than this, and none is longer than what fits into 64 bits.
MOST_SIDES = 64


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A block of `numel` values of `width` bytes, kept under `key`; `kind` is Float, Long, Untyped ...

    `start` is where a view of a block begins, in values: files of torch < 0.4 keep views as storages of their own.
    """

    key: str
    kind: str
    width: int
    numel: int
    start: int = 0


@dataclass(frozen=True)
class Claim:
    """A tensor as the pickle describes it; `dtype` is the name of torch's."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    width: int
    dtype: str

    def claimed(self) -> int:
        """Return how many bytes its values would take."""
        count = self.width
        for size in self.size:
            count *= size
        return count

    def fault(self) -> str | None:
        """Return what is wrong with it, or None."""
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or min(numbers, default=0) < 0:
            return f"has the size {list(self.size)} with the strides {list(self.stride)} and the offset {self.offset}"
        if max(numbers) >= 2**63:
            return "has a size, stride or offset beyond 64 bits"
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
    """What is not followed: the result of a call, or a text that is longer than any name."""

    of: Global
    state: Any = None


@dataclass(eq=False)
class NumpyType:
    """A NumPy dtype such as "f8"; `order` is "" until its state has said how the bytes are ordered."""

    code: str
    order: str = ""

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return int(self.code[1:])


@dataclass(eq=False)
class NumpyArray:
    """A NumPy array, of numbers once `kind` is there; `data` is what stands for its bytes (see `opcodes`)."""

    shape: tuple[int, ...] = ()
    kind: NumpyType | None = None
    columns_first: bool = False
    data: Any = b""


class Ordered(dict[Any, Any]):
    """An OrderedDict of a pickle, with what `nn.Module.state_dict` notes on it about versions."""

    _metadata: Any = None
