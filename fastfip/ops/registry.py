"""Tables of backends: which ones an op has, which one runs, and why another one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastfip.errors import BackendError, ConfigError

LIBRARY = torch.library.Library("fastfip", "DEF")


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `refuses(device_type, dtype)` returns why it cannot run there, or "" if it can. A backend with `automatic=False` runs only when
    it is asked for by name.
    """

    name: str
    run: Callable[..., object]
    refuses: Callable[[str, torch.dtype], str] = lambda device, dtype: ""
    automatic: bool = True

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"backend name {self.name!r} is not an identifier")


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its backends, the preferred one first; the last one is the reference, which never refuses."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backends]
        if len(set(names)) != len(names) or names[-1:] != ["reference"]:
            raise ConfigError(f"op {self.name}: backends {names} must differ, and the last one must be the reference")

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise BackendError(
            f"{self.name} has no backend {name!r}: use one of {', '.join(b.name for b in self.backends)}"
        )

    @torch.compiler.assume_constant_result
    def choose(self, wanted: str | None, device: str, dtype: torch.dtype) -> str:
        """Name of the backend that runs: the one asked for, or else the first that can.

        Raises BackendError with the reason when the one asked for cannot run.
        """
        if wanted is not None:
            why = self[wanted].refuses(device, dtype)
            if why:
                raise BackendError(f"{self.name}: backend {wanted} cannot run: {why}")
            return wanted
        return next(b.name for b in self.backends if b.automatic and not b.refuses(device, dtype))

    def explain(self, device: str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        """For each backend "runs", "can run", or why it does not."""
        chosen = self.choose(None, device, dtype)
        state = {}
        for backend in self.backends:
            why = backend.refuses(device, dtype) or ("" if backend.automatic else "only when asked for")
            state[backend.name] = "runs" if backend.name == chosen else why or "can run"
        return state


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op to the table that tests, benchmarks and `fastfip env` walk."""
    if op.name in OPS:
        raise ConfigError(f"op {op.name} is registered twice")
    OPS[op.name] = op
    return op
