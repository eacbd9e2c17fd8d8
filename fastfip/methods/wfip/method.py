"""Worst-case FIP (`wfip`) and its spectral form (`fast_wfip`), two of the package's own methods.

The empirical Fisher vanishes where a model fits the labels, so the trace of the published objective has no effect on a
model that fits its clean data. A backdoor makes the model sharp at other inputs: at those that one small change of all
inputs makes. The methods search for such changes and unlearn them, while the Fisher of clean data bounds each step:

1. Search: for every class, one change of all inputs that sends them to this class. Its radius grows until the most
   susceptible class is reached from 90 % of the clean samples. In point clouds a few points at places of their own are
   looked for as well (`fastfip.worst_case.added_points`).
2. Unlearn (the share `unlearn` of the steps): the model learns the true labels at changed inputs. Changes that work
   better are drawn more often, and they are improved against the model while it changes.
3. Recover (the rest): only the clean terms are tuned, with a step size that falls to zero, and without the samples
   whose loss the unlearning raised most (`sieve`). If triggered samples hide in the clean set, they are among these.

The clean terms are the loss and the KL divergence from the received model's answers, on clean inputs and on mixtures of
them. docs/purification.md has the evidence, including failures.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.fisher.labels import Kind
from fastfip.methods._search import at_least
from fastfip.methods._space import Space, SpaceMethod, Spectral
from fastfip.methods.base import Groups, Run, register
from fastfip.methods.wfip.clean import CleanTerms
from fastfip.methods.wfip.config import FastWFIPConfig, WFIPConfig
from fastfip.methods.wfip.search import search, search_points
from fastfip.methods.wfip.sieve import Sieve
from fastfip.methods.wfip.steps import StateMean, StepBound
from fastfip.methods.wfip.unlearn import unlearn
from fastfip.worst_case.added_points import AddedPoints
from fastfip.worst_case.pixels import perturbable
from fastfip.worst_case.universal import Perturbations

__all__ = ["WFIP", "FastWFIP"]

#: Share of the recovery whose states may be kept: earlier ones are still moving.
SETTLE = 0.5


@register
class WFIP(SpaceMethod):
    """Tune every parameter away from its worst-case inputs, held to clean data."""

    name = "wfip"
    summary = "worst-case FIP, our own: every weight, away from what small universal changes of the inputs reach"
    Config = WFIPConfig
    takes_parts = True
    over_ranks = True
    over_shards = True
    keeps = ("bound", "mean", "sieve", "sieved", "clean", "perturbations", "added")

    #: Whether the recovery takes the loss and the KL in turns, one pass a step instead of two.
    turns: ClassVar[bool] = False
    #: Perturbations are improved in every so many steps of the unlearning.
    improve_every: ClassVar[int] = 1
    #: Share of the steps, at the end, whose states are averaged: the last state is their mean.
    average: ClassVar[float] = 0.0

    perturbations: Perturbations | None = None
    added: AddedPoints | None = None  # to point clouds
    bound: StepBound | None = None
    sieved = 0  # what the sieve has done: nothing, left out, taken back

    def setup(self, run: Run) -> None:
        """Take the Fisher diagonal if steps are bounded by it, keep the received model, look for the perturbations."""
        super().setup(run)
        config: Any = run.config
        self.mean = StateMean(self.space.tensors, self.average)
        if config.trust:
            # Labels can be drawn only where the loss is the cross-entropy of class labels.
            kind: Kind = "mc" if run.task.loss_hook is None else "empirical"
            with run.timed("fisher"):
                diagonal = [d.detach() for d in self.space.diagonal(run, kind)]
            self.bound = StepBound(self.space.tensors, diagonal, config.trust)
        received = None
        if config.kl > 0 or config.sieve > 0:
            self.space.keep_received(run)
            received = functools.partial(self.space.received, run)
        self.sieve = Sieve(run)
        batches = run.endless()
        first = next(batches)
        self.clean = CleanTerms(run, self.turns, received, perturbable(run.task, first))
        self.perturbations = search(run, batches, config.radius_factor)
        self.added = search_points(run) if config.unlearn and config.weight else None

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser; Adam forgets in a hundred steps, for gradients fall in the recovery."""
        if run.config.optimizer == "adam":
            return torch.optim.Adam(groups, lr=run.config.lr, betas=(0.9, 0.99), weight_decay=run.config.weight_decay)
        return super().make_optimizer(run, groups)

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the terms that belong to this part of the course."""
        self.space.begin()
        values = self.clean.backward(batch)
        if self.perturbations is not None and run.progress < run.config.unlearn:  # type: ignore[attr-defined]
            room = self.room(run, values)
            values.update(self.unlearn(run, at_least(run, batch), self.perturbations, room))
            if self.added is not None:
                values["reached_by_points"] = self.unlearn(run, at_least(run, batch), self.added, room)["reached"]
        self.space.end()
        if self.bound is not None:
            self.bound.remember()
        return values

    def unlearn(self, run: Run, batch: Batch, worst: Perturbations, room: float) -> dict[str, float | Tensor]:
        """Back-propagate the loss towards the true labels at perturbed inputs, and improve the perturbations."""
        config: Any = run.config
        improve = run.step % self.improve_every == 0
        return unlearn(run, batch, worst, config.weight * room, improve, self.space.inputs_only)

    def room(self, run: Run, values: dict[str, float | Tensor]) -> float:
        """Return how much of the unlearning the clean answers leave room for: 1 within the budget, 0 at twice of it.

        The constraint KL(p_received || p) <= budget as a weight: how far a model can be moved differs by orders of
        magnitude from model to model, and no step size fits all.
        """
        if "kl" not in values:
            return 1.0
        return min(1.0, max(0.0, 2.0 - float(values["kl"]) / run.config.budget))  # type: ignore[attr-defined]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Shorten the step, average the last states, and sieve.

        After the last step that unlearns samples are left out; half-way through the recovery some come back.
        """
        if self.bound is not None:
            self.bound.shorten()
        self.mean.add(run)
        config: Any = run.config
        if config.unlearn == 0 or self.perturbations is None or self.clean.received is None:
            return
        done = (run.step + 1) / run.total_steps
        if self.sieved > 1 or done < (config.unlearn, (1 + config.unlearn) / 2)[self.sieved]:
            return
        self.sieved += 1
        self.space.begin()
        try:
            if self.sieved == 1:
                self.sieve.leave_out(self.clean.received, config.sieve)
            else:
                self.sieve.take_back()
                self.sieve.say()
        finally:
            self.space.leave(fold=False)

    def is_candidate(self, run: Run) -> bool:
        """Only states from the last part of the recovery: earlier ones are still moving."""
        return run.progress >= 1 - SETTLE * (1 - run.config.unlearn)  # type: ignore[attr-defined]


@register
class FastWFIP(WFIP):
    """Worst-case FIP on spectral shifts: only the singular values of each weight, biases and norm layers move.

    W(delta) = U diag(relu(sigma + delta)) V^T as in Fast FIP: U, V and sigma are computed once, delta is tuned, and
    folded back exactly. The recovery takes its two clean terms in turns, perturbations are improved in every second
    step, and the states of the last fifth of the steps are averaged: a third less work at the same accuracy.
    """

    name = "fast_wfip"
    summary = "worst-case FIP on the singular values of each weight, our own; the default for few samples"
    Config = FastWFIPConfig
    lends_weights = True
    over_shards = False  # U and V of a weight are of the whole of it

    turns = True
    improve_every = 2
    average = 0.2

    def make_space(self, run: Run) -> Space:
        """Return the spectral shifts."""
        config: Any = run.config
        return Spectral(run, config.affine, config.rank, config.cache)
