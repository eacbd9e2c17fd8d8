"""What FIP and Fast FIP minimise: the published objective, and the one at worst-case inputs that is the default.

Published (FIP, arXiv 2409.00863, eq. as restated in the docs):

    L(theta) + eta_f * Tr F(theta) + (eta_r / 2) * sum_i F_ii (theta_i - theta_i^0)^2

The empirical Fisher vanishes where the labels are fitted, so on a net that fits its clean data the middle term has no
force. A backdoor shows as sharpness at other inputs: at those that a small universal change makes. The default
objective therefore takes the same three terms where the Fisher is not zero.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.fisher.diagonal import Kind
from fastfip.methods._fip_config import FIPConfig
from fastfip.methods._sieve import Sieve
from fastfip.methods._space import Space
from fastfip.methods.base import Run
from fastfip.nets.copies import frozen_copy
from fastfip.worst_case.universal import Perturbations, perturbable

__all__ = ["Objective", "Paper", "WorstCase", "retainer"]


def retainer(tensors: list[Tensor], anchor: list[Tensor], diagonal: list[Tensor]) -> Tensor:
    """Return sum_i F_ii (theta_i - theta_i^0)^2 / 2, the anchor at the received weights (FIP; EWC's form)."""
    total = sum(
        ((d * (t - t0).pow(2)).sum() for t, t0, d in zip(tensors, anchor, diagonal)),
        start=torch.zeros((), device=tensors[0].device),
    )
    return total / 2


def divergence(target: Tensor, answer: Tensor) -> Tensor:
    """Return the mean KL(softmax(target) || softmax(answer)) of logits [N, C], in float32; masked ones may be -inf."""
    p, q = (x.float().log_softmax(-1).clamp_min(-100) for x in (target, answer))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


class Objective(ABC):
    """One way to put the terms together."""

    def __init__(self, run: Run, space: Space, config: FIPConfig) -> None:
        self.run, self.space, self.config = run, space, config
        self.anchor: list[Tensor] = []
        self.diagonal: list[Tensor] = []
        self.mean: list[Tensor] = []
        self.averaged = 0

    def setup(self) -> None:
        """Take the Fisher diagonal of the received net once, if the retainer needs it."""
        if self.config.eta_r > 0 or self.config.trust:
            # Labels can be drawn only where the loss is the cross-entropy of class labels.
            kind: Kind = "empirical" if self.run.task.loss_hook is not None else self.config.fisher
            with self.run.timed("fisher"):
                self.diagonal = [d.detach() for d in self.space.diagonal(self.run, kind)]
        if self.config.eta_r > 0:
            self.anchor = [t.detach().clone() for t in self.space.tensors]

    @abstractmethod
    def backward(self, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradient of one step; return what the history shows."""

    def is_candidate(self) -> bool:
        """Return whether the present state may be kept."""
        return True

    def remember(self) -> None:
        """Keep where the tensors are before the optimiser's step."""
        if self.config.trust:
            self.previous = [t.detach().clone() for t in self.space.tensors]

    def shorten(self) -> None:
        """Cut the step just taken, coordinate by coordinate, to at most trust / sqrt(F_ii).

        In the Fisher's diagonal approximation no coordinate's step then costs more than trust^2 / 2 of
        KL(p_received || p) on clean data, however flat or sharp the net is.
        """
        if not self.config.trust:
            return
        for t, before, d in zip(self.space.tensors, self.previous, self.diagonal):
            limit = self.config.trust / d.sqrt().clamp_min(1e-20)
            t.data.copy_(before + torch.minimum(torch.maximum(t.detach() - before, -limit), limit))

    def average(self) -> None:
        """Take the state after this step into the mean of the last ones, and put the mean in place after the last.

        The noise of small steps averages out (Polyak and Juditsky 1992), so that fewer samples a step are enough. A run
        that is stopped before its last step keeps a state that is no mean.
        """
        run, tensors = self.run, self.space.tensors
        if run.step < (1 - self.config.average) * run.total_steps:
            return
        if not self.averaged:
            self.mean = [t.detach().clone() for t in tensors]
        self.averaged += 1
        for mean, t in zip(self.mean, tensors):
            mean.lerp_(t.detach(), 1 / self.averaged)
            if run.step + 1 == run.total_steps:
                t.data.copy_(mean)

    def after_step(self) -> None:
        """Do what follows the optimiser's step."""
        self.shorten()
        self.average()

    def add_retainer(self, values: dict[str, float | Tensor]) -> None:
        """Back-propagate the anchor."""
        if self.anchor:
            term = retainer(self.space.tensors, self.anchor, self.diagonal)
            self.run.backward(self.config.eta_r * term)
            values["retainer"] = term.detach()

    def add_trace(self, batch: Batch, values: dict[str, float | Tensor]) -> None:
        """Back-propagate Tr(F), every `trace_every` steps."""
        if self.config.eta_f > 0 and self.run.step % self.config.trace_every == 0:
            self.space.begin()
            with torch.autocast(self.run.device.type, enabled=False):
                trace = self.space.trace(self.run, batch)
            self.run.backward(self.config.eta_f * trace)
            self.space.end()
            values["fisher_trace"] = trace.detach()


class Paper(Objective):
    """The published objective: exact Tr(F) by double backward, the retainer with the true diagonal."""

    def backward(self, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the three terms."""
        run = self.run
        self.space.begin()
        with run.autocast():
            loss = run.loss(run.forward(batch), batch).mean()
        run.backward(loss)
        values: dict[str, float | Tensor] = {"loss": loss.detach()}
        self.space.end()
        self.add_trace(batch, values)
        self.add_retainer(values)
        return values


class WorstCase(Objective):
    """Unlearn the worst-case inputs, then recover; the received net's own clean answers are the anchor throughout.

    1. Search: universal perturbations for every class, the radius grown until the most susceptible class is reached
       from `reach` of the clean samples. So the radius is the net's own, and a backdoor, being the easiest to reach,
       sets it.
    2. Unlearn (the first `unlearn` of the steps): at perturbed inputs, drawn the more often the better they work, the
       loss towards the true label, whose gradient is what the Fisher information at those inputs is made of; the
       perturbations go on improving against the net as it changes.
    3. Recover (the rest): clean terms only, the step size falling to zero, without the samples that the unlearning
       hurt most (`sieve`): where triggered ones hide in the clean set, they are among them.

    The clean terms: the loss, and KL(p_received || p) on clean inputs and mixtures of them. To second order the KL is
    the quadratic form of the full Fisher at the received weights, of which the published retainer keeps the diagonal.
    """

    perturbations: Perturbations | None = None
    latest: Tensor | None = None  # the clean loss of the last step that took it
    sieved = 0  # what the sieve has done: nothing, left out, taken back

    def setup(self) -> None:
        """Copy the received net and look for the perturbations."""
        super().setup()
        run, config = self.run, self.config
        self.sieve = Sieve(run)
        self.teacher = frozen_copy(run.model) if config.kl > 0 or config.sieve > 0 else None
        pool = self._batches()
        first = next(pool)
        self.mixable = perturbable(run.task, first)
        sample = list(itertools.islice(run.clean.batches(device=run.device), 64)) if self.mixable else []
        inputs = [run.task.inputs(b) for b in sample]
        if len({x.shape[1:] for x in inputs}) > 1:
            why_not = "the inputs differ in shape"
        elif not self.mixable:
            why_not = "no input of real numbers under a name that is known, such as x or image"
        else:
            why_not = "loss= takes outputs or labels of another form" if run.classes is None else ""
        if why_not or run.classes is None:
            run.note(
                f"no worst-case inputs were looked for ({why_not}): only the clean terms of the objective are left"
            )
            return
        self.perturbations = Perturbations.of(torch.cat(inputs), run.classes, run.generator)
        with run.timed("search"), run.autocast() if run.amp != torch.float16 else contextlib.nullcontext():
            self._search(pool)

    def _search(self, pool: Any) -> None:
        run, config, found = self.run, self.config, self.perturbations
        assert found is not None
        for _ in range(config.search_rounds):
            for _ in range(config.search_steps):
                batch = self._at_least(next(pool), config.search_batch)
                y = run.task.labels(batch)
                found.improve(run.model, run.task, batch, found.draw(y, 0.0), config.search_step)
            if float(found.success.max()) >= config.reach:
                break
            found.grow(config.search_growth)
        found.grow(config.radius_factor)
        run.log(radius=found.relative_radius)

    def backward(self, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the terms that belong to this part of the course."""
        run, config, found = self.run, self.config, self.perturbations
        self.space.begin()
        values = self._clean(batch)
        if found is not None and run.progress < config.unlearn:
            batch = self._at_least(batch, config.search_batch)
            y = run.task.labels(batch)
            c = found.draw(y, config.focus)
            with run.bn("eval"):
                used, moved = found.moved(run.task, batch, c)
                with run.autocast():
                    logits = run.forward(moved)
                    loss = run.loss(logits, moved).mean()
                pull = config.weight * self._room(values)
                if run.step % config.improve_every:
                    run.backward(pull * loss)
                    reached = found.count(logits, c)
                elif run.amp == torch.float16:
                    # The gradient of an input underflows without the scaler: a pass of its own, in float32.
                    run.backward(pull * loss)
                    reached = found.improve(run.model, run.task, batch, c, config.search_step)
                else:
                    with self.space.inputs_only():
                        reached = found.step(logits, used, c, config.search_step, retain_graph=True)
                    run.backward(pull * loss)
            values.update(worst_case_loss=loss.detach(), reached=reached)
        self.space.end()
        if found is not None and run.progress < config.unlearn:
            self.add_trace(run.task.replace_inputs(moved, run.task.inputs(moved).detach()), values)
        self.add_retainer(values)
        return values

    def after_step(self) -> None:
        """After the last step that unlearns leave samples out; half-way through the recovery some come back."""
        super().after_step()
        run, config = self.run, self.config
        if config.unlearn == 0 or self.perturbations is None or self.teacher is None:
            return
        done = (run.step + 1) / run.total_steps
        if self.sieved > 1 or done < (config.unlearn, (1 + config.unlearn) / 2)[self.sieved]:
            return
        self.sieved += 1
        self.space.begin()
        try:
            if self.sieved == 1:
                self.sieve.leave_out(self.teacher, config.sieve)
            else:
                self.sieve.take_back()
                self.sieve.say()
        finally:
            self.space.leave(fold=False)

    def _room(self, values: dict[str, float | Tensor]) -> float:
        """Return how much of the unlearning the clean answers leave room for: 1 within the budget, 0 at twice of it.

        The constraint KL(p_received || p) <= budget as a weight: how far a net can be moved differs by orders of
        magnitude from net to net, and no step size fits all.
        """
        if "kl" not in values:
            return 1.0
        return min(1.0, max(0.0, 2.0 - float(values["kl"]) / self.config.budget))

    def _clean(self, batch: Batch) -> dict[str, float | Tensor]:
        """Back-propagate the clean terms of this step."""
        run = self.run
        values: dict[str, float | Tensor] = {}
        target, mixed = None, batch
        if self._weights()[1]:
            mixed = self._mix(batch, run.task.size(batch))
            with torch.no_grad(), run.autocast():
                target = run.task.forward(self.teacher, mixed)  # type: ignore[arg-type]
            if target.dim() != 2 or target.shape[1] < 2:
                run.note("the outputs are not logits [N, C]: they are not held to the received net's by a KL")
                self.teacher = target = None
        of_loss, of_kl = self._weights()
        total: Tensor | float = 0.0
        if of_loss:
            with run.autocast():
                loss = run.loss(run.forward(batch), batch).mean()
            total = of_loss * loss
            self.latest = loss.detach()
        if self.latest is not None:
            values["loss"] = self.latest
        if target is not None:
            with run.autocast():
                answer = run.forward(mixed)
            kl = divergence(target, answer)
            total = total + of_kl * kl
            values["kl"] = kl.detach()
        run.backward(total)  # type: ignore[arg-type]
        return values

    def _weights(self) -> tuple[float, float]:
        """Return the weights of the loss and of the KL in this step; in turns each is that of two steps, or zero.

        While the net unlearns both are taken in every step: the KL says how much room there is.
        """
        kl = self.config.kl if self.teacher is not None else 0.0
        if not self.config.turns or self.run.progress < self.config.unlearn or kl in (0.0, 1.0):
            return 1 - kl, kl
        return (0.0, 2 * kl) if self.run.step % 2 else (2 * (1 - kl), 0.0)

    def _mix(self, batch: Batch, n: int) -> Batch:
        """Mixtures of the batch's inputs, each at least half of its own: more points to hold the net to its answers."""
        if not self.mixable or n < 2:
            return batch
        x = self.run.task.inputs(batch)
        share = 0.5 + 0.5 * float(torch.rand((), generator=self.run.generator, device="cpu"))
        other = torch.randperm(n, generator=self.run.generator, device="cpu").to(x.device)
        return self.run.task.replace_inputs(batch, share * x + (1 - share) * x[other])

    def _batches(self) -> Any:
        run = self.run
        while True:
            yield from run.clean.batches(
                run.config.batch_size, shuffle=True, generator=run.generator, device=run.device
            )

    def _at_least(self, batch: Batch, size: int) -> Batch:
        """A small batch repeated, so that with few clean samples every class is tried all the same."""
        n = self.run.task.size(batch)
        if n >= size:
            return batch
        index = torch.arange(n, device="cpu").repeat(-(-size // n))[:size]
        return take(batch, index, n)

    def is_candidate(self) -> bool:
        """Only states from the last part of the recovery: earlier ones are still moving."""
        return self.run.progress >= 1 - self.config.settle * (1 - self.config.unlearn)


def take(value: Any, index: Tensor, n: int) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() > 0 and value.shape[0] == n else value
    if isinstance(value, dict):
        return {k: take(v, index, n) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(take(v, index, n) for v in value)
    return value
