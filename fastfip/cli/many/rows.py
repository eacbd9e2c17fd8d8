"""The rows of a manifest: what is purified, with what, and how."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfip.errors import ConfigError, choices, printable, reason

__all__ = ["ManyRow", "as_rows", "read_manifest"]

_WHOLE = ("limit", "per_class", "channels", "data_workers", "batch_size", "epochs", "steps", "seed", "micro_batch")
_TRUTH = {"": False, "0": False, "no": False, "false": False, "1": True, "yes": True, "true": True}


@dataclass(frozen=True, kw_only=True)
class ManyRow:
    """One purification of many: the options of `fastfip purify`, by the same names.

    Paths are relative to the folder of the manifest (of rows from Python: to the working folder), where modules of
    `arch` and `method` are looked for as well. None stands for what the command takes where nothing is said.

    Attributes:
        checkpoint: IN. out: name of the purified file in the folder of results; None: made of the checkpoint's name.
        arch, arch_args, key, prefix: the model; `arch_args` is JSON text.
        data, limit, per_class, input_shape: the clean images, or without any the shape of the inputs.
        scale, mean, std, size, channels, class_order, skip_broken, data_workers, batch_size: how images become inputs.
        test_data, asr_data, attack, target: what only scores.
        method, config, settings, epochs, steps, seed, device, amp, ignore_fit, micro_batch, memory,
            gradient_checkpointing: how; `settings` are KEY=VALUE. pretrained: the weights before fine-tuning.
    """

    checkpoint: str
    out: str | None = None
    arch: str | None = None
    arch_args: str | None = None
    key: str | None = None
    prefix: str | None = None
    data: str | None = None
    limit: int | None = None
    per_class: int | None = None
    input_shape: str | None = None
    scale: str | None = None
    mean: str | None = None
    std: str | None = None
    size: str | None = None
    channels: int | None = None
    class_order: str | None = None
    skip_broken: bool = False
    data_workers: int = 0
    batch_size: int = 128
    test_data: str | None = None
    asr_data: str | None = None
    attack: str | None = None
    target: str | None = None
    method: str = "auto"
    config: str | None = None
    settings: tuple[str, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    amp: str = "off"
    ignore_fit: bool = False
    micro_batch: int | None = None
    memory: str | None = None
    gradient_checkpointing: str = "auto"
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint is empty: every row needs one")
        if self.out is not None:
            _check_out(self.out)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ManyRow:
        """Return the row of a mapping, whose values may be texts, as in a manifest; empty ones count as not given.

        Raises:
            ConfigError: an unknown name (the nearest is named), or a value that cannot be.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given: dict[str, Any] = {}
        for written, value in values.items():
            name = str(written).strip().replace("-", "_")
            if name not in known:
                raise ConfigError(f"no column {printable(written, 60)!r}{choices(name, known)}")
            value = value.strip() if isinstance(value, str) else value
            if value is not None and value != "":
                given[name] = _value(name, value)
        if "checkpoint" not in given:
            raise ConfigError("checkpoint is empty: every row needs one")
        return cls(**given)


def _value(name: str, value: Any) -> Any:
    if name in _WHOLE:
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{name}={printable(value, 60)}: must be a whole number") from None
    if name in ("ignore_fit", "skip_broken"):
        truth = _TRUTH.get(str(value).lower())
        if truth is None:
            raise ConfigError(f"{name}={printable(value, 60)}: must be yes or no")
        return truth
    if name == "settings":
        if isinstance(value, Mapping):
            return tuple(f"{key}={one}" for key, one in value.items())
        return tuple(value.replace(";", " ").split() if isinstance(value, str) else map(str, value))
    if name == "arch_args" and isinstance(value, Mapping):
        return json.dumps(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _check_out(out: str) -> None:
    """Refuse a name that leads out of the folder of results, or to what the run itself writes there."""
    parts = Path(out).parts
    if Path(out).is_absolute() or ".." in parts or not parts or "\0" in out:
        raise ConfigError(f"out={printable(out, 100)}: must be a name in the folder of results")
    if parts[0] in ("work", "logs") or parts[0].startswith("."):
        raise ConfigError(
            f"out={printable(out, 100)}: work, logs, and names that start with a dot are reserved for the run"
        )
    if Path(out).suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"out={printable(out, 100)}: must end in .safetensors, .pth or .pt")


def read_manifest(path: str | os.PathLike[str]) -> list[ManyRow]:
    """Return the rows of a CSV file with a line of column names.

    Raises:
        ConfigError: it cannot be read, or a row is wrong, whose line is named.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise ConfigError(f"{printable(path)}: cannot be read as a manifest: {why}") from None
    if not lines:
        raise ConfigError(
            f"{printable(path)}: has no rows: give a line of column names, and a line for each checkpoint"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{printable(path)}: has the column {printable(twice, 60)!r} twice")
    rows = []
    for number, line in lines:
        try:
            if None in line or None in line.values():
                raise ConfigError(f"has not {len(names)} cells, as many as there are columns")
            rows.append(ManyRow.of(line))
        except ConfigError as error:
            raise ConfigError(f"{printable(path)}, line {number}: {error}") from None
    return rows


def as_rows(rows: str | os.PathLike[str] | Iterable[ManyRow | Mapping[str, Any]]) -> tuple[list[ManyRow], Path]:
    """Return the rows of a manifest, or those given, and the folder that their paths start from.

    Raises:
        ConfigError: a row is wrong, or there is none.
    """
    if isinstance(rows, (str, os.PathLike)):
        return read_manifest(rows), Path(rows).resolve().parent
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(row if isinstance(row, ManyRow) else ManyRow.of(row))
        except ConfigError as error:
            raise ConfigError(f"row {number}: {error}") from None
    if not found:
        raise ConfigError("there are no rows: give at least one")
    return found, Path.cwd()
