"""The clean classifier that patterns are found on, and patterns that lead many images to a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._generators import in_bytes
from fastfip.attacks.base import Ground
from fastfip.data.augment import crop_flip
from fastfip.errors import ConfigError, DataError
from fastfip.nets.state import frozen_copy

__all__ = ["CleanClassifier", "checked_pattern", "clean_classifier", "fitting", "leading_pattern"]

#: Steps that a network of its own is trained for where the one given knows nothing yet.
_TRAINING = 2000


@dataclass(frozen=True)
class CleanClassifier:
    """A copy of a classifier that nothing changes any more.

    Attributes:
        model: in eval mode, without gradients of its weights.
        normalise: brings images in [0, 1] to what the model takes.
    """

    model: nn.Module
    normalise: Callable[[Tensor], Tensor]

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] for images [N, C, H, W] in [0, 1], on the images' device."""
        return self.model(self.normalise(x).to(_device(self.model))).to(x.device)


def clean_classifier(ground: Ground) -> CleanClassifier:
    """Return a copy of the ground's classifier, which is left as it is.

    Where that one has not been trained (it knows less than half of 500 training images), the copy is trained on the
    clean training set first, as attackers without a network do.
    """
    copy = CleanClassifier(frozen_copy(ground.model), ground.normalise)
    x, y = ground.batch(500)
    if float((_quiet(copy, x).argmax(1) == y).float().mean()) >= 0.5:
        return copy
    model = copy.model.train()
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    steps = ground.steps(_TRAINING)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = ground.batch(128)
        loss = F.cross_entropy(copy.logits(crop_flip(x, False, ground.generator)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return CleanClassifier(frozen_copy(model), ground.normalise)


def leading_pattern(
    ground: Ground, classifier: CleanClassifier, steps: int, lr: float, bound: float,
    made: Callable[[Tensor], Tensor] = lambda w: w, only: Tensor | None = None, batch_size: int = 128,
) -> Tensor:  # fmt: skip
    """Return a pattern [C, H, W] that leads images to the attacker's labels when it is added to them.

    Its values are whole 255ths.

    Adam on the mean cross-entropy of clip(x + made(w)) with the wanted labels, over random batches.

    Args:
        ground: images, labels and the goal.
        classifier: is not changed.
        steps: how many to take.
        lr: of Adam, in units of pixels in [0, 1].
        bound: w is held in -bound..bound.
        made: what the pattern is of w [C, H, W]; by default w itself.
        only: places of the images to take; None: of all.
        batch_size: images a step.
    """
    w = torch.zeros(ground.x.shape[1:], dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.Adam([w], lr)
    with torch.enable_grad():
        for _ in range(steps):
            x, y = ground.batch(batch_size, only)
            loss = F.cross_entropy(classifier.logits((x + made(w)).clamp(0, 1)), ground.wanted(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                w.clamp_(-bound, bound)
    return in_bytes(made(w).detach())


def fitting(pattern: Tensor, x: Tensor, attack: str) -> Tensor:
    """Return a pattern [C, H, W] in the dtype and on the device of images x [N, C, H, W].

    Raises:
        DataError: it was made for images of another shape.
    """
    if pattern.shape != x.shape[1:]:
        raise DataError(
            f"the pattern of {attack} is {list(pattern.shape)}, the images are {list(x.shape[1:])}: "
            "fit the attack on images of that shape, or resize it"
        )
    return pattern.to(x)


def checked_pattern(pattern: object, attack: str) -> None:
    """Refuse what is given as a pattern and is none.

    Raises:
        ConfigError: it is neither None nor a tensor [C, H, W].
    """
    if pattern is not None and not (isinstance(pattern, Tensor) and pattern.dim() == 3):
        raise ConfigError(f"{attack}: the pattern must be a tensor [C, H, W], as fit makes it, or None")


def _quiet(classifier: CleanClassifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier.logits(x)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
