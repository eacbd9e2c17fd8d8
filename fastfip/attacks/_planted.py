"""What is planted, and a training set with backdoors in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfip.attacks._kept import settings_of
from fastfip.attacks.base import Attack, AttackTarget, attack_labels, for_images, get, in_range
from fastfip.errors import DataError

__all__ = ["Injection", "Planted"]


@dataclass(frozen=True)
class Injection:
    """One backdoor: which attack, where it leads, and how much of the training set it takes.

    Attributes:
        attack: an attack, or its name with its usual settings.
        target: class number, or "next".
        rate: share of the whole training set; None: what is usual for the attack, or, if there are fewer, all images
            that it could take.
        sources: only images of these classes carry the trigger (source-specific); None: of all.
    """

    attack: Attack | str
    target: AttackTarget = 0
    rate: float | None = None
    sources: tuple[int, ...] | None = None

    def ready(self) -> tuple[Attack, float]:
        """Return the attack and its rate."""
        attack = get(self.attack)() if isinstance(self.attack, str) else self.attack
        return attack, attack.usual_rate if self.rate is None else self.rate

    def check(self, y: Tensor, classes: int) -> None:
        """Refuse what cannot be planted among images with labels y [N], before anything is trained.

        Raises:
            ConfigError: the attack is not for images.
            DataError: more images are wanted than there are, or none though a rate above 0 is.
        """
        attack, _ = self.ready()
        for_images(attack)
        drawn = torch.Generator().manual_seed(0)  # how many there are does not hang on it
        self.enough(attack.chosen(y, self.rate, self.target, classes, drawn, self.sources), len(y))

    def enough(self, places: Tensor, n: int) -> None:
        """Refuse to poison none of n images, unless the rate is 0."""
        attack, rate = self.ready()
        if len(places) or self.rate == 0:
            return
        if round(rate * n) == 0:
            raise DataError(f"{attack.name}: a rate of {rate:g} is none of {n} images: give a larger one")
        kind = f"of the target class {self.target}" if attack.clean_label else "that are not of the target class"
        kind += "" if self.sources is None else f" and of the classes {list(self.sources)}"
        raise DataError(f"{attack.name}: there are no images {kind} that could be poisoned")

    def said(self) -> str:
        """Return by what it is known: the attack as it was given, and what is asked of it."""
        attack, _ = self.ready()
        return f"{settings_of(attack)} to {self.target}, rate {self.rate}, sources {self.sources}"


class Planted:
    """A training set with backdoors in it: batches of what is trained on."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> None:
        self.x, self.y, self.classes, self.generator = x, y.clone(), classes, generator
        self.true = y
        self.injections: list[Injection] = []
        self.places: list[Tensor] = []
        self.taken = torch.zeros(len(y), dtype=torch.bool)
        self.stored = torch.full((len(y),), -1)  # place in `triggered` of each image
        self.triggered = in_range(x[:0])  # [K, C, H, W], those of all injections
        self.false = torch.full((len(y),), -1)  # number of the injection whose negatives these are

    def add(self, injection: Injection) -> None:
        attack, _ = injection.ready()
        places = attack.chosen(
            self.true, injection.rate, injection.target, self.classes, self.generator, injection.sources, self.taken
        )
        injection.enough(places, len(self.y))
        self.taken[places] = True
        before = len(self.triggered)
        self.stored[places] = torch.arange(len(places)) + before
        if len(places):  # made once in its whole size: parts that are joined take the memory twice
            old, self.triggered = self.triggered, self.triggered.new_empty(before + len(places), *self.x.shape[1:])
            self.triggered[:before] = old
        for part in places.split(500) if len(places) else ():
            self.triggered[self.stored[part]] = attack.training_trigger(in_range(self.x[part]), self.generator)
        self.y[places] = attack_labels(self.true, injection.target, self.classes)[places]
        free = torch.nonzero(~self.taken).flatten()
        count = min(len(free), round(attack.negative_ratio * len(places)))
        negatives = free[torch.randperm(len(free), generator=self.generator)[:count]]
        self.taken[negatives] = True
        self.false[negatives] = len(self.injections)
        self.injections.append(
            replace(injection, rate=len(places) / len(self.y)) if injection.rate is None else injection
        )
        self.places.append(places)

    def batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] and labels as they are trained on."""
        x = in_range(self.x[places])
        x = x.clone() if x.dtype == self.x.dtype else x
        stored = self.stored[places]
        if bool((stored >= 0).any()):
            x[stored >= 0] = self.triggered[stored[stored >= 0]]
        false = self.false[places]
        for number in false[false >= 0].unique().tolist():
            attack, _ = self.injections[number].ready()
            here = false == number
            x[here] = attack.labelled_negatives(x[here], self.true[places[here]], self.generator)
        return x, self.y[places]
