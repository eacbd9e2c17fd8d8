"""The file that a training with backdoors can go on from, and what makes it the file of that training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfip.attacks.base import Attack
from fastfip.data import fingerprint
from fastfip.errors import ConfigError, reason
from fastfip.reporting.files import replacing

__all__ = ["Kept", "check_place", "marks", "settings_of"]


def check_place(path: Path) -> None:
    """Refuse a file that could not be written after the first epoch.

    Raises:
        ConfigError: its folder is not there, or it is a folder.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"keep {path}: the folder {folder} does not exist")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"keep {path}: " + ("is a folder" if path.is_dir() else f"{folder} cannot be written"))


def settings_of(attack: Attack) -> str:
    """Return an attack's name and settings as text, tensors by their fingerprint; without what `fit` makes."""
    said: list[str] = []
    items: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(attack) if dataclasses.is_dataclass(attack) else ()
    for item in items:
        if item.repr:
            value = getattr(attack, item.name)
            shown = fingerprint.of_batches([(value,)]) if isinstance(value, Tensor) else repr(value)
            said.append(f"{item.name}={shown}")
    return f"{attack.name}({', '.join(said)})"


def marks(
    settings: Mapping[str, object], x: Tensor, y: Tensor, model: str, planted: Sequence[str], triggered: Tensor
) -> dict[str, str]:
    """Return by what a training is known, as texts.

    Args:
        settings: what it was called with.
        x: all training images.
        y: their true labels [N].
        model: fingerprint of the weights that were given.
        planted: what is said of each injection.
        triggered: the poisoned images; attacks that were fitted in another way make others.
    """
    out = {name: repr(value) for name, value in settings.items()}
    out |= {"attacks": "; ".join(planted), "first weights": model}
    out["images or labels"] = f"{list(x.shape)} {fingerprint.of_batches(zip(x.split(500), y.split(500)))}"
    out["poisoned images"] = fingerprint.of_batches((part,) for part in triggered.split(500))
    return out


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file with the state after the last epoch that was trained.

    Attributes:
        path: of the file.
        marks: of the training; a file with others is refused.
    """

    path: Path
    marks: dict[str, str]

    def store(
        self, model: torch.nn.Module, optimizer: Any, schedule: Any, generator: torch.Generator, history: list[float]
    ) -> None:
        """Write the state."""
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "generator": generator.get_state(), "history": history, "torch": torch.get_rng_state(),
            "marks": self.marks,
        }  # fmt: skip
        with replacing(self.path) as temporary:
            torch.save(state, temporary)

    def resume(self, model: torch.nn.Module, optimizer: Any, schedule: Any, generator: torch.Generator) -> list[float]:
        """Bring everything to the state of the file and return the mean loss of each epoch; [] where there is no file.

        Raises:
            ConfigError: it is another file, or one of another training.
        """
        if not self.path.exists():
            return []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state.get("marks")
            if found is None:
                raise ValueError("it does not say of which it is")
            other = [name for name in self.marks if found.get(name) != self.marks[name]]
            if other:
                raise ValueError(f"not the same {', '.join(other)}")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"])
            torch.set_rng_state(state["torch"])
            return list(state["history"])
        except Exception as error:  # whatever torch raises for another file
            raise ConfigError(f"{self.path} is no state of this training ({reason(error)}): remove it") from error
