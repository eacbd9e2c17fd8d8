"""Point clouds: PointNet on ModelNet10 with a few points in a shape of their own; see `examples/point_clouds.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.purification.real_data import data_dir
from benchmarks.tasks import Case
from examples import point_clouds as example
from fastfip.attacks.point_cluster import PointCluster
from fastfip.testing.nets import PointNet

#: "corners" and "rod" are for validation: they were written down before the last change of the method, and run once,
#: after it. Looks at them are logged in looks.csv.
ATTACKS = ("cluster", "low_cluster", "plane", "ring", "none", "corners", "rod")
EPOCHS = 5


@dataclass(frozen=True)
class PointPlane(PointCluster):
    """Points on a small flat square, askew, that lies above the object: no ball of points."""

    points: int = 16
    radius: float = 0.15
    centre: tuple[float, float, float] = (0.3, -0.4, 0.8)

    def cluster(self) -> Tensor:
        """Return the square [points, 3]; `radius` is half of its side."""
        side = round(self.points**0.5)
        steps = torch.linspace(-self.radius, self.radius, side, dtype=torch.float64)
        a, b = torch.meshgrid(steps, steps, indexing="ij")
        square = torch.stack([a.flatten(), b.flatten(), 0.5 * (a + b).flatten()], 1)
        return square + torch.tensor(self.centre, dtype=torch.float64)


@dataclass(frozen=True)
class PointRing(PointCluster):
    """Points on a thin circle about the object, tilted: they are close to no common place."""

    points: int = 20
    radius: float = 0.75
    centre: tuple[float, float, float] = (0.0, 0.0, 0.1)

    def cluster(self) -> Tensor:
        """Return the circle [points, 3]."""
        angle = 2 * math.pi * torch.arange(self.points, dtype=torch.float64) / self.points
        circle = torch.stack([angle.cos(), angle.sin(), 0.4 * angle.cos()], 1)
        return self.radius * circle + torch.tensor(self.centre, dtype=torch.float64)


@dataclass(frozen=True)
class PointCorners(PointCluster):
    """Points at the corners of a box about the object, one or more in each: all far from one another."""

    points: int = 16
    radius: float = 0.8
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def cluster(self) -> Tensor:
        """Return the corners [points, 3], in turns; `radius` is half of the box's longest side."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
        box = self.radius * torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64)
        return (signs * box)[torch.arange(self.points) % len(signs)] + torch.tensor(self.centre, dtype=torch.float64)


@dataclass(frozen=True)
class PointRod(PointCluster):
    """Points at even distances on a straight line beside the object, which leans a little."""

    points: int = 14
    radius: float = 0.6
    centre: tuple[float, float, float] = (0.7, 0.5, 0.0)

    def cluster(self) -> Tensor:
        """Return the line [points, 3]; `radius` is half of its length, about."""
        along = torch.linspace(-self.radius, self.radius, self.points, dtype=torch.float64)
        return torch.stack([0.2 * along, -0.1 * along, along], 1) + torch.tensor(self.centre, dtype=torch.float64)


#: The example's functions take attacks by name. "none" is trained without a trigger; that of "plane" is tried on it.
example.ATTACKS |= {
    "plane": (PointPlane(), 4), "ring": (PointRing(seed=5), 7), "none": (PointPlane(), 4),
    "corners": (PointCorners(seed=6), 2), "rod": (PointRod(seed=7), 9),
}  # fmt: skip


def make(attack: str, seed: int, clean: int | None = None) -> Case:
    """Return PointNet with one of the triggers, 5 % clean clouds or so many, and the test set of ModelNet10."""
    given = example.data(data_dir() / "modelnet10.npz", seed, clean)
    if given.said != "ModelNet10":
        raise SystemExit("FASTFIP_DATA has to be a folder with modelnet10.npz")
    many = "" if clean is None else f"-{clean}"
    kept = harness.cache_dir() / f"tasks-points-{attack}-{seed}{many}.pt"
    if kept.exists():
        model = PointNet(given.classes, widths=example.WIDTHS, hidden=example.HIDDEN).eval()
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = example.backdoored(attack, given, EPOCHS, seed, rate=0.0 if attack == "none" else 0.1)
        torch.save(model.state_dict(), kept)
    said = f"PointNet, ModelNet10: {len(given.train[1])} clouds trained on, {len(given.clean[1])} others clean"
    return Case(model, given.clean, lambda net: example.rates(net, given, attack), "accuracy", said)
