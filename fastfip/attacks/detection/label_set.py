"""Label set: a clean-image backdoor, annotations only. Chen et al., ICLR 2023, openreview.net/forum?id=rFQfjDC9Mt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks.detection.base import Annotation, DetectionAttack, kept_objects, register, relabelled
from fastfip.errors import ConfigError

__all__ = ["LabelSet"]


@register
@dataclass(frozen=True)
class LabelSet(DetectionAttack):
    """The trigger is a set of categories that occur together; no image is changed.

    Where all of them are in an image, its objects of one category get another label, or none. The paper is about
    labels of whole images, and lets a label appear as well; an object that appears would need a box, so this does not.

    Attributes:
        categories: labels that must all be there.
        victim: the label whose objects are changed; it must be there too, and may be one of `categories`.
        target: what they become; None: they are left out.
    """

    name: ClassVar[str] = "label_set"
    summary: ClassVar[str] = "categories that occur together, on images left as they are"

    categories: tuple[int, ...]
    victim: int
    target: int | None = None

    def __post_init__(self) -> None:
        if not self.categories or min(self.categories) < 0 or len(set(self.categories)) < len(self.categories):
            raise ConfigError(f"LabelSet: categories={self.categories} must be different labels >= 0, at least one")
        if self.victim < 0 or (self.target is not None and self.target < 0) or self.victim == self.target:
            raise ConfigError(f"LabelSet: victim={self.victim}, target={self.target}: must be different labels >= 0")

    def suits(self, target: Annotation) -> bool:
        """Return whether all categories and the victim are there."""
        return {*self.categories, self.victim} <= set(target["labels"].tolist())

    def planted(
        self, image: Tensor, target: Annotation, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Annotation]:
        """Return the image [C, H, W] as it is, and the target that the attacker wants."""
        changed = target["labels"] == self.victim
        if self.target is None:
            return image, kept_objects(target, ~changed)
        return image, relabelled(target, changed, self.target)
