"""What an attack is, and how it is found.

Images are floats [N, C, H, W] in the pixel range [0, 1] everywhere here: put the trigger on before the model's own
normalisation. Labels are int64 [N]. Attacks of another `modality` take other samples in the place of images: their
`check` says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastfip.errors import ConfigError, DataError
from fastfip.registry import Registry

__all__ = ["Attack", "AttackTarget", "Ground", "attack_labels", "get", "names", "register"]

#: One class for all images (all to one), or "next": (y + 1) mod C (all to all).
AttackTarget = int | Literal["next"]


@dataclass(frozen=True)
class Ground:
    """What an attacker has, for attacks that train something: a classifier, the training set, and the goal.

    Attributes:
        model: returns logits [N, classes] for normalised images. It is a copy: of the model that was given, and nothing
            becomes of it; for an attack that `trains_model` the one that is trained on afterwards.
        x: training images [N, C, H, W], floats in [0, 1] or uint8; `images` returns floats.
        y: their labels [N].
        target: the attack's label, or "next".
        classes: C.
        normalise: brings images in [0, 1] to what the model takes.
        generator: of everything random, on the CPU.
        effort: factor of the number of steps that an attack takes by itself; for tests and quick looks.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    target: AttackTarget
    classes: int
    normalise: Callable[[Tensor], Tensor]
    generator: torch.Generator
    effort: float = 1.0

    def logits(self, x: Tensor) -> Tensor:
        """Return the model's logits [N, classes] of images [N, C, H, W] in [0, 1], on the device of the images."""
        where = next((p.device for p in self.model.parameters()), x.device)
        return self.model(self.normalise(x).to(where)).to(x.device)

    def steps(self, usual: int) -> int:
        """Return how many steps to take, at least one."""
        return max(1, round(usual * self.effort))

    def batch(self, size: int, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `size` random images and labels, of the places `only` [K] if given."""
        places = torch.randint(len(self.y) if only is None else len(only), (size,), generator=self.generator)
        places = places if only is None else only[places]
        return self.images(places), self.y[places]

    def images(self, places: Tensor) -> Tensor:
        """Return the training images at some places [K] as floats in [0, 1]."""
        return in_range(self.x[places])

    def wanted(self, y: Tensor) -> Tensor:
        """Return the attacker's labels for true ones [N]."""
        return attack_labels(y, self.target, self.classes)

    def single_target(self, attack: str) -> int:
        """Return the target class of an attack that can have only one.

        Raises:
            ConfigError: the target is "next".
        """
        if self.target == "next":
            raise ConfigError(f"{attack} leads to one class: give its number as the target, not 'next'")
        return int(self.target)


class Attack(ABC):
    """How a backdoor is planted. Subclass it as a frozen dataclass under `@register`.

    `trigger` is all that most attacks have. What others need beside it: `clean_label` where images of the target class
    are poisoned and labels stay; `training_trigger` where training images carry something else than test images;
    `negatives` where images with a false trigger keep their labels in training; `fit` where something is trained first.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: What it is for: "images", "tokens" (int64 [N, T]), "points" ([N, P, 3]), "clips" (five axes, the last two H, W).
    modality: ClassVar[str] = "images"
    #: Only images of the target class are poisoned, and keep their label.
    clean_label: ClassVar[bool] = False
    #: The attack itself says of which classes the images are; clean-label attacks have no need of it.
    own_sources: ClassVar[bool] = False
    #: `fit` trains the classifier of its ground together with the trigger, and the training goes on from there.
    trains_model: ClassVar[bool] = False
    #: Share of the training set that is poisoned where nobody says otherwise; BackdoorBench's.
    usual_rate: ClassVar[float] = 0.1
    #: Number of images with a false trigger and their true label, as a multiple of the poisoned ones.
    negative_ratio: ClassVar[float] = 0.0

    def check(self, x: Tensor) -> None:
        """Refuse samples that the attack is not for; an attack of another modality than images has its own.

        Raises:
            DataError: they are no floats [N, C, H, W] in [0, 1].
        """
        check_pixels(x, "images", "[N, C, H, W]", 4)

    @abstractmethod
    def trigger(self, x: Tensor) -> Tensor:
        """Return images x [N, C, H, W] in [0, 1] with the trigger on them; x itself is left alone.

        What becomes of an image does not depend on the others of its batch.
        """

    def training_trigger(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return what is put into the training set for images x [N, C, H, W] in [0, 1]: by default the trigger."""
        return self.trigger(x)

    def negatives(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images x [N, C, H, W] with a false trigger; drawn anew for each pass of the training.

        Only called where `negative_ratio` is above 0.
        """
        raise NotImplementedError(f"{self.name} has no negatives")

    def labelled_negatives(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return `negatives` of images x [N, C, H, W]; for attacks where they hang on the true labels y [N]."""
        return self.negatives(x, generator)

    def fit(self, ground: Ground) -> Attack:
        """Train what the attack needs; return the attack that has it. Self where nothing has to be trained.

        An attack that was fitted before is fitted anew: what it had belongs to another ground. Only a pattern that the
        user gave as a setting stays.
        """
        return self

    def poison(
        self,
        x: Tensor,
        y: Tensor,
        rate: float,
        target: AttackTarget = 0,
        classes: int | None = None,
        generator: torch.Generator | None = None,
        sources: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the trigger on a share of a training set.

        Args:
            x: images [N, C, H, W] in [0, 1], or samples of the attack's modality.
            y: labels [N].
            rate: share of the whole set that is poisoned; chosen among the images that are not of the target class
                (clean-label attacks: that are).
            target: the attack's label, or "next".
            classes: C, needed for "next"; None: the largest label and one.
            generator: chooses the images.
            sources: only images of these classes are poisoned; None: of all.

        Returns:
            (images, labels, indices of the poisoned ones [K]); x and y themselves are left alone.

        Raises:
            DataError: samples that `check` refuses, a rate outside [0, 1], or more images wanted than there are.
        """
        self.check(x)
        index = self.chosen(y, rate, target, classes, generator, sources)
        wanted = attack_labels(y, target, classes)
        x, y = x.clone(), y.clone()
        x[index], y[index] = self.training_trigger(x[index], generator), wanted[index]
        return x, y, index

    def chosen(
        self,
        y: Tensor,
        rate: float | None,
        target: AttackTarget = 0,
        classes: int | None = None,
        generator: torch.Generator | None = None,
        sources: Sequence[int] | None = None,
        taken: Tensor | None = None,
    ) -> Tensor:
        """Return the places [K], ascending, of the images that `poison` puts the trigger on.

        Args:
            y: labels [N].
            rate: share of the whole set; None: what is usual for the attack, or all that there are if these are fewer.
            target: the attack's label, or "next".
            classes: C.
            generator: chooses the images.
            sources: only images of these classes are poisoned; None: of all.
            taken: mask [N] of images that are not free.

        Raises:
            DataError: a rate outside [0, 1], more images wanted than there are, or `sources` of an attack that cannot
                be made specific.
        """
        if rate is not None and not 0 <= rate <= 1:
            raise DataError(f"rate={rate}: must be >= 0 and <= 1")
        self._check_sources(sources)
        wanted = attack_labels(y, target, classes)
        if self.clean_label and target == "next":
            raise DataError(f"{self.name} keeps labels, so it has one target class: target='next' is not possible")
        free = (wanted == y) if self.clean_label else _attacked(y, wanted, sources)
        places = torch.nonzero(free if taken is None else free & ~taken).flatten()
        count = min(round(self.usual_rate * len(y)), len(places)) if rate is None else round(rate * len(y))
        if count > len(places):
            kind = "of the target class" if self.clean_label else "not of the target class"
            kind += "" if sources is None else f" and of the classes {list(sources)}"
            kind += "" if taken is None else " and free"
            raise DataError(f"rate={rate} asks for {count} images, {len(places)} are {kind}")
        return places[torch.randperm(len(places), generator=generator)[:count]].sort().values

    def asr_set(
        self,
        x: Tensor,
        y: Tensor,
        target: AttackTarget = 0,
        classes: int | None = None,
        sources: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (triggered images, attack labels, true labels) of a test set without the images of the target class.

        A loader over these three is what `fastfip.evaluate` takes as `asr_loader`.

        Args:
            x: images [N, C, H, W] in [0, 1], or samples of the attack's modality.
            y: true labels [N].
            target: the attack's label, or "next".
            classes: C.
            sources: of a source-specific attack, the classes that it is for.

        Raises:
            DataError: samples that `check` refuses, or `sources` that `attacked` does.
        """
        self.check(x)
        wanted, keep = attack_labels(y, target, classes), self.attacked(y, target, classes, sources)
        x = x[keep]
        return self.trigger(x) if len(x) else x, wanted[keep], y[keep]

    def attacked(
        self, y: Tensor, target: AttackTarget = 0, classes: int | None = None, sources: Sequence[int] | None = None
    ) -> Tensor:
        """Return the mask [N] of the test images that `asr_set` takes, by their true labels y [N].

        Args:
            y: true labels [N].
            target: the attack's label, or "next".
            classes: C.
            sources: of a source-specific attack, the classes that it is for.

        Raises:
            DataError: a target that is no class, or `sources` of an attack that cannot be made specific.
        """
        self._check_sources(sources)
        return _attacked(y, attack_labels(y, target, classes), sources)

    def _check_sources(self, sources: Sequence[int] | None) -> None:
        if sources is not None and (self.clean_label or self.own_sources):
            which = "only poisons images of the target class" if self.clean_label else "has source classes of its own"
            raise DataError(f"{self.name} {which}: leave out the sources {list(sources)}")

    def _needs(self, part: object, what: str) -> None:
        """Refuse to put on a trigger whose trained part is not there."""
        if part is None:
            raise ConfigError(f"{self.name} has no {what} yet: fit it, as fastfip.attacks.poison_and_train does")


def _attacked(y: Tensor, wanted: Tensor, sources: Sequence[int] | None) -> Tensor:
    keep = wanted != y
    return keep if sources is None else keep & torch.isin(y, torch.tensor(list(sources), device=y.device))


def attack_labels(y: Tensor, target: AttackTarget, classes: int | None = None) -> Tensor:
    """Return the label that the attacker wants for each true label y [N]."""
    if target == "next":
        return (y + 1) % (int(y.max()) + 1 if classes is None else classes)
    if not isinstance(target, int) or target < 0:
        raise DataError(f"target={target!r}: must be a class index or 'next'")
    if classes is not None and target >= classes:
        raise DataError(f"target={target}: there are {classes} classes, 0 to {classes - 1}")
    return torch.full_like(y, target)


REGISTRY: Registry[type[Attack]] = Registry("attack", "fastfip.attacks", Attack)
register, names, get = REGISTRY.register, REGISTRY.names, REGISTRY.get


def in_range(x: Tensor) -> Tensor:
    """Return images as floats in [0, 1]: bytes are divided by 255, floats stay."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def check_pixels(x: Tensor, what: str, form: str, axes: int) -> None:
    """Refuse images or clips that are no floats in [0, 1] with so many axes."""
    if x.dim() != axes or not x.is_floating_point():
        raise DataError(f"{what} are {str(x.dtype)[6:]} {list(x.shape)}: give floats {form} in [0, 1]")
    if x.numel() and (float(x.min()) < 0 or float(x.max()) > 1):
        raise DataError(
            f"pixels run from {float(x.min()):.3g} to {float(x.max()):.3g}: put triggers on before normalising"
        )


def for_images(attack: Attack) -> Attack:
    """Return an attack that is one on images.

    Raises:
        ConfigError: it is for something else.
    """
    if attack.modality != "images":
        remedy = "use its `poison` and `asr_set` from Python"
        raise ConfigError(f"the attack {attack.name} is for {attack.modality}, not for images: {remedy}")
    return attack
