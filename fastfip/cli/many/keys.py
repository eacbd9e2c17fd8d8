"""By what a row is known again: its settings, and what the files hold that it names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from fastfip.cli.many.rows import ManyRow
from fastfip.errors import ConfigError, printable

__all__ = ["Digests", "sha256"]

_CHUNK = 1 << 22
#: Hexadecimal digits of a key: two of a million rows share one by a chance of 1 to 10^18.
_LENGTH = 24
#: Columns that name files; what is in them counts, not how they are called.
_FILES = ("checkpoint", "data", "test_data", "asr_data", "config", "pretrained")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


class Digests:
    """What files and folders hold, as digests; each is read once."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._known: dict[Path, str] = {}

    def key(self, row: ManyRow) -> str:
        """Return 24 hexadecimal digits of all that decides a row's result: not of the name of what it writes.

        Raises:
            ConfigError: a file that the row names is not there, or cannot be read.
        """
        values = {name: value for name, value in dataclasses.asdict(row).items() if name != "out"}
        for name in _FILES:
            if values[name] is not None:
                values[name] = self._spec(name, values[name])
        if row.arch is not None and row.arch.startswith("hf:"):
            values["arch"] = f"hf:{self._file('arch', self.base / row.arch[3:] / 'config.json')}"
        text = json.dumps(values, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]

    def _spec(self, name: str, spec: str) -> str:
        """Return the digest of a path, with what follows it: `FILE.npz:x,y`."""
        from fastfip.cli.outputs import inputs_of

        path = inputs_of(spec)[0]
        weights = name in ("checkpoint", "pretrained")
        after = "" if weights else spec[len(os.fspath(path)) :]
        whole = self.base / path
        if weights and whole.suffix == ".json":  # an index, which names files beside it
            whole = whole.parent
        return self._file(name, whole) + after

    def _file(self, column: str, path: Path) -> str:
        path = path.resolve()
        if path not in self._known:
            try:
                self._known[path] = _folder(path) if path.is_dir() else sha256(path)
            except OSError as error:
                why = "there is no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
                raise ConfigError(f"{column}: {printable(path)}: {why}") from None
        return self._known[path]


def _folder(path: Path) -> str:
    digest = hashlib.sha256()
    names = sorted(
        os.path.relpath(os.path.join(folder, name), path) for folder, _, files in os.walk(path) for name in files
    )
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0" + sha256(path / name).encode())
    return digest.hexdigest()
