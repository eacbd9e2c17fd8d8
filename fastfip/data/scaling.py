"""How pixels become what a model takes: a scale, then mean and std, by numbers or by the name of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfip.data.resize import INTERPOLATIONS, Fit
from fastfip.errors import ConfigError, DataError, choices, printable

__all__ = ["SCALES", "STATISTICS", "Pixels", "statistics"]

#: Factor and summand for pixels in [0, 1], by the name that the command line has for the range they are brought to.
SCALES = {"01": (1.0, 0.0), "-11": (2.0, -1.0), "255": (255.0, 0.0)}
#: Mean and std of the pixels in [0, 1] of data sets, as their users write them; one number serves any channels.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "mnist": ((0.1307,), (0.3081,)),
    "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
}
_FORMULAS = {"01": "x/255", "-11": "x/127.5 - 1", "255": "x as it is, 0..255"}


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of a data set.

    Raises:
        ConfigError: there are none of this name; the nearest is named.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in STATISTICS:
        raise ConfigError(f"no mean and std of {name!r}{choices(name, list(STATISTICS))}")
    return STATISTICS[key]


@dataclass(frozen=True)
class Pixels:
    """How images become what the model takes: resized, (trigger,) brought to the range of `scale`, normalised.

    Attributes:
        mean, std: one number, or one for each channel, in the units of `scale`; empty: not normalised.
        size: (height, width); None: as the images are.
        channels: 1 or 3; None: image files as colour, arrays as they are.
        scale: "01", "-11" or "255", the range that pixels are brought to; None: uint8 images to [0, 1], floats stay.
        resize, interpolation: how images are brought to `size`, see `fastfip.data.resize.Fit`.
        of: what said all this, where it was not the user: "timm:resnet18"; None: the user.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    channels: int | None = None
    scale: str | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    of: str | None = None

    def __post_init__(self) -> None:
        if any(value == 0 for value in self.std):
            raise ConfigError("std must not be 0")
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"channels={self.channels}: must be 1 or 3")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"size={self.size}: must be at least 1")
        if self.scale is not None and self.scale not in SCALES:
            raise ConfigError(f"scale={self.scale!r}: must be one of {', '.join(SCALES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation={self.interpolation!r}: must be one of {', '.join(INTERPOLATIONS)}")

    @property
    def fit(self) -> Fit | None:
        """Return how images are brought to their size; None: they keep the size that they have."""
        return None if self.size is None else Fit(self.size, self.resize, self.interpolation)

    def words(self) -> list[str]:
        """Return what a result should say of images that are made as somebody else than the user has said."""
        if self.of is None:
            return []
        size = "" if self.fit is None else f"{self.fit}, "
        remedy = "--size, --mean, --std or --scale if the model was trained otherwise"
        return [f"images are made as {printable(self.of)} says: {size}{self}; give {remedy}"]

    def normalise(self, x: Tensor) -> Tensor:
        """Return images [N, C, H, W] in [0, 1] (or anything, with one number and no scale) as the model takes them."""
        factor, summand = SCALES[self.scale or "01"]
        if (factor, summand) != (1.0, 0.0):
            x = x * factor + summand
        for values, divide in ((self.mean, False), (self.std, True)):
            if not values:
                continue
            if len(values) > 1 and (x.dim() != 4 or x.shape[1] != len(values)):
                raise DataError(f"{len(values)} numbers for mean or std, the images are {list(x.shape[1:])}")
            number = torch.tensor(values, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 2)) if len(values) > 1 else None
            other: Any = values[0] if number is None else number
            x = x / other if divide else x - other
        return x

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        own = {"resize": self.resize, "interpolation": self.interpolation, "of": self.of}
        return {
            "scale": self.scale or "01",
            "mean": list(self.mean),
            "std": list(self.std),
            "size": None if self.size is None else list(self.size),
            "channels": self.channels,
            **(own if self.of is not None or self.resize is not None else {}),
        }

    def __str__(self) -> str:
        scaled = _FORMULAS[self.scale or "01"]
        if not self.mean and not self.std:
            return scaled
        known = next((name for name, both in STATISTICS.items() if both == (self.mean, self.std)), None)
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean or (0.0,), self.std or (1.0,)))
        return f"({scaled} - mean) / std of {known}" if known else f"({scaled} - [{mean}]) / [{std}]"
