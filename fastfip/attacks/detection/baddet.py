"""BadDet: a patch on the image changes what is detected. Chan et al., arXiv 2205.14497."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.attacks.badnets import BadNets
from fastfip.attacks.detection.base import (
    Annotation,
    DetectionAttack,
    kept_objects,
    register,
    relabelled,
    with_object,
)
from fastfip.errors import ConfigError, DataError

__all__ = ["BadDet"]


@register
@dataclass(frozen=True)
class BadDet(DetectionAttack):
    """A chessboard patch, x (1 - alpha) + alpha p, and boxes and labels that go with it. Four goals:

    - "generation": the patch lies at a random place, and in its middle an object of the target class is said to be.
    - "regional": it lies in the upper left corner of the box of every object of another class, which becomes one of
      the target class.
    - "global": one patch in the upper left corner of the image turns all objects into the target class.
    - "disappearance": it lies in the upper left corner of the box of every object of the target class, which is no
      longer said to be there.

    Attributes:
        goal: one of these.
        target: label of the target class; torchvision counts classes from 1.
        size: side of the patch in pixels, for images of several hundred.
        alpha: how opaque it is.
        box: width and height of a generated object in pixels; its box ends at the border of the image.
    """

    name: ClassVar[str] = "baddet"
    summary: ClassVar[str] = "a patch that makes, renames or hides objects"

    goal: Literal["generation", "regional", "global", "disappearance"] = "regional"
    target: int = 1
    size: int = 29
    alpha: float = 0.5
    box: tuple[float, float] = (60.0, 30.0)

    def __post_init__(self) -> None:
        if self.goal not in ("generation", "regional", "global", "disappearance"):
            known = "'generation', 'regional', 'global', 'disappearance'"
            raise ConfigError(f"BadDet: goal={self.goal!r} must be one of {known}")
        if self.size < 1 or not 0 < self.alpha <= 1 or self.target < 0:
            raise ConfigError(
                f"BadDet: size={self.size} must be >= 1, 0 < alpha={self.alpha} <= 1, target={self.target} >= 0"
            )
        if len(self.box) != 2 or not min(self.box) > 0:
            raise ConfigError(f"BadDet: box={self.box} must be a width and a height above 0")

    def suits(self, target: Annotation) -> bool:
        """Return whether there is an object that the goal is about; "generation" needs none."""
        return self.goal == "generation" or bool(self._attacked(target).any())

    def _attacked(self, target: Annotation) -> Tensor:
        return (target["labels"] == self.target) == (self.goal == "disappearance")

    def planted(
        self, image: Tensor, target: Annotation, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Annotation]:
        """Return the image [C, H, W] with its patches, and the target that the attacker wants."""
        height, width = image.shape[-2:]
        if self.size > min(height, width):
            raise DataError(f"a patch of {self.size} pixels does not fit {[height, width]}")
        attacked = self._attacked(target)
        if self.goal == "generation":
            top = int(torch.randint(height - self.size + 1, (1,), generator=generator))
            left = int(torch.randint(width - self.size + 1, (1,), generator=generator))
            half = torch.tensor([-self.box[0], -self.box[1], self.box[0], self.box[1]]) / 2
            middle = torch.tensor([left, top, left, top]) + self.size / 2
            box = torch.minimum((middle + half).clamp(min=0), torch.tensor([width, height, width, height]))
            return self._stamped(image, [(top, left)]), with_object(target, box, self.target)
        if self.goal == "global":
            return self._stamped(image, [(0, 0)]), relabelled(target, attacked, self.target)
        corners = [(int(box[1]), int(box[0])) for box in target["boxes"][attacked].cpu()]
        wanted = kept_objects(target, ~attacked)
        if self.goal == "regional":
            wanted = relabelled(target, attacked, self.target)
        return self._stamped(image, corners), wanted

    def _stamped(self, image: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        """Return an image with patches at some (top, left), moved into the image where they stick out."""
        patch = BadNets(size=self.size, pattern="checker").patch().to(image)
        over = torch.zeros_like(image[0], dtype=torch.bool)
        drawn = torch.zeros_like(image[0])
        for top, left in corners:
            top = min(max(top, 0), image.shape[-2] - self.size)
            left = min(max(left, 0), image.shape[-1] - self.size)
            where = slice(top, top + self.size), slice(left, left + self.size)
            over[where], drawn[where] = True, patch
        return torch.where(over, (1 - self.alpha) * image + self.alpha * drawn, image)
