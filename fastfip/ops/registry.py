"""Tables of backends: which ones an op has, which one runs, and why another one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastfip.errors import BackendError, ConfigError


def _never(*arguments: Any) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `refuses(*arguments)`, with the arguments of `Op.choose`, returns why it cannot run, or "" if it can.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str] = _never
    automatic: bool = True  # False: runs only when it is asked for by name

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "auto":
            raise ConfigError(f"a backend cannot be called {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its backends, the preferred one first; the last one is the reference, which never refuses."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backends]
        if len(set(names)) != len(names) or names[-1:] != ["reference"]:
            raise ConfigError(f"op {self.name}: backends {names} must differ, and the last one must be the reference")
        if self.name in OPS:
            raise ConfigError(f"op {self.name} is registered twice")
        OPS[self.name] = self

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise BackendError(
            f"{self.name} has no backend {name!r}: use {', '.join(b.name for b in self.backends)} or auto"
        )

    def choose(self, wanted: str, *arguments: Any) -> Backend:
        """Return the backend asked for, or with "auto" the first one that runs by itself and does not refuse.

        Raises:
            BackendError: the backend asked for refuses; the message has its reason.
        """
        if wanted != "auto":
            backend = self[wanted]
            why = backend.refuses(*arguments)
            if why:
                raise BackendError(f"{self.name}: backend {wanted} cannot run: {why}")
            return backend
        return next(b for b in self.backends if b.automatic and not b.refuses(*arguments))

    def explain(self, *arguments: Any) -> dict[str, str]:
        """For each backend: "runs", "can run", or why it does not."""
        chosen = self.choose("auto", *arguments)
        return {
            b.name: "runs"
            if b is chosen
            else b.refuses(*arguments) or ("can run" if b.automatic else "only when asked for")
            for b in self.backends
        }


OPS: dict[str, Op] = {}
"""Every op by its name: tests, benchmarks and the environment report walk it."""
