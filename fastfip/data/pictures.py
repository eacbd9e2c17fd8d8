"""Image files, and folders of them: how they are read, and in which order class folders are numbered."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastfip.data.resize import Fit
from fastfip.errors import ConfigError, DataError, printable, reason

__all__ = ["ORDERS", "class_order", "decoded", "find_pictures", "grey", "order_words", "read_image", "tensor_of"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
#: How class folders can be ordered: by the numbers in their names, or letter by letter, as torchvision's ImageFolder.
ORDERS = ("number", "text")
#: An image file may have this many pixels; the largest of ImageNet have 61 million.
_MOST_PIXELS = 2**26
#: More pixels need a byte of the file for each 32: a header claims anything, and pillow takes the memory at once.
_SMALL = 2**22


def class_order(names: Sequence[str], order: str | None = None) -> tuple[list[str], str]:
    """Return the names of classes in the order in which they are numbered, and what that order is.

    Args:
        names: of the class folders.
        order: "number" (numbers in the names count by their value) or "text" (letter by letter: 0, 1, 10, 11, 2);
            None: "number" where every name is a number and nothing else, else "text".

    Raises:
        ConfigError: no such order.
    """
    if order is None:
        order = "number" if all(name.isascii() and name.isdigit() for name in names) else "text"
    if order not in ORDERS:
        raise ConfigError(f"class order {order!r}: must be one of {', '.join(ORDERS)}")
    return sorted(names, key=_by_number if order == "number" else None), order


def _by_number(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in parts], name


def order_words(names: Sequence[str], order: str, most: int = 12) -> list[str]:
    """Return what is said about the numbers that classes got: the mapping, and numbers that are missing in it."""
    words = {"number": "by the numbers in their names", "text": "letter by letter"}[order]
    if [str(i) for i in range(len(names))] == list(names):
        return [f"class folders 0 to {len(names) - 1} are the classes of these numbers"]
    shown = ", ".join(f"{i} {printable(name)}" for i, name in list(enumerate(names))[:most])
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    out = [f"class folders are numbered {words}: {shown}{more}"]
    if order == "number" and all(name.isdigit() for name in names):
        values = {int(name) for name in names}
        missing = sorted(set(range(max(values))) - values)
        if 0 in values and missing:
            gap = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
            first = next(name for i, name in enumerate(names) if int(name) != i)
            out.append(
                f"no class folder is called {gap}, so that folder {first} is class {names.index(first)}: "
                "make empty folders of the missing names if the names are the model's classes"
            )
    return out


def find_pictures(path: Path, order: str | None = None) -> tuple[list[Path], list[int], list[str], str]:
    """Return the image files in the class folders of a folder, their labels, the classes, and their order.

    Raises:
        DataError: there are no class folders, or no images in them.
    """
    folders = {p.name: p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    if not folders:
        raise DataError(f"{path}: has no class folders: put the images of each class into a folder of its own")
    names, order = class_order(list(folders), order)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        mine = sorted(p for p in folders[name].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        paths += mine
        labels += [label] * len(mine)
    if not paths:
        inner = next((p for name in names for p in sorted(folders[name].iterdir()) if p.is_dir()), None)
        hint = f": did you mean {printable(inner.parent)}?" if inner is not None else ""
        raise DataError(f"{path}: there are no images in its class folders ({', '.join(IMAGE_SUFFIXES)}){hint}")
    return paths, labels, names, order


def read_image(path: str | os.PathLike[str], channels: int = 3, size: tuple[int, int] | Fit | None = None) -> Tensor:
    """Read an image file as floats [C, H, W] in [0, 1], turned as its EXIF data say, resized if `size` is given.

    Raises:
        DataError: it cannot be read, its range is unknown (floats outside [0, 1]), or pillow is not installed.
    """
    if not Path(path).is_file():
        raise DataError(f"{printable(os.fspath(path))}: there is no such file, or it is not a plain file")
    return decoded(path, os.path.getsize(path), printable(os.fspath(path)), channels, size)


def decoded(
    file: str | os.PathLike[str] | IO[bytes], stored: int, name: str, channels: int, size: tuple[int, int] | Fit | None
) -> Tensor:
    """Read an image as `read_image` does, from a path or an open file.

    Args:
        file: what pillow opens.
        stored: its size in bytes.
        name: what errors call it.
        channels: 1 or 3.
        size: (height, width), or also how it is reached; None: as the image is.

    Raises:
        DataError: see `read_image`.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("image files need pillow: pip install pillow, or give an .npz file") from None
    try:
        with Image.open(file) as image:
            if image.width * image.height > min(_MOST_PIXELS, max(_SMALL, 32 * stored)):
                claim = f"it claims {image.width} x {image.height} pixels, too many for its size: make it smaller"
                raise ValueError(claim)
            return tensor_of(ImageOps.exif_transpose(image), channels, size)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # pillow's readers raise whatever a damaged file makes of them
        raise DataError(f"{name}: cannot be read as an image: {reason(error)}") from None


def tensor_of(image: Any, channels: int = 3, size: tuple[int, int] | Fit | None = None) -> Tensor:
    """Return a picture of pillow as floats [C, H, W] in [0, 1], resized if `size` is given.

    Raises:
        DataError: its range is unknown (floats outside [0, 1]).
    """
    fit = size if size is None or isinstance(size, Fit) else Fit(size)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return _deep(image, channels, fit)
    image = image.convert("L" if channels == 1 else "RGB")
    image = image if fit is None else fit.picture(image)
    array = np.array(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _deep(image: Any, channels: int, fit: Fit | None) -> Tensor:
    """Return a grey image of more than 8 bits; pillow's own conversion would cut all of it off at 255."""
    from PIL import Image

    array = np.array(image)
    if image.mode == "F":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise DataError(f"its floats run from {array.min():g} to {array.max():g}, outside [0, 1]: scale them first")
    elif array.min() < 0 or array.max() > 65535:
        raise DataError(f"its integers run from {array.min()} to {array.max()}: only 8 and 16 bits are read")
    else:
        array = array / 65535
    array = np.ascontiguousarray(array, dtype=np.float32)
    array = array if fit is None else np.array(fit.picture(Image.fromarray(array)))
    return torch.from_numpy(array)[None].expand(channels, -1, -1).clone()


def grey(x: Tensor) -> Tensor:
    """Return images [N, 3, H, W] as [N, 1, H, W]; uint8 as pillow would, so that arrays and files give the same."""
    if x.dtype == torch.uint8:
        r, g, b = x.to(torch.int32).unbind(1)
        return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)
    return (x * weights.view(3, 1, 1)).sum(1, keepdim=True)
