"""Whose labels a Fisher is taken with: the data's, drawn ones, or all of them with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import ConfigError, DataError
from fastfip.fisher.likelihood import Categorical, Gaussian, Likelihood, as_logits, draw_labels, likelihood_of

Kind = Literal["empirical", "mc", "exact"]
Sample = Callable[[Tensor, Batch, torch.Generator], Tensor]
T = TypeVar("T")


class LabelledPass(NamedTuple):
    """One backward pass: what it is taken of."""

    task: Task
    batch: Batch
    weights: Tensor | None  # [N], of the losses
    last: bool


@dataclass(frozen=True)
class Labels:
    """The labels of a kind of Fisher; `Labels.of` refuses combinations that have no meaning.

    Attributes:
        kind: where labels come from.
        likelihood: None: one label in 0..C-1 for each row of logits [N, C].
        sample: a user's `sample(outputs, batch, generator) -> labels`.
        top_k: classes of each sample that "exact" takes; None: all.
    """

    kind: Kind
    likelihood: Likelihood | None = None
    sample: Sample | None = None
    top_k: int | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        task: Task,
        likelihood: str | Likelihood | None,
        sample: Sample | None,
        top_k: int | None,
        temperature: float,
    ) -> tuple[Labels, Task]:
        """Return the labels, and the task with the likelihood's loss where the user has given none.

        Raises:
            ConfigError: options that exclude each other, with the remedy.
        """
        if kind not in get_args(Kind):
            raise ConfigError(f"kind must be 'empirical', 'mc' or 'exact', not {kind!r}")
        chosen = None if likelihood is None else likelihood_of(likelihood)
        if sample is not None and (kind != "mc" or chosen is not None):
            raise ConfigError("sample= draws the labels of kind='mc': take that kind, and leave out likelihood=")
        if sample is not None and not callable(sample):
            raise ConfigError(f"sample= must be a function, not {type(sample).__name__}")
        if kind != "empirical" and task.loss_hook is not None and chosen is None and sample is None:
            more = ", or sample=" if kind == "mc" else " (and leave out loss=, unless it is of one class in C)"
            raise ConfigError(
                f"kind={kind!r} has to know which labels the outputs stand for, and loss= does not say: give"
                f" likelihood='categorical', 'bernoulli' or 'gaussian'{more}"
            )
        if kind == "exact" and task.loss_hook is not None and not isinstance(chosen, Categorical):
            raise ConfigError("kind='exact' takes the loss of the likelihood: leave out loss=, or take kind='mc'")
        if top_k is not None and (kind != "exact" or top_k < 1 or not isinstance(chosen, (Categorical, type(None)))):
            raise ConfigError("top_k is a positive number of classes, for kind='exact' and a categorical likelihood")
        if temperature != 1 and isinstance(chosen, Gaussian):
            raise ConfigError("temperature divides logits, and gaussian outputs are none: give Gaussian(variance=)")
        if chosen is not None and task.loss_hook is None:
            task = replace(task, loss_hook=_LossOf(chosen, task))
        return cls(kind, chosen, sample, top_k), task

    def passes(self, task: Task, batch: Batch, outputs: Tensor, generator: torch.Generator) -> Iterator[LabelledPass]:
        """Yield the backward passes that a batch needs."""
        if self.kind == "empirical":
            yield LabelledPass(task, batch, None, True)
        elif self.kind == "mc":
            yield LabelledPass(task, task.relabel(batch, self._drawn(task, batch, outputs, generator)), None, True)
        elif self.likelihood is None or not isinstance(task.loss_hook, _LossOf):
            yield from self._classes(task, batch, outputs)
        else:
            y = task.labels(batch)
            along = replace(task, forward_hook=lambda model, pair: task.forward(model, pair[0]), loss_hook=_along)
            for v, last in _with_last(self.likelihood.slopes(outputs, y, self.top_k)):
                yield LabelledPass(along, (batch, v.to(outputs)), None, last)

    def _drawn(self, task: Task, batch: Batch, outputs: Tensor, generator: torch.Generator) -> Tensor:
        if self.sample is not None:
            drawn = self.sample(outputs.detach(), batch, generator)
            if not isinstance(drawn, Tensor):
                raise DataError(f"sample= must return the labels as a tensor, not {type(drawn).__name__}")
            return drawn.to(outputs.device)
        if self.likelihood is None:
            return draw_labels(outputs, generator)
        return self.likelihood.draw(outputs, task.labels(batch), generator)

    def _classes(self, task: Task, batch: Batch, logits: Tensor) -> Iterator[LabelledPass]:
        """One label for each row of logits [N, C]: every class with its probability."""
        if logits.dim() != 2:
            what = "take kind='mc'" if task.loss_hook is None else "leave out loss=, or take kind='mc'"
            raise DataError(f"kind='exact' needs outputs [N, C] here, not {list(logits.shape)}: {what}")
        p = (logits if task.loss_hook is None else as_logits(logits)).detach().softmax(1)
        classes = p.shape[1] if self.top_k is None else min(self.top_k, p.shape[1])
        if self.top_k is None:
            y = torch.arange(classes, device=p.device).expand_as(p)
        else:
            p, y = p.topk(classes, 1)
        for c in range(classes):
            # The gradient is multiplied by sqrt(p), so its square by p.
            yield LabelledPass(task, task.relabel(batch, y[:, c].contiguous()), p[:, c].sqrt(), c == classes - 1)


@dataclass(frozen=True)
class _LossOf:
    """The loss of a likelihood, as a task's hook."""

    likelihood: Likelihood
    task: Task

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        y = replace(self.task, loss_hook=self).labels(batch)  # with a hook: labels of any form
        return self.likelihood.losses(outputs, y.to(outputs.device))


def _along(outputs: Tensor, pair: tuple[Batch, Tensor]) -> Tensor:
    """Return <z_n, v_n>, [N]: its gradients are J_n^T v_n."""
    return (outputs * pair[1]).reshape(len(outputs), -1).sum(1)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield every item, and whether it is the last one."""
    before: list[T] = []
    for item in items:
        if before:
            yield before.pop(), False
        before.append(item)
    for item in before:
        yield item, True
