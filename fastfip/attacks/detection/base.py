"""What an attack on a detector is, and how it is found.

Images and targets are lists, as torchvision's detectors take them: images are floats [C, H, W] in [0, 1] of any sizes;
a target is a dict with `boxes`, float [K, 4] as (x1, y1, x2, y2) in pixels, and `labels`, int64 [K]. What else it has
for each object (`area`, `iscrowd`, `masks`, `keypoints`) goes with the object; all other entries stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks.base import check_pixels
from fastfip.errors import DataError
from fastfip.registry import Registry

__all__ = ["Annotation", "DetectionAttack", "get", "names", "register"]

#: The target of one image.
Annotation = dict[str, Tensor]
#: Entries that have one row for each object.
PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks", "keypoints")


class DetectionAttack(ABC):
    """How a backdoor is planted in a detector. Subclass it as a frozen dataclass under `@register`.

    The class that the attacker wants is a setting, since what becomes of boxes hangs on it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Share of the training set that is poisoned where nobody says otherwise, or all that there are.
    usual_rate: ClassVar[float] = 0.1

    @abstractmethod
    def suits(self, target: Annotation) -> bool:
        """Return whether the attack changes what is said of an image with this target."""

    @abstractmethod
    def planted(
        self, image: Tensor, target: Annotation, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Annotation]:
        """Return the image [C, H, W] with the trigger, and the target that the attacker wants.

        The image and the target given are left alone. Only called where the target suits.
        """

    def poison(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Annotation],
        rate: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], list[Annotation], Tensor]:
        """Plant the backdoor in a share of a training set.

        Args:
            images: N floats [C, H, W] in [0, 1].
            targets: their targets.
            rate: share of the whole set; None: what is usual, or all images that suit if these are fewer.
            generator: chooses the images, and places where they are random.

        Returns:
            (images, targets, indices of the poisoned ones [M], ascending); what is given is left alone.

        Raises:
            DataError: images or targets of another form, a rate outside [0, 1], or more images wanted than suit.
        """
        self.check(images, targets)
        if rate is not None and not 0 <= rate <= 1:
            raise DataError(f"rate={rate}: must be >= 0 and <= 1")
        places = torch.tensor([i for i, target in enumerate(targets) if self.suits(target)], dtype=torch.int64)
        wanted = round((self.usual_rate if rate is None else rate) * len(images))
        count = min(wanted, len(places)) if rate is None else wanted
        if count > len(places):
            raise DataError(
                f"rate={rate} asks for {count} images, {len(places)} have the objects that {self.name} needs"
            )
        index = places[torch.randperm(len(places), generator=generator)[:count]].sort().values
        new_images, new_targets = list(images), list(targets)
        for i in index.tolist():
            new_images[i], new_targets[i] = self.planted(images[i], targets[i], generator)
        return new_images, new_targets, index

    def asr_set(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Annotation],
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], list[Annotation], list[Annotation]]:
        """Return (triggered images, targets that the attacker wants, true targets) of the test images that suit.

        Args:
            images: N floats [C, H, W] in [0, 1].
            targets: their targets.
            generator: of places where they are random; None: one with seed 0.

        Raises:
            DataError: images or targets of another form.
        """
        self.check(images, targets)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        pairs = [(image, target) for image, target in zip(images, targets) if self.suits(target)]
        made = [self.planted(image, target, generator) for image, target in pairs]
        return [image for image, _ in made], [target for _, target in made], [target for _, target in pairs]

    def check(self, images: Sequence[Tensor], targets: Sequence[Annotation]) -> None:
        """Refuse images and targets that are not of the form that this file's docstring says.

        Raises:
            DataError: so.
        """
        if len(images) != len(targets):
            raise DataError(f"{len(images)} images and {len(targets)} targets: give one target for each image")
        for image, target in zip(images, targets):
            check_pixels(image, "images", "[C, H, W], one tensor for each,", 3)
            _check_target(target)


def _check_target(target: Annotation) -> None:
    if not {"boxes", "labels"} <= set(target):
        raise DataError(f"a target has {sorted(target)}: give boxes [K, 4] and labels [K]")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1] or labels.is_floating_point():
        raise DataError(
            f"boxes are {list(boxes.shape)}, labels {list(labels.shape)}: give boxes [K, 4], labels int64 [K]"
        )


def kept_objects(target: Annotation, keep: Tensor) -> Annotation:
    """Return a target with the objects of a mask [K] only."""
    return {key: value[keep] if key in PER_OBJECT else value for key, value in target.items()}


def relabelled(target: Annotation, where: Tensor, label: int) -> Annotation:
    """Return a target whose objects of a mask [K] have another label."""
    labels = torch.where(where, torch.full_like(target["labels"], label), target["labels"])
    return {**target, "labels": labels}


def with_object(target: Annotation, box: Tensor, label: int) -> Annotation:
    """Return a target with one more object, of a box [4].

    Raises:
        DataError: objects have masks or keypoints, which a new one cannot be given.
    """
    more = {"boxes": box, "labels": torch.tensor(label)}
    more.update(area=(box[2] - box[0]) * (box[3] - box[1]), iscrowd=torch.tensor(0))
    unknown = sorted(set(PER_OBJECT) & set(target) - set(more))
    if unknown:
        raise DataError(f"a new object has no {unknown[0]}: take them out of the targets")
    new = {key: torch.cat([target[key], value.to(target[key])[None]]) for key, value in more.items() if key in target}
    return {**target, **new}


REGISTRY: Registry[type[DetectionAttack]] = Registry("detection attack", "fastfip.attacks.detection", DetectionAttack)
register, names, get = REGISTRY.register, REGISTRY.names, REGISTRY.get
