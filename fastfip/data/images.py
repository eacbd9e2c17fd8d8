"""Images from a folder or an .npz file, for the command line: `--data DIR` or `--data FILE.npz[:images,labels]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastfip.data.npz import Npz, listed
from fastfip.data.task import check_labels
from fastfip.errors import ConfigError, DataError, printable, reason

__all__ = ["ImageSet", "Pixels", "load", "loader", "read_image", "same_classes"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
#: Names of images and labels in an .npz, by what the data is for, in the order in which they are looked for.
NPZ_NAMES = {
    "clean": (("clean_x", "clean_y"), ("x", "y"), ("train_x", "train_y"), ("x_train", "y_train"), ("images", "labels")),
    "test": (("test_x", "test_y"), ("x_test", "y_test"), ("x", "y"), ("images", "labels")),
    "triggered": (("asr_x", "asr_y"), ("triggered_x", "triggered_y"), ("x", "y"), ("images", "labels")),
}
#: Sets whose inputs take no more bytes than this are kept in memory, larger ones are made batch by batch.
IN_MEMORY = 2**30
_CHUNK = 512
#: An image file may have this many; the largest of ImageNet have 61 million.
_MOST_PIXELS = 2**26
#: More pixels need a byte of the file for each 32: a header claims anything, and pillow takes the memory at once.
_SMALL = 2**22


@dataclass(frozen=True)
class Pixels:
    """How images become what the model takes: scaled to [0, 1] if they are uint8, resized, (trigger,) normalised.

    Attributes:
        mean, std: one number, or one for each channel; empty: x/255 as it is.
        size: (height, width); None: as the images are.
        channels: 1 or 3, for image files; None: 3.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if any(value == 0 for value in self.std):
            raise ConfigError("std must not be 0")
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"channels={self.channels}: must be 1 or 3")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"size={self.size}: must be at least 1")

    def normalise(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std of images [N, C, H, W] (or anything, with one number)."""
        for values, divide in ((self.mean, False), (self.std, True)):
            if not values:
                continue
            if len(values) > 1 and (x.dim() != 4 or x.shape[1] != len(values)):
                raise DataError(f"{len(values)} numbers for mean or std, the images are {list(x.shape[1:])}")
            number = torch.tensor(values, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 2)) if len(values) > 1 else None
            other: Any = values[0] if number is None else number
            x = x / other if divide else x - other
        return x


class _Source(Protocol):
    def batch(self, index: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class _Arrays:
    x: np.ndarray
    size: tuple[int, int] | None

    def batch(self, index: Sequence[int]) -> Tensor:
        raw = torch.from_numpy(np.ascontiguousarray(self.x[np.asarray(index)]))
        x = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        if self.size is None or tuple(x.shape[-2:]) == self.size:
            return x
        if x.dim() != 4:
            raise DataError(f"--size is for images [N, C, H, W], not {list(x.shape)}")
        return F.interpolate(x, self.size, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]
    pixels: Pixels

    def batch(self, index: Sequence[int]) -> Tensor:
        images = [read_image(self.paths[i], self.pixels.channels or 3, self.pixels.size) for i in index]
        for i, image in zip(index, images):
            if image.shape != images[0].shape:
                sizes = "{2}x{1} and {5}x{4}".format(*images[0].shape, *image.shape)
                raise DataError(f"images of different sizes, {sizes} ({printable(self.paths[i])}): give --size")
        return torch.stack(images)


class ImageSet(Dataset[tuple[Tensor, ...]]):
    """Images with their labels: items (x, y), of a triggered set (x, attack label, true label).

    Attributes:
        labels: [N] int64, the true ones (of triggered images with unknown true labels the attack's).
        classes: names of the classes, where folders give them.
    """

    def __init__(
        self, source: _Source, index: Tensor, labels: Tensor, pixels: Pixels, classes: list[str] | None
    ) -> None:
        self.source, self.index, self.labels, self.pixels, self.classes = source, index, labels, pixels, classes
        self.trigger: Callable[[Tensor], Tensor] | None = None
        self.attack: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, places: Sequence[int]) -> tuple[Tensor, ...]:
        """Return inputs, (attack labels,) and labels for some places in the set."""
        where = torch.as_tensor(places)
        x = self.source.batch(self.index[where].tolist())
        if self.trigger is not None:
            if x.dim() != 4 or float(x.min()) < 0 or float(x.max()) > 1:
                raise DataError(f"a trigger needs images [N, C, H, W] in [0, 1], not normalised: {list(x.shape)}")
            x = self.trigger(x)
        x, y = self.pixels.normalise(x), self.labels[where]
        return (x, y) if self.attack is None else (x, self.attack[where], y)

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.batch([place]))

    def subset(self, places: Tensor) -> ImageSet:
        """Return some of the set."""
        out = ImageSet(self.source, self.index[places], self.labels[places], self.pixels, self.classes)
        out.trigger, out.attack = self.trigger, None if self.attack is None else self.attack[places]
        return out

    def sample(self, limit: int | None = None, per_class: int | None = None, seed: int = 0) -> ImageSet:
        """Return a random part: at most `per_class` of each class, then at most `limit` in all; their order is kept."""
        for name, value in (("limit", limit), ("per-class", per_class)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if per_class is not None:
            labels = self.labels[order]
            kept = [torch.nonzero(labels == c).flatten()[:per_class] for c in labels.unique()]
            order = order[torch.cat(kept).sort().values]
        return self.subset(order[:limit].sort().values) if (limit or per_class) else self

    def triggered(self, trigger: Callable[[Tensor], Tensor], attack_labels: Tensor) -> ImageSet:
        """Return the set under a trigger (images [N, C, H, W] in [0, 1], before they are normalised).

        Args:
            trigger: puts it on a batch of images.
            attack_labels: what the attacker wants for each image [N]; images that are of that class are left out.
        """
        out = self.with_attack(attack_labels)
        out.trigger = trigger
        return out

    def with_attack(self, attack_labels: Tensor) -> ImageSet:
        """Return the set as triggered images that the attacker wants to have these labels."""
        keep = torch.nonzero(attack_labels != self.labels).flatten()
        if len(keep) == 0:
            raise DataError("all triggered images are of the attack's own class: none is left to measure ASR")
        out = self.subset(keep)
        out.attack = attack_labels[keep]
        return out

    def in_memory(self) -> Dataset[tuple[Tensor, ...]]:
        """Return the set as tensors if they are not too large, else itself."""
        first = self.batch([0])[0]
        if first.numel() * first.element_size() * len(self) > IN_MEMORY:
            return self
        parts = [self.batch(range(i, min(i + _CHUNK, len(self)))) for i in range(0, len(self), _CHUNK)]
        return TensorDataset(*(torch.cat(part) for part in zip(*parts)))


def loader(images: ImageSet, batch_size: int = 128) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of a set, in its order."""
    if batch_size < 1:
        raise ConfigError(f"batch-size={batch_size}: must be at least 1")
    return DataLoader(images.in_memory(), batch_size=batch_size)


def load(spec: str | os.PathLike[str], role: str = "clean", pixels: Pixels | None = None) -> ImageSet:
    """Read images and labels.

    Args:
        spec: a folder with one sub-folder of images for each class (classes numbered in the order of their names), an
            .npz, or `FILE.npz:images,labels` with the names of the arrays in it. Arrays are uint8 [N, H, W],
            [N, H, W, C] or [N, C, H, W], or floats, which are taken as they are.
        role: "clean", "test" or "triggered": which names are looked for in an .npz.
        pixels: how images become inputs.

    Raises:
        DataError: there is nothing there, or it is not of that form.
    """
    pixels = Pixels() if pixels is None else pixels
    text = os.fspath(spec)
    stem, dot, names = text.rpartition(".npz:")
    path = Path(f"{stem}.npz" if dot else text)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        why = "there is no such folder or file" if isinstance(error, FileNotFoundError) else reason(error)
        raise DataError(f"{printable(path)}: {why}") from None
    if path.is_dir():
        return _load_folder(path, pixels)
    if path.suffix.lower() != ".npz":
        hint = ": unpack it and give the folder" if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz") else ""
        raise DataError(f"{path}: data is a folder of class folders, or an .npz file{hint}")
    return _load_npz(path, [name.strip() for name in names.split(",")] if dot else None, role, pixels)


def _load_npz(path: Path, wanted: list[str] | None, role: str, pixels: Pixels) -> ImageSet:
    archive = Npz(path)
    here = archive.names
    if wanted is None:
        wanted = next((list(pair) for pair in NPZ_NAMES[role] if set(pair) <= set(here)), None)
    if wanted is None:
        raise DataError(f"{path}: holds {listed(here)}; say which are images and labels: {path.name}:x,y")
    if len(wanted) != 2 or not set(wanted) <= set(here):
        raise DataError(f"{path}: no images and labels under {', '.join(wanted)}; it holds {listed(here)}")
    y, x = archive[wanted[1]], archive[wanted[0]]
    attack = archive["attack_y"] if role == "triggered" and "attack_y" in here else None
    try:
        labels = _labels(y)
        x = _channels_first(x)
        if x.ndim == 0 or len(x) != len(labels):
            raise DataError(f"{len(x) if x.ndim else 'no'} images and {len(labels)} labels")
        if len(x) == 0:
            raise DataError("holds no images")
        out = ImageSet(_Arrays(x, pixels.size), torch.arange(len(labels)), labels, pixels, None)
        return out if attack is None else out.with_attack(_labels(attack))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _labels(y: np.ndarray) -> Tensor:
    if y.dtype.kind in "ui" and y.ndim == 1:
        labels = torch.from_numpy(y.astype(np.int64))
    elif y.dtype.kind in "iuf" and y.dtype.itemsize <= 8:
        labels = torch.from_numpy(np.array(y))
    else:
        raise DataError(f"labels are {y.dtype}: give class indices")
    check_labels(labels)
    return labels


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Return uint8 images as [N, C, H, W]; floats [N, H, W, C] too, other arrays as they are."""
    if x.dtype.kind not in "uif" or (x.dtype.kind in "ui" and x.dtype != np.uint8) or x.dtype.itemsize > 8:
        raise DataError(f"images are {x.dtype}: give uint8 or floats")
    if x.dtype == np.uint8 and x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        return x.transpose(0, 3, 1, 2)
    return x


def _load_folder(path: Path, pixels: Pixels) -> ImageSet:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if not folders:
        raise DataError(f"{path}: has no class folders: put the images of each class into a folder of its own")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        mine = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        paths += mine
        labels += [label] * len(mine)
    if not paths:
        inner = next((p for f in folders for p in sorted(f.iterdir()) if p.is_dir()), None)
        hint = f": did you mean {printable(inner.parent)}?" if inner is not None else ""
        raise DataError(f"{path}: there are no images in its class folders ({', '.join(IMAGE_SUFFIXES)}){hint}")
    names = [folder.name for folder in folders]
    return ImageSet(_Files(tuple(paths), pixels), torch.arange(len(paths)), torch.tensor(labels), pixels, names)


def read_image(path: str | os.PathLike[str], channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file as floats [C, H, W] in [0, 1], resized if `size` is given.

    Raises:
        DataError: it cannot be read, or pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError("images in folders need pillow: pip install pillow, or give an .npz file") from None
    if not Path(path).is_file():
        raise DataError(f"{printable(os.fspath(path))}: there is no such file, or it is no plain file")
    try:
        with Image.open(path) as file:
            if file.width * file.height > min(_MOST_PIXELS, max(_SMALL, 32 * os.path.getsize(path))):
                raise ValueError(
                    f"it claims {file.width} x {file.height} pixels, too many for its size: make it smaller"
                )
            image = file.convert("L" if channels == 1 else "RGB")
        if size is not None and image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except Exception as error:  # pillow's readers raise what the damage makes of them
        raise DataError(f"{printable(os.fspath(path))}: cannot be read as an image: {reason(error)}") from None
    array = np.array(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def same_classes(first: ImageSet, second: ImageSet) -> None:
    """Check that two sets of folders number their classes alike.

    Raises:
        DataError: the folders have different names.
    """
    if first.classes is not None and second.classes is not None and first.classes != second.classes:
        only = sorted(set(first.classes) ^ set(second.classes))
        raise DataError(f"the class folders differ ({listed(only[:5])}): classes would be numbered differently")
