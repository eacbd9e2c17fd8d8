"""The files that commands write: looked at before the work, and not lost after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastfip.cli.errors import fail
from fastfip.errors import reason

__all__ = [
    "check_distinct",
    "check_drawing",
    "check_file",
    "check_outputs",
    "check_report",
    "check_state",
    "inputs_of",
    "kept",
]


def inputs_of(*given: Any) -> list[Path]:
    """Return the files and folders that options name: paths, and DIR|ZIP|NPZ with `:a,b` or without."""
    out = []
    for value in given:
        text = "" if value is None else os.fspath(value)
        for suffix in (".npz", ".zip"):
            stem, dot, _ = text.rpartition(f"{suffix}:")
            text = f"{stem}{suffix}" if dot else text
        out += [Path(text)] if text else []
    return out


def check_outputs(source: Path, out: Path, report: Path | None, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Find out before the work what could not be written after it, or would destroy what was given."""
    from fastfip.checkpoint import check_suffix

    check_suffix(out)
    for name, path in (("OUT", out), ("--report", report)):
        if path is None:
            continue
        if _same(path, source):
            raise fail(f"{name} {path} is the same file as IN, which is never changed: give another file")
        _check(name, path, force, inputs, "")
    if report is not None and _same(report, out):
        raise fail(f"OUT and --report are both {out}")


def check_file(
    name: str, path: Path, suffixes: tuple[str, ...], force: bool, also: str = "", inputs: Iterable[Path] = ()
) -> None:
    """Find out before the work whether a file could be written after it."""
    if path.suffix not in suffixes:
        raise fail(f"{name} {path}: must end in {', '.join(suffixes)}")
    _check(name, path, force, inputs, also)


def check_state(name: str, path: Path | None, inputs: Iterable[Path] = ()) -> None:
    """Find out before the work whether a file that it may go on from could be written during it."""
    if path is not None:
        _check(name, path, True, inputs, "")


def check_report(path: Path | None, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Find out before the work whether a report could be written after it."""
    if path is not None:
        _check("--report", path, force, inputs, "")


def check_distinct(*named: tuple[str, Path | None]) -> None:
    """Refuse to write two things into one file."""
    given = [(name, path) for name, path in named if path is not None]
    for place, (name, path) in enumerate(given):
        for other, before in given[:place]:
            if _same(path, before):
                raise fail(f"{other} and {name} are both {path}")


def check_drawing(name: str, path: Path | None, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Find out before the work whether a drawing could be written after it."""
    if path is None:
        return
    check_file(name, path, (".png", ".svg", ".pdf"), force, inputs=inputs)
    try:
        import matplotlib  # noqa: F401 (better now than after the work)
    except ImportError:
        from fastfip.errors import BackendError

        raise BackendError(f"{name} needs matplotlib: pip install matplotlib") from None


def _check(name: str, path: Path, force: bool, inputs: Iterable[Path], also: str) -> None:
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, a NUL in it, a file where a folder should be
        raise fail(f"{name}: no file can be written there: {reason(error)}") from None
    if path.is_dir():
        raise fail(f"{name} {path} is a folder")
    if path.exists() and not path.is_file():
        raise fail(f"{name} {path} is a device or a pipe, which would be replaced by a file: give the name of a file")
    for given in inputs:
        if given.exists() and _same(path, given):
            raise fail(f"{name} {path} is an input: give another file")
        if given.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(given)) and path.exists():
            raise fail(f"{name} {path} is a file inside the input {given}: give another file")
    if path.exists() and not force:
        raise fail(f"{name} {path} exists: --force replaces it{also}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise fail(f"{name} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise fail(f"{name} {path}: the folder {folder} cannot be written")


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def kept(path: Path, write: Callable[[Path], object]) -> str | None:
    """Write a result to `path` or, where that fails, to a new folder for temporary files.

    Returns:
        None; or one line that says why it is not in `path`, and where it is instead.
    """
    from fastfip.errors import CheckpointError, reason

    try:
        write(path)
        return None
    except (CheckpointError, OSError) as error:
        if isinstance(error, CheckpointError) and "cannot be written" not in str(error):
            raise  # it is not the place that is wrong
        text = getattr(error, "strerror", None) or reason(error)
        why = text if str(path) in text else f"{path}: cannot be written: {text}"
    try:
        folder = Path(tempfile.mkdtemp(prefix="fastfip-"))
        write(folder / path.name)
        return f"{why}; it is in {folder / path.name} instead"
    except (CheckpointError, OSError) as error:
        return f"{why}; it is lost, because {tempfile.gettempdir()} cannot be written either ({reason(error)})"
