"""Class folders of images in a zip, read from where they are."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from fastfip.data.pictures import IMAGE_SUFFIXES, class_order, decoded
from fastfip.data.scaling import Pixels
from fastfip.errors import DataError, printable, reason

__all__ = ["ZippedPictures"]

#: Entries that are read: the directory of a zip takes about half a kilobyte of memory for each.
_MOST_ENTRIES = 2_000_000
#: An image of more bytes than this may expand to at most so many times what is stored; pictures are compressed already.
_SMALL, _EXPANSION, _LARGEST = 2**20, 20, 2**28


class ZippedPictures:
    """Images of `FILE.zip`, or of a folder in it: `FILE.zip:train`. Each class is a folder, as on a disk.

    Nothing is unpacked to the disk, so names cannot lead anywhere.

    Attributes:
        labels: of the images [N] int64, in their order.
        classes: their names in the order of their numbers.
        order: how these are ordered, see `fastfip.data.pictures.class_order`.
    """

    def __init__(self, path: Path, inside: str, pixels: Pixels, order: str | None = None) -> None:
        self.path, self.pixels = path, pixels
        self._local = threading.local()
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises whatever a damaged file makes of it
            raise DataError(f"{printable(str(path))}: cannot be read as a zip: {reason(error)}") from None
        if len(entries) > _MOST_ENTRIES:
            raise DataError(f"{printable(str(path))}: has {len(entries)} entries, more than {_MOST_ENTRIES}: split it")
        root = PurePosixPath(inside).parts
        found: dict[str, list[zipfile.ZipInfo]] = {}
        deeper: set[str] = set()
        for entry in entries:
            parts = PurePosixPath(entry.filename).parts
            if entry.is_dir() or not parts or parts[: len(root)] != root or parts[0].startswith("__"):
                continue
            rest = parts[len(root) :]
            if len(rest) == 2 and rest[1].lower().endswith(IMAGE_SUFFIXES) and not rest[0].startswith("."):
                found.setdefault(rest[0], []).append(entry)
            elif len(rest) > 2:
                deeper.add("/".join((*root, rest[0])))
        if not found:
            hint = f": did you mean {printable(f'{path.name}:{min(deeper)}')}?" if deeper else ""
            raise DataError(f"{printable(str(path))}: there are no class folders with images{hint}")
        self.classes, self.order = class_order(list(found), order)
        self.entries = [e for name in self.classes for e in sorted(found[name], key=lambda e: e.filename)]
        self.labels = torch.tensor([label for label, name in enumerate(self.classes) for _ in found[name]])

    def batch(self, index: Sequence[int]) -> Tensor:
        """Return the images at these places as floats [n, C, H, W] in [0, 1]."""
        images = [self._image(self.entries[i]) for i in index]
        for i, image in zip(index, images):
            if image.shape != images[0].shape:
                sizes = "{2}x{1} and {5}x{4}".format(*images[0].shape, *image.shape)
                raise DataError(f"images of different sizes, {sizes} ({self._name(self.entries[i])}): give --size")
        return torch.stack(images)

    def _name(self, entry: zipfile.ZipInfo) -> str:
        return printable(f"{self.path.name}:{entry.filename}")

    def _image(self, entry: zipfile.ZipInfo) -> Tensor:
        if entry.file_size > min(_LARGEST, max(_SMALL, _EXPANSION * entry.compress_size)):
            raise DataError(f"{self._name(entry)}: expands from {entry.compress_size} to {entry.file_size} bytes")
        try:
            with self._archive().open(entry) as file:
                return decoded(file, entry.file_size, self._name(entry), self.pixels.channels or 3, self.pixels.fit)
        except DataError:
            raise
        except Exception as error:  # zlib and zipfile have errors of their own, and passwords are one
            raise DataError(f"{self._name(entry)}: cannot be read: {reason(error)}") from None

    def _archive(self) -> zipfile.ZipFile:
        """Return the open zip of this thread: one handle has one place in the file, also after a fork."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = zipfile.ZipFile(self.path), os.getpid()
        return self._local.archive

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
