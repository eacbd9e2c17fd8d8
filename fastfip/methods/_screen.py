"""Which classes the worst case is looked for, where there are too many to look at each: those that samples fall into.

A batch of the search has fewer samples than there are classes, so that each class is hardly ever improved. So it is
first asked where samples go that no class is named for:

- images that are changed at random (`fastfip.worst_case.changes`), kind by kind: a model with a backdoor answers its
  target to some of what resembles the trigger;
- samples that a few perturbations move, each towards whatever class all of them together move to most easily.

Neither needs more passes where there are more classes. The classes that gain most are those that are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.methods._search import IMPROVE_STEP, SEARCH_BATCH, at_least, precision
from fastfip.methods.base import Run
from fastfip.worst_case.changes import KINDS, LOCAL_KINDS, SMALLEST, random_change
from fastfip.worst_case.goals import Goal
from fastfip.worst_case.pixels import PixelRange
from fastfip.worst_case.universal import Perturbations

__all__ = ["AnyClass", "few_of_many", "screened"]

#: Classes that are looked at one by one afterwards.
CANDIDATES = 16
#: Batches of clean samples, and of those that are changed in each way; and the patches on an image. Few patches of any
#: size and pattern are like a trigger: about one in fifty is like a checker of 37 pixels in 224.
BATCHES, PATCHES = 4, 4
#: Perturbations that no class is named for, the steps at each radius, and the radii, over a typical input's norm.
ROWS, STEPS, RADII = 4, 10, (0.1, 0.3)
#: Weight of a new batch in a running mean.
NEW = 0.3


@dataclass
class AnyClass(Goal):
    """Row k sends samples to whatever class its samples, taken together, have moved towards most.

    Its gradient is that of log sum_c exp g_kc, with g_kc the mean rise of log p_c of the samples of row k.

    Attributes:
        plain: [C] mean of log p of clean samples. gain: [K, C] running mean of g.
    """

    plain: Tensor
    gain: Tensor

    def __post_init__(self) -> None:
        self.rows = len(self.gain)

    def own(self, task: Task, batch: Batch) -> Tensor | None:
        """Return None: each row is for every sample."""
        return None

    def losses(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        """Return minus the log-probabilities of logits [N, C], weighted by softmax(gain) of each row, as it is."""
        return -logits.float().log_softmax(1) @ self.gain.softmax(1).T

    def loss(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return minus the log-probabilities of logits [N, C], weighted by softmax(gain) of each sample's row."""
        logp = logits.float().log_softmax(1)
        with torch.no_grad():
            for k in c.unique().tolist():
                self.gain[k].lerp_(logp[c == k].mean(0) - self.plain, NEW)
        return -(self.gain.softmax(1)[c] * logp).sum()

    @torch.no_grad()
    def hit(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return who of logits [N, C] goes to the class that its row moves towards."""
        return logits.argmax(1) == self.gain.argmax(1)[c]


def few_of_many(run: Run, inputs: list[Tensor]) -> Tensor | None:
    """Return the classes [K] that the worst case is looked for, where there are more than a batch has samples.

    None: each of them, or there are none.
    """
    if not inputs or run.classes is None or run.classes <= SEARCH_BATCH:
        return None
    with run.timed("screen"), precision(run):
        return screened(run, inputs, run.endless())


def screened(run: Run, inputs: list[Tensor], batches: Iterator[Batch]) -> Tensor:
    """Return the classes [K] int64 that samples are sent to most easily, the likeliest first, K at most 16.

    Args:
        run: its model is in eval mode.
        inputs: clean ones, for their range and size.
        batches: clean ones without an end.
    """
    assert run.classes is not None
    x = torch.cat(inputs)
    with torch.no_grad():
        logp = torch.cat([run.forward(next(batches)).float().log_softmax(1) for _ in range(BATCHES)])
    # The first class of each way, then the second of each, ...
    gains = [*_by_chance(run, PixelRange.of_inputs(x), batches, logp.exp().mean(0)),
             *_by_search(run, x, batches, logp.mean(0))]  # fmt: skip
    order = torch.stack(gains).argsort(1, descending=True).T.flatten().tolist()
    return torch.tensor(list(dict.fromkeys(order))[:CANDIDATES], device=run.device)


@torch.no_grad()
def _by_chance(run: Run, known: PixelRange, batches: Iterator[Batch], plain: Tensor) -> list[Tensor]:
    """Return the rise of the mean probability of each class, [C], at images changed at random; one for each kind."""
    gains = []
    for kind in KINDS:
        seen = []
        for batch in itertools.islice(batches, BATCHES):
            x = run.task.inputs(batch)
            if x.dim() != 4 or min(x.shape[-2:]) < SMALLEST:
                return []
            for _ in range(PATCHES if kind in LOCAL_KINDS else 1):
                x = random_change(x, known, run.generator, (kind,))
            other = run.task.replace_inputs(batch, x)
            seen.append(run.forward(other).float().softmax(1))
        gains.append(torch.cat(seen).mean(0) - plain)
    return gains


def _by_search(run: Run, x: Tensor, batches: Iterator[Batch], plain: Tensor) -> list[Tensor]:
    """Return the rise of the mean log-probability of each class, [C], at samples moved by each of a few rows."""
    goal = AnyClass(plain, plain.new_zeros(ROWS, len(plain)))
    shared = Perturbations.of(x, goal, run.generator, RADII[0], ranks=run.ranks)
    shared.together = run.together
    for radius in RADII:
        shared.grow(radius / shared.relative_radius)
        for _ in range(STEPS):
            batch = at_least(run, next(batches))
            # Rows take turns, so that each has samples of its own in every step.
            rows = torch.arange(run.task.size(batch), device=run.device) % ROWS
            shared.improve(run.model, run.task, batch, rows, IMPROVE_STEP)
    return list(goal.gain)
