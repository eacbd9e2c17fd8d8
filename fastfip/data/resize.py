"""How a picture is brought to the size that a model takes: stretched, or its middle cut out after a resize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.errors import ConfigError, DataError

__all__ = ["INTERPOLATIONS", "Fit"]

#: Names of pillow's filters, as timm, torchvision and transformers have them.
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_BY_TORCH = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Fit:
    """The size that images are brought to, and how.

    Attributes:
        size: (height, width) of the result.
        resize: what comes before the middle of `size` is cut out: the length that the shorter side is brought to, or
            (height, width) to which the image is stretched; None: it is stretched to `size`, and nothing is cut off.
        interpolation: one of `INTERPOLATIONS`.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation={self.interpolation!r}: must be one of {', '.join(INTERPOLATIONS)}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) that an image of this size has before its middle is cut out."""
        if self.resize is None:
            return self.size
        if not isinstance(self.resize, int):
            return self.resize
        short, long = sorted((height, width))
        new = (self.resize, int(self.resize * long / short))
        return new if height <= width else (new[1], new[0])

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Return the first row and column of the middle."""
        rows, columns = self.size
        if height < rows or width < columns:
            raise DataError(f"the middle of {rows} x {columns} is larger than the image, which is {height} x {width}")
        return round((height - rows) / 2), round((width - columns) / 2)

    def picture(self, image: Any) -> Any:
        """Return a picture of pillow in this size."""
        from PIL import Image

        height, width = self.resized(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if self.size == (height, width):
            return image
        top, left = self._corner(height, width)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def batch(self, x: Tensor) -> Tensor:
        """Return images [N, C, H, W] of floats in this size; no filter leaves the range that they have.

        Raises:
            DataError: they are no such images.
        """
        if x.dim() != 4:
            raise DataError(f"--size is for images [N, C, H, W], not {list(x.shape)}")
        height, width = self.resized(*x.shape[-2:])
        if tuple(x.shape[-2:]) != (height, width):
            low, high = x.amin(), x.amax()
            x = self._interpolated(x, height, width).clamp(low, high)
        if self.size == (height, width):
            return x
        top, left = self._corner(height, width)
        return x[..., top : top + self.size[0], left : left + self.size[1]]

    def _interpolated(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.interpolation in _BY_TORCH:
            return F.interpolate(x, (height, width), mode=self.interpolation, antialias=True)
        from PIL import Image

        way = Image.Resampling[self.interpolation.upper()]
        planes = x.float().numpy().reshape(-1, *x.shape[-2:])
        new = np.stack([np.asarray(Image.fromarray(plane).resize((width, height), way)) for plane in planes])
        return torch.from_numpy(new).reshape(*x.shape[:2], height, width)

    def __str__(self) -> str:
        cut = "{} x {}".format(*self.size)
        if self.resize is None:
            return f"stretched to {cut} ({self.interpolation})"
        if isinstance(self.resize, int):
            return f"shorter side {self.resize}, the middle {cut} of it ({self.interpolation})"
        return f"stretched to {self.resize[0]} x {self.resize[1]}, the middle {cut} of it ({self.interpolation})"
