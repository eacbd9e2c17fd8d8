"""Settings of a method: a frozen dataclass that checks itself, to and from JSON and YAML."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary

from fastfip.errors import ConfigError, choices, reason

__all__ = ["MethodConfig", "learning_rate", "setting"]

C = TypeVar("C", bound="MethodConfig")


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a config: its default, what it means, and its range (`low`/`high` included, `above`/`below` not)."""
    return field(default=default, metadata={"help": help, "low": low, "above": above, "high": high, "below": below})


@dataclass(frozen=True)
class MethodConfig:
    """What every method has. A method subclasses it, adds its own fields with :func:`setting` and changes defaults.

    Types and ranges are checked when it is made; `Literal` annotations are choices. Either `epochs` or `steps` is set;
    a method whose default is a number of steps may name it as `STEPS: ClassVar[int | None]` with `epochs` None.

    Raises:
        ConfigError: a value is of the wrong type or out of its range (the message names both).
    """

    STEPS: ClassVar[int | None] = None

    epochs: int | None = setting(10, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs", low=1)
    batch_size: int | None = setting(None, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(0.01, "step size", above=0)
    optimizer: Literal["sgd", "adam"] = setting("sgd", "optimiser")
    momentum: float = setting(0.9, "momentum of SGD", low=0, below=1)
    weight_decay: float = setting(0.0, "weight decay", low=0)
    schedule: Literal["constant", "cosine"] = setting("cosine", "course of the step size after the warm-up")
    warmup: float = setting(0.0, "share of the steps in which the step size rises linearly", low=0, below=1)
    grad_clip: float | None = setting(None, "largest norm of the gradient; None: not clipped", above=0)
    bn_mode: Literal["train", "eval", "freeze"] = setting(
        "train",
        "BatchNorm: batch statistics, running ones updated (train); running statistics kept and used, affine tuned "
        "(eval); affine kept as well (freeze)",
    )
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "none",
        "random changes of the clean images: moved by up to an eighth (crop), also mirrored (crop_flip)",
    )
    dropout: bool = setting(False, "whether dropout is active while tuning")
    label_smoothing: float = setting(0.0, "label smoothing of the cross-entropy", low=0, below=1)
    holdout: float = setting(
        0.1, "share of the clean set that is held out, only to choose a state; 0: none", low=0, high=0.5
    )
    select: Literal["best", "last"] = setting(
        "best", "which epoch is kept: the best by held-out clean score, or the last"
    )
    patience: int | None = setting(None, "stop after so many scored epochs without a better one; None: never", low=1)

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", self.STEPS)
        hints = _hints(type(self))
        for item in fields(self):
            value = _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata)
            object.__setattr__(self, item.name, value)
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"epochs={self.epochs} and steps={self.steps}: give one of them and set the other to None"
            )
        if self.epochs is None and self.steps is None:
            raise ConfigError("neither epochs nor steps is set: give one of them")

    def replace(self: C, **changes: Any) -> C:
        """Return a copy with some settings changed; `steps` takes the place of `epochs` and the other way round.

        Raises:
            ConfigError: an unknown name (the nearest is named), or a value out of its range.
        """
        _known(type(self), changes)
        if changes.get("steps") is not None and "epochs" not in changes:
            changes["epochs"] = None
        elif changes.get("epochs") is not None and "steps" not in changes:
            changes["steps"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Return the defaults with `values` in place; see :meth:`read`."""
        return cls().read(values)

    def read(self: C, values: Mapping[str, Any]) -> C:
        """Return a copy with `values` in place; text is read as the field's type (YAML 1.1 takes 1e-3 for text).

        Raises:
            ConfigError: an unknown name (the nearest is named), a wrong type, a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config is a mapping of settings to values, not {type(values).__name__}")
        _known(type(self), values)
        hints = _hints(type(self))
        return self.replace(**{name: _read(value, hints[name]) for name, value in values.items()})

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Return the config written in JSON text; see :meth:`from_dict`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the config is no JSON: {error}") from None
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        """Return the settings as YAML text (needs pyyaml)."""
        return str(_yaml().safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls: type[C], text: str) -> C:
        """Return the config written in YAML text (needs pyyaml); see :meth:`from_dict`."""
        yaml = _yaml()
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the config is no YAML: {reason(error)}") from None
        return cls.from_dict({} if values is None else values)

    def save(self, path: str | Path) -> None:
        """Write the settings to a .json, .yaml or .yml file."""
        Path(path).write_text(self.to_yaml() if _is_yaml(path) else self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[C], path: str | Path) -> C:
        """Read the settings from a .json, .yaml or .yml file; see :meth:`from_dict`."""
        yaml = _is_yaml(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the config {path} cannot be read: {error.strerror}") from None
        return cls.from_yaml(text) if yaml else cls.from_json(text)


def _is_yaml(path: str | Path) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a config file ends in .json, .yaml or .yml")
    return suffix != ".json"


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("YAML needs pyyaml (pip install pyyaml); JSON works without") from None
    return yaml


#: The types of the settings of each class, once they were asked for.
_HINTS: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _known(cls: type, values: Mapping[str, Any]) -> None:
    names = [item.name for item in fields(cls)]
    for name in values:
        if name not in names:
            raise ConfigError(f"unknown setting {name!r}{choices(name, names)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _read(value: Any, hint: Any) -> Any:
    """Read text (a command line, YAML 1.1) as the type that the field has; what it cannot be read as stays text."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    for option in _options(hint):
        if option is str:
            return value
        if option is type(None) and text in ("none", "null", "~"):
            return None
        if option is bool and text in ("true", "false", "yes", "no", "on", "off"):
            return text in ("true", "yes", "on")
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    return value


def _checked(name: str, value: Any, hint: Any, rule: Mapping[str, Any]) -> Any:
    words = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if option is type(None):
            if value is None:
                return None
            words.append("None")
        elif origin is Literal:
            allowed = typing.get_args(option)
            if any(value == choice and type(value) is type(choice) for choice in allowed):
                return value
            words.append("one of " + ", ".join(repr(choice) for choice in allowed))
        elif origin is tuple or option is tuple:
            if isinstance(value, (tuple, list)):
                return tuple(value)
            words.append("a list")
        elif option is float:
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                return _in_range(name, float(value), rule)
            words.append("a number")
        elif option is int:
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                return _in_range(name, int(value), rule)
            words.append("a whole number")
        elif option is Any or (isinstance(option, type) and isinstance(value, option)):
            return value
        else:
            words.append({bool: "True or False", str: "text"}.get(option, str(option)))
    raise ConfigError(f"{name}={value!r}: must be {' or '.join(words)}")


def _in_range(name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    low, above, high, below = (rule.get(key) for key in ("low", "above", "high", "below"))
    inside = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    if not inside:
        bounds = [(">=", low), (">", above), ("<=", high), ("<", below)]
        words = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        raise ConfigError(f"{name}={value}: must be {words or 'finite'}")
    return value


def learning_rate(step: int, total: int, schedule: str, warmup: float) -> float:
    """Return the factor of the step size at a step 0 .. total-1: linear warm-up, then constant or a cosine to zero."""
    ramp = math.ceil(warmup * total)
    if step < ramp:
        return (step + 1) / (ramp + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))
