"""Draw docs/pictures/attacks.png: for each attack three photographs, the same with the trigger, and what changed.

    python -m benchmarks.suite.pictures            # the files are those of the suite, see docs/suite.md

Attacks that find or train something first are taken from the networks of the suite that lie in the cache, with the
images that were kept there; nothing is trained, and attacks without a network are named and left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.purification import real_data
from benchmarks.suite.networks import BASES, NETWORKS, Network, folder, prepare
from fastfip.attacks import attack_labels, get, names
from fastfip.data.scaling import Pixels
from fastfip.errors import ConfigError
from fastfip.reporting.plots import new_figure, saved

FILE = harness.DOCS / "pictures" / "attacks.png"
#: Classes of CIFAR-10 whose first test image is shown: a car, a horse, a ship.
SHOWN = (1, 7, 8)
#: The factors that a difference may be multiplied by.
FACTORS = (1, 2, 3, 5, 10, 20, 30, 50)


class Drawn(NamedTuple):
    """A row of the picture: clean and triggered images [3, C, H, W] in [0, 1]."""

    name: str
    clean: Tensor
    triggered: Tensor

    def factor(self) -> int:
        """Return the largest factor at which no change leaves the range of colours, at least 1."""
        most = float((self.triggered - self.clean).abs().max())
        return max(factor for factor in FACTORS if factor == 1 or factor * most <= 0.5)

    def difference(self) -> Tensor:
        """Return the enlarged differences about grey, [3, C, H, W] in [0, 1]."""
        return (0.5 + self.factor() * (self.triggered - self.clean)).clamp(0, 1)


def photographs() -> Tensor:
    """Return a test image of each class in SHOWN, [3, 3, 32, 32] in [0, 1]."""
    data = real_data.cifar10()
    places = [int(np.flatnonzero(data["test_y"] == c)[0]) for c in SHOWN]
    return torch.from_numpy(np.array(data["test_x"][places])).permute(0, 3, 1, 2).float() / 255


def in_pixels(pixels: Pixels, x: Tensor) -> Tensor:
    """Return what a model takes [N, C, H, W] as images in [0, 1], in steps of 1 / 255."""
    mean, std = (
        torch.tensor(values or (start,)).view(1, -1, 1, 1) for values, start in ((pixels.mean, 0.0), (pixels.std, 1.0))
    )
    return (255 * (x * std + mean)).round().clamp(0, 255) / 255


def of_network(network: Network) -> Drawn:
    """Return the row of a network of the suite with one backdoor.

    Raises:
        ValueError: the kept images are not those of the test set that the attack takes.
    """
    made = prepare(network)
    x, y = made.test
    (backdoor,), (triggered, _, true) = network.backdoors, made.triggered[0]
    attacked = attack_labels(y, backdoor.target, int(y.max()) + 1) != y
    if backdoor.attack == "cba":
        attacked &= y == get("cba")(**dict(backdoor.settings)).first
    if backdoor.sources is not None:
        attacked &= torch.isin(y, torch.tensor(backdoor.sources))
    places = torch.nonzero(attacked).flatten()[: len(true)]
    if not torch.equal(y[places], true):
        raise ValueError(f"{network.name}: the triggered images are not those of its test set")
    wanted = [int(torch.nonzero(true == c)[0]) for c in SHOWN if bool((true == c).any())]
    few = (wanted + [i for i in range(len(true)) if i not in wanted])[: len(SHOWN)]
    clean, shown = (in_pixels(made.base.pixels, part[few]) for part in (x[places], triggered))
    return Drawn(backdoor.attack, clean, shown)


def kept() -> dict[str, Network]:
    """Return the first network of each attack that has this one backdoor, is for CIFAR-10, and lies in the cache."""
    out: dict[str, Network] = {}
    for network in NETWORKS.values():
        fits = len(network.backdoors) == 1 and BASES[network.base].dataset == "cifar10"
        if fits and (folder() / f"{network.key()}.pth").exists():
            out.setdefault(network.backdoors[0].attack, network)
    return out


def rows() -> tuple[list[Drawn], list[str]]:
    """Return the rows of the picture, and the attacks on images that have none."""
    found, absent, networks, x = [], [], kept(), photographs()
    for name in names():
        kind = get(name)
        if kind.modality != "images" or not kind.__module__.startswith("fastfip."):
            continue
        try:
            found.append(Drawn(name, x, kind().trigger(x)))
            continue
        except ConfigError:  # it has to be fitted first
            pass
        if name in networks:
            found.append(of_network(networks[name]))
        else:
            absent.append(name)
    return found, absent


def draw(drawn: Iterable[Drawn], path: Path) -> None:
    """Write the picture: a row for each attack; image, triggered image and difference three times."""
    drawn = list(drawn)
    columns = 3 * len(SHOWN)
    figure = new_figure(0.62 * columns + 1.5, 0.66 * len(drawn) + 0.3)
    axes = figure.subplots(len(drawn), columns, squeeze=False)
    for one, line in zip(drawn, axes):
        images = torch.stack([one.clean, one.triggered, one.difference()], 1).flatten(0, 1)
        for place, (image, axis) in enumerate(zip(images, line)):
            axis.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if one is drawn[0]:
                axis.set_title(("image", "trigger", "difference")[place % 3], fontsize=7)
        label = f"{one.name}\ndifference x {one.factor()}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved(figure, path)


def main() -> None:
    """Draw the picture."""
    harness.Parser(__doc__).parse()
    real_data.require()
    drawn, absent = rows()
    draw(drawn, FILE)
    print(f"{FILE}: {', '.join(one.name for one in drawn)}")
    if absent:
        print(f"left out, as no network with it lies in {folder()}: {', '.join(absent)}")


if __name__ == "__main__":
    main()
