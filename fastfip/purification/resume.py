"""A purification that goes on where a killed one stopped, and ends with the weights that it would have ended with.

The file holds plain values and tensors: what is tuned, buffers, the optimiser, the method's state, the place in the
order of the samples and the states of all generators. It is written whole or not at all, and read without running
anything that is in it.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from fastfip.data.cleanset import CleanSet
from fastfip.data.fingerprint import of_batches, of_model, of_values
from fastfip.errors import CheckpointError, ConfigError, printable, reason
from fastfip.methods._resume import check_resumable, method_from, state_of_method
from fastfip.methods.base import Method, Run
from fastfip.reporting.files import replacing

if TYPE_CHECKING:
    from fastfip.purification.loop import _Loop

__all__ = ["Resume"]

_FORMAT = "fastfip resume 1"
_RUN = ("step", "epoch", "epochs", "total_steps", "best_epoch", "left_out", "notes", "alerts", "left", "seconds",
        "micro_batch")  # fmt: skip
_LOOP = ("best_score", "since_best", "bad_in_a_row", "bad_steps", "first_loss", "moved", "good_epoch", "base", "rest",
         "score_every", "history")  # fmt: skip


class Resume:
    """The file of one run, which is read at its start and written now and then.

    Args:
        path: a file; if it exists, the run goes on from it.
        every: seconds between two writings, at least; 0: after each step.
        keep: leave it there after the run; `remove` then takes it away.

    Raises:
        ConfigError: no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 60.0, keep: bool = False) -> None:
        self.path, self.every, self.keep = Path(path), every, keep
        if not (isinstance(every, (int, float)) and every >= 0):
            raise ConfigError(f"resume_every={every!r}: give seconds, 0 or more")
        folder = self.path.resolve().parent
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(f"resume={printable(path)}: no file can be written there")
        self.written = time.monotonic()
        self.random: dict[str, Any] | None = None
        self.key: dict[str, str] = {}
        self.whole: CleanSet | None = None

    def begin(self, run: Run, method: Method) -> dict[str, Any] | None:
        """Return the state of the broken run, its method's set already; None where there is none.

        Raises:
            ConfigError: the method cannot go on.
            CheckpointError: the file is none, or of another run; every rank gets the error of rank 0.
        """
        check_resumable(type(method))
        self.key, self.whole = _key(run, method), run.clean
        first = run.ranks is None or run.ranks.first
        state = self._read() if first and self.path.exists() else None
        state = state if run.ranks is None else run.ranks.from_first(state)
        if state is None:
            return None
        run.config = type(run.config).from_dict(state["config"])
        run.clean = self.whole.chosen(state["clean"])
        run.generator.set_state(state["generator"])
        method_from(method, run, self.whole, state["method"])
        self.random = state["random"]
        return state

    def _read(self) -> dict[str, Any]:
        shown = printable(self.path)
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a file that is none makes torch raise can be anything
            raise CheckpointError(f"{shown} is no file of a broken run ({reason(error)}): remove it") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT or not isinstance(state.get("key"), dict):
            raise CheckpointError(f"{shown} is no file of a broken run of this version: remove it")
        odd = [name for name, value in self.key.items() if state["key"].get(name) != value]
        if odd:
            raise CheckpointError(
                f"{shown} is of another run ({' and '.join(odd)} differ): give the file of this run, or remove it"
            )
        return state

    def restore(self, loop: _Loop, state: dict[str, Any]) -> None:
        """Set the loop, and what it tunes, as they were."""
        run = loop.run
        for name in _RUN:
            setattr(run, name, state["run"][name])
        run.found = _as_arrays(state["found"])
        run.task = replace(run.task, most=run.micro_batch)
        run._logged.update(state["logged"])
        for name in _LOOP:
            if name != "history":
                setattr(loop, name, state["loop"][name])
        loop.history += state["loop"]["history"]
        device = run.device
        loop.good = [t.to(device) for t in state["good"]]
        loop.best = None
        if state["best"] is not None:
            loop.best = loop.good if state["best"] == "good" else [t.to(device) for t in state["best"]]
        loop.tuned.restore(state["tensors"])
        loop.optimizer.load_state_dict(state["optimizer"])
        if run.scaler is not None and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        run.note(f"went on from step {run.step} of a broken run")

    def settle(self) -> None:
        """Set the global generators as they were, once every loader has drawn what it draws to begin."""
        if self.random is not None:
            _set_random(self.random)
            self.random = None

    def step(self, loop: _Loop) -> None:
        """Write the file, if it is time to."""
        run = loop.run
        due = time.monotonic() - self.written >= self.every and run.step < run.total_steps
        if due and (run.ranks is None or run.ranks.first):
            self.write(loop)
            self.written = time.monotonic()

    def write(self, loop: _Loop) -> None:
        """Write the file; where it cannot be written the run goes on with a note."""
        try:
            with replacing(self.path) as temporary:
                torch.save(self._state(loop), temporary)
        except (OSError, RuntimeError) as error:
            loop.run.note(f"{printable(self.path)} could not be written: {reason(error)}")

    def _state(self, loop: _Loop) -> dict[str, Any]:
        run = loop.run
        best: Any = None if loop.best is None else "good" if loop.best is loop.good else loop.best
        return {
            "format": _FORMAT,
            "key": self.key,
            "run": {name: getattr(run, name) for name in _RUN},
            "found": _as_tensors(run.found),
            "logged": {name: [float(v) for v in values] for name, values in run._logged.items()},
            "loop": {name: getattr(loop, name) for name in _LOOP},
            "config": run.config.to_dict(),
            "clean": run.clean.index,
            "generator": run.generator.get_state(),
            "method": state_of_method(loop.method),
            "tensors": loop.tuned.save(),
            "good": loop.good,
            "best": best,
            "optimizer": loop.optimizer.state_dict(),
            "scaler": None if run.scaler is None else run.scaler.state_dict(),
            "random": _random(run.device),
        }

    def finish(self, run: Run) -> None:
        """Take the file away after a run that came to its end, unless it is kept."""
        if not (self.keep or run.interrupted) and (run.ranks is None or run.ranks.first):
            self.remove()

    def remove(self) -> None:
        """Take the file away, if it is there."""
        self.path.unlink(missing_ok=True)


def _key(run: Run, method: Method) -> dict[str, str]:
    """Return what has to be the same, by the words that an error has for it."""
    clean = run.clean
    samples: list[Any] = [clean.n, clean.labels, 0 if run.heldout is None else run.heldout.n]
    if not clean.live:  # a loader may augment: its samples are others in each pass
        samples.append(of_batches(clean.batches()))
    return {
        "model": of_model(run.model),
        "clean samples": of_values(samples),
        "method": method.name,
        "settings": of_values([sorted(run.config.to_dict().items()), str(run.amp), sorted(_frozen(run))]),
        "seed": str(run.seed),
    }


def _as_tensors(value: Any) -> Any:
    """Return nested dicts with tensors for arrays, which is what the file can hold."""
    if isinstance(value, dict):
        return {name: _as_tensors(v) for name, v in value.items()}
    return torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_arrays(v) for name, v in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value


def _frozen(run: Run) -> list[str]:
    return [name for name, p in run.model.named_parameters() if id(p) in run.frozen]


def _random(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = numpy.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(place), int(has_gauss), float(cached)],
        "torch": torch.default_generator.get_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), place, has_gauss, cached))
    torch.default_generator.set_state(state["torch"])
    if isinstance(state.get("cuda"), Tensor):
        torch.cuda.set_rng_state(state["cuda"])
