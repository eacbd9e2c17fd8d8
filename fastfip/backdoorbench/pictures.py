"""The poisoned pictures of a result: found in its pickle or in the folder beside it, made images batch by batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfip.checkpoint.claims import Claim, NumpyArray, Opaque
from fastfip.checkpoint.opcodes import Encoded, Skipped
from fastfip.data.images import ImageSet
from fastfip.data.pictures import IMAGE_SUFFIXES, read_image, tensor_of
from fastfip.data.scaling import Pixels
from fastfip.errors import CheckpointError, DataError, printable

__all__ = ["PoisonedSet"]

#: No data set that networks are trained on has more images.
_MOST = 2**22
#: Bytes a pixel, of the modes of pillow that the attacks write.
_MODES = {"RGB": 3, "L": 1}


@dataclass(frozen=True)
class _Stored:
    """A picture in the file: `length` bytes from `start` on, a character of UTF-8 for each value if it is a text."""

    mode: str
    width: int
    height: int
    start: int
    length: int
    is_text: bool = True
    values: bytes = b""  # those of a small picture, which are at hand

    @property
    def count(self) -> int:
        """Bytes that it has."""
        return self.width * self.height * _MODES[self.mode]


@dataclass(frozen=True)
class _Pictures:
    """Where the pictures are, as an ImageSet reads them."""

    file: Path
    held: tuple[_Stored | Path, ...]
    pixels: Pixels

    def batch(self, index: Sequence[int]) -> Tensor:
        channels, size = self.pixels.channels or 3, self.pixels.size
        images: list[Tensor] = []
        with open(self.file, "rb") as file:
            for i in index:
                one = self.held[i]
                image = read_image(one, channels, size) if isinstance(one, Path) else self._stored(file, one)
                if images and image.shape != images[0].shape:
                    raise DataError(f"{self.file}: has pictures of different sizes, and does not say which is right")
                images.append(image)
        return torch.stack(images)

    def _stored(self, file: Any, one: _Stored) -> Tensor:
        from PIL import Image

        values = one.values or _values(file, one.start, one.length, one.count, one.is_text)
        if len(values) != one.count:
            raise DataError(f"{self.file}: is no longer the file that was read")
        image = Image.frombytes(one.mode, (one.width, one.height), values)
        return tensor_of(image, self.pixels.channels or 3, self.pixels.size)


@dataclass(frozen=True, eq=False)
class PoisonedSet:
    """Pictures that carry the trigger, in the order of the data set that they were made of.

    Attributes:
        file: the result that they belong to.
        index: [N] int64, where each stood in the clean data set.
        attack, true: [N] int64, the label that the attacker wants, and the original one.
        folder: the folder beside `file` that has them as image files; None: they are in `file` itself.
        clean: how many further pictures of the set carry no trigger; they are in the data set only.
    """

    file: Path
    index: Tensor
    attack: Tensor
    true: Tensor
    folder: str | None
    clean: int
    held: tuple[Any, ...]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.index)

    @property
    def is_there(self) -> bool:
        """Whether the pictures are where the file says: in itself, or in a folder beside it."""
        return self.folder is None or (self.file.parent / self.folder).is_dir()

    def images(self, pixels: Pixels) -> ImageSet:
        """Return the pictures as triggered images (x, attack label, true label); ones of the attack's class are out.

        Raises:
            CheckpointError: a picture is missing, or is a link.
            DataError: none is left.
        """
        held = self.held if self.folder is None else tuple(self._path(parts) for parts in self.held)
        source = _Pictures(self.file, held, pixels)
        return ImageSet(source, torch.arange(len(self)), self.true, pixels).with_attack(self.attack)

    def _path(self, parts: tuple[str, ...]) -> Path:
        folder = Path(os.path.realpath(self.file.parent))
        where = folder.joinpath(*parts)
        name = printable("/".join(parts), 100)
        if os.path.realpath(where) != os.fspath(where):
            raise CheckpointError(f"{self.file}: its picture {name} is a link, which BackdoorBench never writes")
        if not where.is_file():
            raise CheckpointError(f"{self.file}: its picture {name} is missing: copy the folder {parts[0]} completely")
        return where

    @classmethod
    def of(cls, state: Any, file: Path, classes: int) -> PoisonedSet:
        """Make one of what `prepro_cls_DatasetBD_v2.retrieve_state` gave, on stand-ins (see `checkpoint.read.follow`).

        Raises:
            CheckpointError: it is something else, or names files that do not lie beside the result.
        """
        if isinstance(state, Mapping) and {"x", "y"} <= set(state):
            raise CheckpointError("is of BackdoorBench 1, which kept arrays: attack again with version 2")
        container = state.get("bd_data_container") if isinstance(state, Mapping) else None
        entries = container.get("data_dict") if isinstance(container, Mapping) else None
        if not isinstance(state, Mapping) or not isinstance(container, Mapping) or not isinstance(entries, Mapping):
            raise CheckpointError("is no poisoned set of BackdoorBench 2: it has no container of pictures")
        with open(file, "rb") as opened:
            order = _numbers(state.get("original_index_array"), opened, "original_index_array")
            marked = _numbers(state.get("poison_indicator"), opened, "poison_indicator")
        if len(np.unique(order)) != len(order):
            raise CheckpointError("has an original_index_array with a picture twice")
        if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(marked):
            raise CheckpointError("has an original_index_array that leads out of its poison_indicator")
        chosen = order[marked[order] != 0] if len(order) else order
        stored = container.get("save_folder_path")
        folder = None if stored is None else _folder_of(stored)
        held: list[Any] = []
        labels = []
        for index in chosen.tolist():
            if index not in entries:
                raise CheckpointError(f"marks picture {index} as poisoned, which its container lacks")
            entry = entries[index]
            held.append(_stored_of(entry, index) if folder is None else _parts_of(entry, str(stored), folder, index))
            labels.append(_labels_of(entry, folder is None, index, classes))
        pairs = torch.tensor(labels, dtype=torch.int64).reshape(-1, 2)
        index = torch.from_numpy(chosen.astype(np.int64))
        return cls(file, index, pairs[:, 0], pairs[:, 1], folder, len(order) - len(chosen), tuple(held))


def _values(file: Any, start: int, length: int, count: int, is_text: bool) -> bytes:
    """Return `count` bytes of a file, or those that a text in it stands for; b"" where there are not so many."""
    file.seek(start)
    try:
        values = file.read(length)
        values = values.decode("utf-8").encode("latin1") if is_text else values
    except UnicodeError:
        return b""
    return values if len(values) == count else b""


def _numbers(array: Any, file: Any, name: str) -> np.ndarray:
    """Return an array of one axis; lists of numbers too."""
    if isinstance(array, list) and all(type(one) in (int, float, bool) for one in array):
        return np.asarray(array, dtype=np.float64 if any(type(one) is float for one in array) else np.int64)
    if not isinstance(array, NumpyArray) or array.kind is None or len(array.shape) != 1:
        raise CheckpointError(f"has a {name} that is no array of one axis")
    if array.shape[0] > _MOST:
        raise CheckpointError(f"has a {name} of {array.shape[0]} images, more than any data set has")
    kind, count = array.kind, array.shape[0] * array.kind.width
    if kind.code[0] not in "iufb" or (name == "original_index_array" and kind.code[0] not in "iu"):
        raise CheckpointError(f"has a {name} of the dtype {kind.code}")
    data = array.data
    if isinstance(data, Skipped):
        data = _values(file, data.start, data.length, count, data.is_text)
    data = bytes(data)
    if len(data) != count:
        raise CheckpointError(f"has a {name} that needs {count} bytes and stores others")
    values = np.frombuffer(data, np.dtype(kind.order.replace("|", "=") + kind.code))
    return values.astype(np.int64 if kind.code[0] in "iub" else np.float64)


def _stored_of(entry: Any, index: int) -> _Stored:
    """Return a picture that lies in the file: the state of an image of pillow, never given to pillow as one."""
    image = entry[0] if isinstance(entry, (tuple, list)) and len(entry) == 3 else None
    if not isinstance(image, Opaque) or image.of.module.split(".")[0] != "PIL":
        raise CheckpointError(f"has a picture {index} that is no picture with its two labels")
    state = image.state
    if not isinstance(state, (list, tuple)) or len(state) < 5:
        raise CheckpointError(f"has a picture {index} without values")
    mode, size, data = state[1], state[2], state[4]
    if mode not in _MODES:
        raise CheckpointError(f"has a picture {index} of the mode {printable(mode, 20)}: RGB and L are read")
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise CheckpointError(f"has a picture {index} of no size")
    width, height = size
    one = _Stored(mode, width, height, 0, 0)
    if isinstance(data, bytes) and len(data) == one.count:
        return _Stored(mode, width, height, 0, 0, values=data)
    if isinstance(data, Encoded) and len(data) == one.count:
        return _Stored(mode, width, height, data.start, data.length)
    if isinstance(data, Skipped) and data.could_be(one.count):
        return _Stored(mode, width, height, data.start, data.length, data.is_text)
    raise CheckpointError(f"has a picture {index} of {width} x {height} pixels and other values than it needs")


def _labels_of(entry: Any, in_file: bool, index: int, classes: int) -> tuple[int, int]:
    labels = entry[1:] if in_file else entry["other_info"]
    if isinstance(labels, (list, tuple)) and any(isinstance(y, Claim) for y in labels):
        raise CheckpointError(f"has a picture {index} whose labels are tensors, as those of CelebA: they are not read")
    if (
        not isinstance(labels, (list, tuple))
        or len(labels) != 2
        or not all(type(y) is int and 0 <= y < classes for y in labels)
    ):
        raise CheckpointError(f"has a picture {index} without two labels of {classes} classes")
    return labels[0], labels[1]


def _folder_of(stored: Any) -> str:
    """Return the name of the folder that pictures were saved to; it lies beside the result, wherever that is now."""
    name = stored.replace("\\", "/").rstrip("/").rpartition("/")[2] if isinstance(stored, str) else ""
    if not _is_plain(name):
        raise CheckpointError(f"has pictures in a folder that does not lie beside it ({printable(stored, 100)})")
    return name


def _parts_of(entry: Any, stored: str, folder: str, index: int) -> tuple[str, ...]:
    """Return the way from the result's folder to a picture, where it leads into the folder of its own only."""
    path = entry.get("path") if isinstance(entry, Mapping) and "other_info" in entry else None
    if not isinstance(path, str):
        raise CheckpointError(f"has a picture {index} that is no path with its two labels")
    rest = path.removeprefix(f"{stored}/") if path.startswith(f"{stored}/") else ""
    parts = rest.split("/")
    if not all(map(_is_plain, parts)) or Path(parts[-1]).suffix.lower() not in IMAGE_SUFFIXES:
        raise CheckpointError(f"has a picture {index} that does not lie in its folder ({printable(path, 100)})")
    return folder, *parts


def _is_plain(name: str) -> bool:
    """Return whether a text is the name of a file or folder, and leads nowhere else."""
    return 0 < len(name) <= 200 and name not in (".", "..") and not set(name) & set("/\\:\0\n")
