"""Images from a folder or an .npz file, for the command line: `--data DIR` or `--data FILE.npz[:images,labels]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastfip.data.npz import Npz, listed
from fastfip.data.pictures import find_pictures, grey, order_words, read_image
from fastfip.data.scaling import Pixels
from fastfip.data.task import check_labels
from fastfip.data.zipped import ZippedPictures
from fastfip.errors import ConfigError, DataError, printable, reason

__all__ = ["ImageSet", "load", "loader", "same_classes"]

#: Names of images and labels in an .npz, by what the data is for, in the order in which they are looked for.
NPZ_NAMES = {
    "clean": (("clean_x", "clean_y"), ("x", "y"), ("train_x", "train_y"), ("x_train", "y_train"), ("images", "labels")),
    "test": (("test_x", "test_y"), ("x_test", "y_test"), ("x", "y"), ("images", "labels")),
    "triggered": (("asr_x", "asr_y"), ("triggered_x", "triggered_y"), ("x", "y"), ("images", "labels")),
}
#: Sets whose inputs take no more bytes than this are kept in memory, larger ones are made batch by batch.
IN_MEMORY = 2**30
_CHUNK = 512


class _Source(Protocol):
    def batch(self, index: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class _Arrays:
    x: np.ndarray
    pixels: Pixels
    largest: float = 1.0  # what floats are divided by, to be in [0, 1]

    def batch(self, index: Sequence[int]) -> Tensor:
        raw = torch.from_numpy(np.ascontiguousarray(self.x[np.asarray(index)]))
        if self.pixels.channels is not None:
            raw = self.in_channels(raw, self.pixels.channels)
        x = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        x = x / self.largest if self.largest != 1 else x
        fit = self.pixels.fit
        if fit is None or (fit.resize is None and tuple(x.shape[-2:]) == fit.size):
            return x
        return fit.batch(x)

    def in_channels(self, raw: Tensor, channels: int) -> Tensor:
        if raw.dim() != 4 or raw.shape[1] not in (1, 3):
            raise DataError(f"--channels is for images of 1 or 3 channels [N, C, H, W], not {list(raw.shape)}")
        if raw.shape[1] == channels:
            return raw
        return grey(raw) if channels == 1 else raw.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]
    pixels: Pixels

    def batch(self, index: Sequence[int]) -> Tensor:
        images = [read_image(self.paths[i], self.pixels.channels or 3, self.pixels.fit) for i in index]
        for i, image in zip(index, images):
            if image.shape != images[0].shape:
                sizes = "{2}x{1} and {5}x{4}".format(*images[0].shape, *image.shape)
                raise DataError(f"images of different sizes, {sizes} ({printable(self.paths[i])}): give --size")
        return torch.stack(images)


class ImageSet(Dataset[tuple[Tensor, ...]]):
    """Images with their labels: items (x, y), of a triggered set (x, attack label, true label).

    Attributes:
        labels: [N] int64, the true ones (of triggered images with unknown true labels the attack's).
        pixels: how images become inputs.
        classes: names of the classes in the order of their numbers, where folders give them.
        order: how these were ordered, see `fastfip.data.pictures.class_order`.
    """

    def __init__(
        self,
        source: _Source,
        index: Tensor,
        labels: Tensor,
        pixels: Pixels,
        classes: list[str] | None = None,
        order: str | None = None,
    ) -> None:
        self.source, self.index, self.labels, self.pixels = source, index, labels, pixels
        self.classes, self.order = classes, order
        self.trigger: Callable[[Tensor], Tensor] | None = None
        self.attack: Tensor | None = None
        self.broken: list[str] = []

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
        out = ImageSet(self.source, self.index[places], self.labels[places], self.pixels, self.classes, self.order)
        out.trigger, out.attack = self.trigger, None if self.attack is None else self.attack[places]
        out.broken = self.broken
        return out

    def without_broken(self) -> ImageSet:
        """Return the set without files that cannot be read as images, which `words` then counts; each is decoded once.

        Raises:
            DataError: none can be read.
        """
        if isinstance(self.source, _Arrays):
            return self
        keep, broken = [], []
        for place, where in enumerate(self.index.tolist()):
            try:
                self.source.batch([where])
                keep.append(place)
            except DataError as error:
                broken.append(str(error))
        if not keep:
            raise DataError(f"none of {len(broken)} images can be read: {broken[0]}")
        out = self.subset(torch.tensor(keep)) if broken else self
        out.broken = [*self.broken, *broken]
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
            raise DataError(
                "the true class of all triggered images is the attacker's class: ASR cannot be measured on them"
            )
        out = self.subset(keep)
        out.attack = attack_labels[keep]
        return out

    def words(self) -> list[str]:
        """Return what a result should say about how images are made, where the user did not, and of the classes."""
        words = self.pixels.words()
        words += [] if self.classes is None or self.order is None else order_words(self.classes, self.order)
        if self.broken:
            shown = "; ".join(self.broken[:3]) + "; ..." * (len(self.broken) > 3)
            words.append(f"{len(self.broken)} images were left out: {shown}")
        return words

    def to_dict(self) -> dict[str, Any]:
        """Return how images became inputs and labels, as plain values."""
        return {
            "formula": str(self.pixels),
            **self.pixels.to_dict(),
            "class_order": self.order,
            "classes": self.classes,
            **({"broken": len(self.broken)} if self.broken else {}),
        }

    def in_memory(self) -> Dataset[tuple[Tensor, ...]]:
        """Return the set as tensors if they are not too large, else itself."""
        first = self.batch([0])[0]
        if first.numel() * first.element_size() * len(self) > IN_MEMORY:
            return self
        parts = [self.batch(range(i, min(i + _CHUNK, len(self)))) for i in range(0, len(self), _CHUNK)]
        return TensorDataset(*(torch.cat(part) for part in zip(*parts)))


def loader(images: ImageSet, batch_size: int = 128, workers: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of a set, in its order.

    Args:
        images: kept in memory where that takes no more than a gigabyte, else read anew in each pass.
        batch_size: images a batch.
        workers: processes that decode images in each pass, and live on between passes; nothing is kept in memory then.

    Raises:
        ConfigError: a number that cannot be.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch-size={batch_size}, workers={workers}: must be at least 1 and 0")
    if workers:
        return DataLoader(images, batch_size=batch_size, num_workers=workers, persistent_workers=True)
    return DataLoader(images.in_memory(), batch_size=batch_size)


def load(
    spec: str | os.PathLike[str], role: str = "clean", pixels: Pixels | None = None, order: str | None = None
) -> ImageSet:
    """Read images and labels.

    Args:
        spec: a folder with one sub-folder of images for each class, a .zip of one (`FILE.zip:train` for a folder in
            it), an .npz, or `FILE.npz:images,labels` with the names
            of the arrays in it. Arrays are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], or floats, which are taken
            as they are unless `pixels.scale` is given; images of floats from 0 to 255 are refused without it.
        role: "clean", "test" or "triggered": which names are looked for in an .npz.
        pixels: how images become inputs.
        order: how class folders are numbered, see `fastfip.data.pictures.class_order`.

    Raises:
        DataError: there is nothing there, or it is not of that form.
    """
    pixels = Pixels() if pixels is None else pixels
    text = os.fspath(spec)
    stem, dot, names = text.rpartition(".npz:")
    path = Path(f"{stem}.npz" if dot else text)
    zipped, zip_dot, inside = text.rpartition(".zip:")
    if zip_dot and not dot:
        path = Path(f"{zipped}.zip")
    try:
        path.stat()
    except (OSError, ValueError) as error:
        why = "there is no such folder or file" if isinstance(error, FileNotFoundError) else reason(error)
        raise DataError(f"{printable(path)}: {why}") from None
    if path.is_dir():
        return _load_folder(path, pixels, order)
    if path.suffix.lower() == ".zip":
        found = ZippedPictures(path, inside if zip_dot else "", pixels, order)
        places = torch.arange(len(found.labels))
        return ImageSet(found, places, found.labels, pixels, found.classes, found.order)
    if path.suffix.lower() != ".npz":
        hint = ": unpack it and give the folder" if path.suffix.lower() in (".tar", ".gz", ".tgz") else ""
        raise DataError(f"{path}: data is a folder of class folders, a .zip of them, or an .npz file{hint}")
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
        out = ImageSet(_Arrays(x, pixels, _largest(x, pixels)), torch.arange(len(labels)), labels, pixels)
        return out if attack is None else out.with_attack(_labels(attack))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _largest(x: np.ndarray, pixels: Pixels) -> float:
    """Return what floats have to be divided by before they are brought to `pixels.scale`: 1 or 255."""
    if x.dtype == np.uint8:
        return 1.0
    low, high = float(x.min()), float(x.max())
    picture = x.ndim == 4 and x.shape[1] in (1, 3)
    if pixels.of is not None and any(pixels.mean) and picture and (low < 0 or high > 255):
        raise DataError(
            f"float images run from {low:g} to {high:g}, so they are normalised already: give --mean 0, as "
            f"{pixels.of} would do it again"
        )
    if pixels.scale is None:
        if picture and low >= 0 and high > 10:  # what was normalised has values below 0, or few above 3
            raise DataError(
                f"float images run from {low:g} to {high:g}: give --scale 01, -11 or 255, as the model takes them"
            )
        return 1.0
    if not (low >= 0 and high <= 255):
        raise DataError(f"float images run from {low:g} to {high:g}: they are already scaled, leave out --scale")
    return 1.0 if high <= 1 else 255.0


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


def _load_folder(path: Path, pixels: Pixels, order: str | None) -> ImageSet:
    paths, labels, names, order = find_pictures(path, order)
    return ImageSet(_Files(tuple(paths), pixels), torch.arange(len(paths)), torch.tensor(labels), pixels, names, order)


def same_classes(first: ImageSet, second: ImageSet) -> None:
    """Check that two sets of folders number their classes alike.

    Raises:
        DataError: the folders have different names.
    """
    if first.classes is not None and second.classes is not None and first.classes != second.classes:
        only = sorted(set(first.classes) ^ set(second.classes))
        raise DataError(f"the class folders differ ({listed(only[:5])}): classes would be numbered differently")
