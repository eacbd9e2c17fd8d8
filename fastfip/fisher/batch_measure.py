"""One batch's part of a Fisher diagonal: by the plan of its graph, or sample by sample where that costs less."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, pick
from fastfip.data.task import Task
from fastfip.errors import DataError
from fastfip.fisher.graph.norm_rules import mend_transposed
from fastfip.fisher.graph.plan import Plan
from fastfip.fisher.graph.reading import own_gradients, topological
from fastfip.fisher.graph.verify import cache_of, plan_for
from fastfip.fisher.labels import LabelledPass
from fastfip.fisher.modes import eagerly, readable
from fastfip.fisher.squared_sum import SquaredSum
from fastfip.nets.process import checkpoints_kept, checkpoints_met
from fastfip.nets.state import fresh_caches, is_compiled

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of a loss in its batch and by itself
_LOOPED: weakref.WeakKeyDictionary[nn.Module, dict[Any, float]] = weakref.WeakKeyDictionary()


class BatchMeasure:
    """Adds batch after batch to a sum, with the slow path for what a plan leaves over.

    A model most of whose parameters need a backward pass for each sample has all of them done so from its second batch
    on, through forward passes of single samples: a walk through the whole batch besides would only cost more.
    """

    def __init__(self, model: nn.Module, temperature: float, params: dict[str, Tensor], total: SquaredSum) -> None:
        self.model, self.temperature, self.params, self.total = model, temperature, params, total
        self.cache, self.looped = cache_of(model), _LOOPED.setdefault(model, {})
        self.key: Any = None
        self.without_graph = False  # of the batch at hand

    def forward(self, task: Task, batch: Batch) -> Tensor:
        """Return the outputs of a batch, with their graph if that will be read."""
        hooks = (task.forward_hook, task.loss_hook)
        self.key = (tuple(self.params), *(getattr(hook, "__code__", type(hook)) for hook in hooks))
        self.without_graph = self.key in self.looped
        if self.without_graph:
            with torch.no_grad(), eagerly(is_compiled(self.model)):
                return self._cooled(task.forward(self.model, batch))
        met, kept = checkpoints_met(), checkpoints_kept()
        with torch.enable_grad(), readable(self.model):
            outputs = self._cooled(task.forward(self.model, batch))
        met, kept = checkpoints_met() - met, checkpoints_kept() - kept
        self.cache = cache_of(self.model, kept=kept > 0, once=met > kept)
        return outputs

    def add(self, outputs: Tensor, one: LabelledPass) -> int:
        """Add one backward pass of a batch; return N."""
        with torch.enable_grad():
            losses = one.task.loss(outputs, one.batch)
        if self.without_graph:
            with eagerly(is_compiled(self.model)):
                if not self._loop(losses.detach(), one, self.params, self.looped.get(self.key, 0.0)):
                    self.looped.pop(self.key, None)
            self.total.coverage.update(dict.fromkeys(self.params, "per-sample loop"))
            return losses.shape[0]
        with torch.enable_grad():
            plan = plan_for(losses, self.params, self.cache)
        slow = plan.loop
        with eagerly(is_compiled(self.model)):
            if plan.deep and next(self._alone(one, losses.shape[0]), None) is not None:
                slow |= plan.deep
                plan = Plan(losses, plan.params, plan.reading, plan.layouts, slow).routed()
            mine = {name: self.params[name] for name in self.params if name in slow}
            tolerance = 1e-2 if mine and plan.coarse else _CLOSE.get(losses.dtype, 1e-2)
            alone = bool(mine) and self._loop(losses, one, mine, tolerance)
        if alone and 2 * sum(p.numel() for p in mine.values()) >= sum(p.numel() for p in self.params.values()):
            self.looped[self.key] = tolerance
        self.total.add(plan, one.weights, retain_graph=not one.last)
        return losses.shape[0]

    def _loop(self, losses: Tensor, one: LabelledPass, params: dict[str, Tensor], tolerance: float) -> bool:
        """One backward for each sample: through a forward pass of its own, as long as its loss is that in the batch."""
        samples = losses.shape[0]
        by_itself, alone = self._alone(one, samples), True
        for n in range(samples):
            mine, last = (next(by_itself, None) if alone else None) or (None, True)
            if mine is None or not torch.allclose(mine, losses[n].detach(), rtol=tolerance, atol=1e-3 * tolerance):
                if losses.grad_fn is None:  # they were taken for samples on their own
                    with torch.enable_grad(), readable(self.model):
                        losses = one.task.loss(self._cooled(one.task.forward(self.model, one.batch)), one.batch)
                alone, mine, last = False, losses[n], False
            got = own_gradients(mine, params, retain_graph=not last)
            if one.weights is not None:
                got = {name: g * one.weights[n] for name, g in got.items()}
            self.total.add_one(got)
        return alone

    def _alone(self, one: LabelledPass, samples: int) -> Iterator[tuple[Tensor, bool]]:
        """Yield each sample's loss from a forward pass of its row alone, and whether it is the row's last.

        Several samples may lie in one row (tokens). Ends where the batch cannot be cut.
        """
        try:
            rows = one.task.size(one.batch)
        except DataError:
            rows = samples
        rows = samples if rows == 0 or samples % rows else rows
        for r in range(rows):
            try:
                batch = pick(one.batch, r, rows)
                with torch.enable_grad(), fresh_caches(self.model.modules()):
                    losses = one.task.loss(self._cooled(one.task.forward(self.model, batch)), batch)
            except (RuntimeError, ValueError, IndexError):
                return
            if losses.shape[0] * rows != samples or losses.grad_fn is None:
                return
            mend_transposed(topological(losses.grad_fn))
            with torch.enable_grad():
                each = list(losses.unbind())
            for k, loss in enumerate(each):
                yield loss, k == len(each) - 1

    def _cooled(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature
