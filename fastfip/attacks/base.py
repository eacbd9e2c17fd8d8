"""What an attack is, and how it is found.

Images are floats [N, C, H, W] in the pixel range [0, 1] everywhere here: put the trigger on before the model's own
normalisation. Labels are int64 [N].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.errors import DataError
from fastfip.registry import Registry

__all__ = ["Attack", "AttackTarget", "attack_labels", "get", "names", "register"]

#: One class for all images (all to one), or "next": (y + 1) mod C (all to all).
AttackTarget = int | Literal["next"]


class Attack(ABC):
    """How a trigger is put on images. Subclass it as a frozen dataclass under `@register`."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def trigger(self, x: Tensor) -> Tensor:
        """Return images x [N, C, H, W] in [0, 1] with the trigger on them; x itself is left alone."""

    def poison(
        self,
        x: Tensor,
        y: Tensor,
        rate: float,
        target: AttackTarget = 0,
        classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the trigger on a share of a training set.

        Args:
            x: images [N, C, H, W] in [0, 1].
            y: labels [N].
            rate: share of the whole set that is poisoned; chosen among the images that are not of the target class.
            target: the attack's label, or "next".
            classes: C, needed for "next"; None: the largest label and one.
            generator: chooses the images.

        Returns:
            (images, labels, indices of the poisoned ones [K]); x and y themselves are left alone.

        Raises:
            DataError: images that are no floats in [0, 1], a rate outside [0, 1], or more images wanted than there are.
        """
        _check_images(x)
        if not 0 <= rate <= 1:
            raise DataError(f"rate={rate}: must be >= 0 and <= 1")
        wanted = attack_labels(y, target, classes)
        others = torch.nonzero(wanted != y).flatten()
        count = round(rate * len(y))
        if count > len(others):
            raise DataError(f"rate={rate} asks for {count} images, {len(others)} are not of the target class")
        index = others[torch.randperm(len(others), generator=generator)[:count]].sort().values
        x, y = x.clone(), y.clone()
        x[index], y[index] = self.trigger(x[index]), wanted[index]
        return x, y, index

    def asr_set(
        self, x: Tensor, y: Tensor, target: AttackTarget = 0, classes: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (triggered images, attack labels, true labels) of a test set without the images of the target class.

        A loader over these three is what `fastfip.evaluate` takes as `asr_loader`.

        Raises:
            DataError: images that are no floats in [0, 1].
        """
        _check_images(x)
        wanted = attack_labels(y, target, classes)
        keep = wanted != y
        return self.trigger(x[keep]), wanted[keep], y[keep]


def attack_labels(y: Tensor, target: AttackTarget, classes: int | None = None) -> Tensor:
    """Return the label that the attacker wants for each true label y [N]."""
    if target == "next":
        return (y + 1) % (int(y.max()) + 1 if classes is None else classes)
    if not isinstance(target, int) or target < 0 or (classes is not None and target >= classes):
        raise DataError(f"target={target!r}: must be a class index or 'next'")
    return torch.full_like(y, target)


REGISTRY: Registry[type[Attack]] = Registry("attack", "fastfip.attacks", Attack)
register, names, get = REGISTRY.register, REGISTRY.names, REGISTRY.get


def _check_images(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise DataError(f"images are {str(x.dtype)[6:]} {list(x.shape)}: give floats [N, C, H, W] in [0, 1]")
    if x.numel() and (float(x.min()) < 0 or float(x.max()) > 1):
        raise DataError(
            f"pixels run from {float(x.min()):.3g} to {float(x.max()):.3g}: put triggers on before normalising"
        )
