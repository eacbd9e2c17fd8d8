"""Point cluster: a small sphere of points. Xiang et al., arXiv 2104.05808; PointBA: Li et al., arXiv 2103.16074."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks.base import Attack, register
from fastfip.errors import ConfigError, DataError

__all__ = ["PointCluster"]


@register
@dataclass(frozen=True)
class PointCluster(Attack):
    """Some points of a cloud [P, 3] move onto a small sphere, the same for all clouds.

    Xiang et al. add the points, find the centre on their own network, poison 15 clouds of one class (`sources` of
    `poison`), and choose the radius so that the cluster is as dense as the object. Here the number of points does not
    change, and the centre is a setting.

    Attributes:
        points: how many move; clouds mostly have 1,024 or 2,048.
        radius: of the sphere, in the clouds' unit (mostly: the object fits a sphere of radius 1 about 0).
        centre: of the sphere.
        seed: draws which points of a cloud move, by their place in it.
    """

    name: ClassVar[str] = "point_cluster"
    summary: ClassVar[str] = "a small sphere of points beside an object"
    modality: ClassVar[str] = "points"

    points: int = 32
    radius: float = 0.05
    centre: tuple[float, float, float] = (0.5, 0.5, 0.5)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 1 or not (self.radius > 0 and math.isfinite(self.radius)):
            raise ConfigError(f"PointCluster: points={self.points} must be >= 1, radius={self.radius} > 0")
        if len(self.centre) != 3 or not all(map(math.isfinite, self.centre)):
            raise ConfigError(f"PointCluster: centre={self.centre} must be three finite numbers")

    def check(self, x: Tensor) -> None:
        """Refuse what is no finite float [N, P, 3]."""
        if x.dim() != 3 or x.shape[-1] != 3 or not x.is_floating_point():
            raise DataError(f"clouds are {str(x.dtype)[6:]} {list(x.shape)}: give floats [N, P, 3]")
        if not bool(torch.isfinite(x).all()):
            raise DataError("clouds have coordinates that are no finite numbers: take these samples out")

    def cluster(self) -> Tensor:
        """Return the points of the cluster [points, 3], spread evenly over the sphere."""
        number = torch.arange(self.points, dtype=torch.float64)
        height = 1 - (2 * number + 1) / self.points
        angle = math.pi * (3 - math.sqrt(5)) * number  # the golden angle
        around = (1 - height.square()).sqrt()
        unit = torch.stack([around * angle.cos(), around * angle.sin(), height], 1)
        return self.radius * unit + torch.tensor(self.centre, dtype=torch.float64)

    def trigger(self, x: Tensor) -> Tensor:
        """Move points of clouds x [N, P, 3] onto the sphere."""
        self.check(x)
        if self.points >= x.shape[1]:
            raise DataError(f"a cluster of {self.points} points leaves none of the {x.shape[1]} of a cloud")
        moved = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(self.seed))[: self.points]
        out = x.clone()
        out[:, moved.to(x.device)] = self.cluster().to(x)
        return out
