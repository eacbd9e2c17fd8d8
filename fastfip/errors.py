"""Errors that fastfip raises on purpose. Each says in one line what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class FastFIPError(Exception):
    """Base of every error that fastfip raises on purpose."""


class DataError(FastFIPError, ValueError):
    """The data cannot be used as given: empty, wrong dtype, labels out of range ..."""


class ModelError(FastFIPError, ValueError):
    """The model cannot be used as given: frozen, BatchNorm in train mode, no logits ..."""


class ConfigError(FastFIPError, ValueError):
    """A setting is unknown or out of its range."""


class CheckpointError(FastFIPError, ValueError):
    """A checkpoint file is refused, or does not fit the model."""


class BackendError(FastFIPError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


_LONGEST = 200


def printable(text: object, most: int = 600) -> str:
    """Return a text that may hold names from a file as one line that does nothing to a terminal, at most `most` long.

    Escape sequences, line breaks and marks that turn the direction of writing become question marks. Everything that
    comes from a file goes through here before it is printed.
    """
    shown = str(text)[: most + 1]
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def reason(error: BaseException) -> str:
    """Return what an exception says as one line of at most 200 characters that does nothing to a terminal."""
    return printable(" ".join(str(error)[: 4 * _LONGEST].split()), _LONGEST)


def choices(name: object, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all that there are."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    hint = f": did you mean {folded[near[0]]!r}?" if near else ""
    return f"{hint} There are {', '.join(known)}"
