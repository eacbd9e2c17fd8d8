"""What a universal perturbation is after: to send every sample to one class, or to take it away from its target.

With classes there is a perturbation for each of them, and a sample is reached where the model answers that class.
Elsewhere (a language model, a detector, a segmentation) there is no class to go to: a few perturbations from different
starts raise the loss of every sample, and a sample is reached where its loss is that of a wrong answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import FastFIPError

__all__ = ["AwayFromTarget", "Goal", "TowardsClass"]

#: Perturbations of a task without classes.
ROWS = 4
#: A sample is reached where its loss has risen by this share of what another sample's answer costs, and is above the
#: loss of this share of the clean samples; where no other answer can be scored, where it has risen by one.
HALF, CLEAN_SHARE = 0.5, 0.9
#: Losses count up to this multiple of the one at which a sample is reached: what is lost is not pushed further.
MOST = 2.0


class Goal(ABC):
    """What perturbations are improved for, and when one has worked. There are `rows` perturbations."""

    rows: int

    @abstractmethod
    def own(self, task: Task, batch: Batch) -> Tensor | None:
        """Return the row [N] that each sample is not to be given, its own class; None: any will do."""

    @abstractmethod
    def losses(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        """Return what each row lowers at each sample, [N, rows], or [N, 1] if it is the same for all rows."""

    @abstractmethod
    def loss(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return what the perturbations `c` [N] of a batch lower, summed over samples, a scalar."""

    @abstractmethod
    def hit(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return which samples were reached, bool [N], no graph."""


@dataclass(frozen=True)
class TowardsClass(Goal):
    """Row c sends samples of all other classes to class c; or, where only some classes are meant, to `classes[c]`.

    Attributes:
        classes: [rows] int64, each class once; None: all.
    """

    rows: int
    classes: Tensor | None = None

    def own(self, task: Task, batch: Batch) -> Tensor | None:
        """Return the labels [N] as rows; -1 where a class has none."""
        y = task.labels(batch)
        if self.classes is None:
            return y
        same = y[:, None] == self.classes.to(y.device)
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def losses(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of logits [N, C] towards the class of each row."""
        out = -logits.float().log_softmax(1)
        return out if self.classes is None else out[:, self.classes.to(out.device)]

    def loss(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return the cross-entropy of logits [N, C] towards the classes of c [N]."""
        return nn.functional.cross_entropy(logits.float(), self.class_of(c), reduction="sum")

    @torch.no_grad()
    def hit(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return who of logits [N, C] goes to the class of c [N]."""
        return logits.float().argmax(1) == self.class_of(c)

    def class_of(self, rows: Tensor) -> Tensor:
        """Return the classes [N] of rows [N]."""
        return rows if self.classes is None else self.classes.to(rows.device)[rows]


@dataclass(frozen=True)
class AwayFromTarget(Goal):
    """Every row raises the loss of samples, as `loss=` takes it, until it is `threshold`.

    Attributes:
        threshold: loss of a sample at which it counts as reached, in the units of the task's loss.
        rows: number of perturbations.
    """

    threshold: float
    rows: int = ROWS

    @classmethod
    @torch.no_grad()
    def of(cls, forward: Callable[[Batch], Tensor], task: Task, batches: Iterable[Batch]) -> AwayFromTarget:
        """Measure on clean batches what a wrong answer costs.

        A wrong answer is that of another sample of the batch: so the threshold needs no unit. It is half-way from the
        mean loss to the mean loss of such answers, and at least the 90th percentile of the clean losses.

        Args:
            forward: gives the outputs of a batch, in eval mode.
            task: its loss is meant.
            batches: some clean ones, on the model's device.
        """
        own, others = [], []
        for batch in batches:
            outputs = forward(batch)
            own.append(task.loss(outputs, batch).float().cpu())
            n = task.size(batch)
            if outputs.dim() and outputs.shape[0] == n > 1:
                try:
                    others.append(task.loss(outputs.roll(1, 0), batch).float().cpu())
                except (FastFIPError, RuntimeError, ValueError, IndexError):
                    others.append(torch.empty(0))
        clean = torch.cat(own)
        clean = clean[clean.isfinite()]
        wrong = torch.cat(others) if others else torch.empty(0)
        wrong = wrong[wrong.isfinite()]
        mean = float(clean.mean()) if len(clean) else 0.0
        rise = HALF * (float(wrong.mean()) - mean) if len(wrong) else 0.0
        usual = float(clean.sort().values[int(CLEAN_SHARE * (len(clean) - 1))]) if len(clean) else 0.0
        return cls(max(mean + (rise if rise > 0 else 1.0), usual))

    def own(self, task: Task, batch: Batch) -> Tensor | None:
        """Return None: each row is for every sample."""
        return None

    def losses(self, task: Task, logits: Tensor, batch: Batch) -> Tensor:
        """Return the negative loss at the targets, no more than twice the threshold for each sample, [N, 1].

        A threshold below zero (a loss that is a negative likelihood of a density) bounds nothing.
        """
        losses = task.loss(logits, batch).float()
        return -(losses.clamp(max=MOST * self.threshold) if self.threshold > 0 else losses)[:, None]

    def loss(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return the sum of `losses`."""
        return self.losses(task, logits, batch).sum()

    @torch.no_grad()
    def hit(self, task: Task, logits: Tensor, batch: Batch, c: Tensor) -> Tensor:
        """Return whose loss is at the threshold or above it."""
        return task.loss(logits, batch).float() >= self.threshold
