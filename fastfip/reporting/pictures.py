"""Small pictures of inputs and of what is added to them, as arrays of bytes, and as PNG text that a page can hold."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np

__all__ = ["LARGEST", "SHADES", "as_image", "as_png", "of_change", "of_input", "shrunk"]

#: Pixels of the longer side of a picture that a result keeps, at most.
LARGEST = 64
#: Colours of a change in one channel: the most lowered, unchanged, the most raised (blue, white, orange: told apart by
#: eyes of every kind).
SHADES = ((0.0, 0.30, 0.60), (0.97, 0.97, 0.97), (0.80, 0.36, 0.0))


def as_image(x: np.ndarray) -> np.ndarray:
    """Return one input as [H, W] or, of three channels, [H, W, 3].

    Args:
        x: [3, H, W], [channels, H, W] (the mean over the channels is shown), [H, W], [length] (as a square, filled up
            with what is not a number), or more axes, of which the first are averaged.
    """
    x = np.asarray(x, dtype=np.float32)
    if x.ndim == 3 and x.shape[0] == 3:
        return np.moveaxis(x, 0, 2)
    if x.ndim > 2:
        return np.asarray(x.reshape(-1, *x.shape[-2:]).mean(0))
    if x.ndim == 2:
        return x
    side = math.ceil(math.sqrt(x.size))
    padded = np.full(side * side, np.nan, dtype=np.float32)
    padded[: x.size] = x.ravel()
    return padded.reshape(side, side)


def shrunk(image: np.ndarray, most: int = LARGEST) -> np.ndarray:
    """Return an image [H, W, ...] by means over blocks of pixels, so that no side is longer than `most`."""
    block = math.ceil(max(image.shape[:2]) / most)
    if block <= 1:
        return image
    height, width = (math.ceil(side / block) * block for side in image.shape[:2])
    grown = np.pad(
        image, [(0, height - image.shape[0]), (0, width - image.shape[1]), *[(0, 0)] * (image.ndim - 2)], mode="edge"
    )
    return np.asarray(grown.reshape(height // block, block, width // block, block, *image.shape[2:]).mean((1, 3)))


def of_change(change: np.ndarray, most: int = LARGEST) -> tuple[np.ndarray, float]:
    """Return what is added to an input as a picture, and the largest amount in it, which black and white stand for.

    Args:
        change: of the shape of one input, in the inputs' own units.
        most: pixels of the longer side, at most.

    Returns:
        uint8 [H, W] or [H, W, 3]: 128 is no change, 255 (and 1) the bound added (taken away); and the bound.
    """
    image = shrunk(np.nan_to_num(as_image(change)), most)
    bound = float(np.abs(image).max()) or 1.0
    return (128 + 127 * image / bound).round().astype(np.uint8), bound


def of_input(x: np.ndarray, low: np.ndarray, high: np.ndarray, most: int = LARGEST) -> np.ndarray:
    """Return an input as a picture, uint8 [H, W] or [H, W, 3].

    Args:
        x: of the shape of one input.
        low: what is shown black: a number, or one for each channel, [channels, 1, ...].
        high: what is shown white.
        most: pixels of the longer side, at most.
    """
    scaled = (np.asarray(x, dtype=np.float32) - low) / np.maximum(high - low, 1e-12)
    image = shrunk(np.nan_to_num(as_image(scaled)), most)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def as_png(picture: np.ndarray, change: bool = False) -> str:
    """Return a picture as the base64 text of a PNG.

    Args:
        picture: uint8 [H, W] or [H, W, 3].
        change: whether 128 means no change (see `of_change`): one channel is then coloured.
    """
    from PIL import Image

    shown: Any = picture
    if change and picture.ndim == 2:
        shown = coloured((picture.astype(np.float32) - 128) / 127)
    stream = io.BytesIO()
    Image.fromarray(shown).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def coloured(share: np.ndarray) -> np.ndarray:
    """Return shares in [-1, 1], [H, W], as colours uint8 [H, W, 3]: blue is lowered, white the same, orange raised."""
    lowered, same, raised = map(np.array, SHADES)
    share = share.clip(-1, 1)[..., None]
    out = same * (1 - np.abs(share)) + np.where(share < 0, lowered, raised) * np.abs(share)
    return np.asarray((255 * out).round().astype(np.uint8))
