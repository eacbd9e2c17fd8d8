"""What a report says of the command that made it: the files that it read, and how to run it again."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfip.cli.errors import TYPED

if TYPE_CHECKING:
    from fastfip.cli.opening import Opened
    from fastfip.cli.options import Scores
    from fastfip.reporting.document import Origin

__all__ = ["data_of", "origin_of", "typed"]

#: Files of a folder that hold weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MOST_FILES = 100
_CHUNK = 1 << 20


def origin_of(source: Path, opened: Opened, arch: str | None, report: Path | None, **data: str | None) -> Origin:
    """Return what a report says of where the model came from.

    Args:
        source: IN.
        opened: what was found there.
        arch: what `--arch` said.
        report: where the report goes; None: nowhere, and no file is read for it.
        **data: what each set of images was read from; None: not given.
    """
    from fastfip.reporting.document import Origin

    path = source if opened.attack is None else opened.attack.path
    return Origin(
        [] if report is None else [_file(one) for one in _files(path)],
        arch or type(opened.model).__name__,
        {name: text for name, text in data.items() if text is not None},
        typed(),
    )


def data_of(clean: str | None, scores: Scores) -> dict[str, str | None]:
    """Return what each set of images was read from, and the attack that was put on test images."""
    attack = scores.attack and f"{scores.attack}, target {scores.target}"
    return {"clean": clean, "test": scores.test_data, "triggered": scores.asr_data, "attack": attack}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(one for one in path.iterdir() if one.suffix in _WEIGHTS and one.is_file())[:_MOST_FILES]


def _file(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"name": str(path), "sha256": digest.hexdigest(), "bytes": size}


def typed() -> str:
    """Return the command that was typed; "" where Python called."""
    arguments = TYPED.get([])
    return shlex.join(["fastfip", *arguments]) if arguments else ""
