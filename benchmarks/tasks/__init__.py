"""Tasks beyond small images: a backdoor in each, purified by the default and by its rivals.

    python -m benchmarks.tasks text              # one task, its attacks, methods and seed 0: rows of results/tasks.csv
    python -m benchmarks.tasks text lm --seeds 0 1 --methods fisher_steps
    python -m benchmarks.tasks detection --attacks regional --clean 60 --methods auto
    python -m benchmarks.tasks table             # writes the table of docs/tasks.md

One file a task, `benchmarks/tasks/NAME.py`, with `ATTACKS`, a tuple of names, and `make(attack, seed) -> Case`. Models,
data and attacks are those of the examples; what a task needs beyond them is looked for where FASTFIP_DATA points, and
weights where a variable points that the task's file names. A trained backdoored model is kept in the benchmarks' cache.
`--clean` is for texts, points, video and detection, whose `make` takes `clean` as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["TASKS", "Case", "make"]

#: Names of tasks, which are those of the files.
TASKS = ("text", "lm", "points", "video", "detection")


@dataclass
class Case:
    """One backdoored model with what `fastfip.purify` is given and how it is measured.

    Attributes:
        model: backdoored, in eval mode.
        clean: what `purify` gets.
        measure: gives the task's own clean measure and the attack's success of a model, both in percent.
        score: name of the clean measure.
        data: what it was trained on and purified with, in a few words.
        options: of `purify` in this task, for all methods: `loss=`, `forward=`.
        details: says more of a model that was purified, for a column of their own; None: nothing.
        own: settings of single methods, by their names; those of the default method are none but for good reason.
    """

    model: nn.Module
    clean: Any
    measure: Callable[[nn.Module], tuple[float, float]]
    score: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: Callable[[nn.Module], str] | None = None


def attacks(task: str) -> tuple[str, ...]:
    """Return the attacks of a task."""
    return importlib.import_module(f"benchmarks.tasks.{task}").ATTACKS


def make(task: str, attack: str, seed: int, clean: int | None = None) -> Case:
    """Return a case of a task, trained or from the cache, with so many clean samples (None: as many as the task has).

    Raises:
        TypeError: another number is asked for of a task that always has the same.
    """
    others = {} if clean is None else {"clean": clean}
    return importlib.import_module(f"benchmarks.tasks.{task}").make(attack, seed, **others)
