"""What BackdoorBench's code says of each data set and its files do not: how pixels become a network's inputs."""

from __future__ import annotations

from typing import Any

from fastfip.data.scaling import Pixels
from fastfip.errors import CheckpointError, ConfigError, printable

__all__ = ["NORMALISATION", "image_size", "pixels_of"]

#: Mean and std of pixels in [0, 1] by the name of the data set; empty: none (`get_dataset_normalization`, version 2.2).
#: Those of CIFAR-10 and GTSRB are not the ones that `--mean cifar10` and `--mean gtsrb` stand for.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.5,), (0.5,)),
    "gtsrb": ((), ()),
    "celeba": ((), ()),
}
#: The images of its data sets have at most 224 x 224 pixels; a file that says more would have each of them enlarged.
MOST_SIDE = 512


def image_size(value: Any) -> tuple[int, int, int]:
    """Return height, width and channels, from what a file says.

    Raises:
        CheckpointError: it says something else.
    """
    sound = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(side) is int for side in value)
    if not sound or not all(1 <= side <= MOST_SIDE for side in value[:2]) or value[2] not in (1, 3):
        said = printable(value, 60) if sound else f"a {type(value).__name__}"
        raise CheckpointError(f"says that its images are {said}, not height, width and 1 or 3 channels")
    height, width, channels = value
    return height, width, channels


def pixels_of(dataset: str, size: tuple[int, int, int]) -> Pixels:
    """Return how images of a data set become inputs.

    Raises:
        ConfigError: it is none of BackdoorBench's.
    """
    if dataset not in NORMALISATION:
        raise ConfigError(
            f"{printable(dataset, 60)!r} is no data set of BackdoorBench ({', '.join(NORMALISATION)}): "
            "give mean and std (--mean, --std)"
        )
    mean, std = NORMALISATION[dataset]
    return Pixels(mean, std, size[:2], size[2])
