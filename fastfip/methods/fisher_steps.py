"""Large steps of bounded Fisher length on changed images (`fisher_steps`), the package's own method.

A backdoor falls to large steps, which also ruin a model that cannot bear them. Three parts make them bearable and sure:

1. The step. Each tensor moves by a share of its own norm, and the whole step is no longer than `nats` in the Fisher
   metric of the model as it is: sqrt(sum_i F_ii d_i^2). One setting serves networks with and without normalisation.
2. Images changed at random that keep their labels, in the first third of the steps (`fastfip.worst_case.changes`).
3. The worst case: for each class the universal change of the input that sends samples there, unlearned meanwhile.

Nothing holds the model to the received one's answers: a divergence from these kept backdoors and saved no accuracy.
docs/purification.md has the evidence.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.errors import FastFIPError, ModelError
from fastfip.fisher import fisher_diagonal
from fastfip.methods._relative import RelativeSGD, fisher_length
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting
from fastfip.methods.wfip.search import at_least
from fastfip.methods.wfip.sieve import Sieve
from fastfip.nets.state import frozen_copy
from fastfip.worst_case.changes import changed
from fastfip.worst_case.pixels import PixelRange
from fastfip.worst_case.universal import Perturbations

__all__ = ["FisherSteps", "FisherStepsConfig"]

#: Perturbations are drawn in proportion to success ** FOCUS, and move by so many radii a step.
FOCUS, IMPROVE_STEP = 2.0, 0.3
#: The search: so many steps at each radius, every class alike, then so many that favour the classes that are reached.
ROUND, LAST = 10, 10
#: The radius grows by this factor until a class is reached from so many of the samples, or up to the last one.
GROWTH, REACH, WIDEST = 1.4, 0.5, 0.4
#: The Fisher diagonal is renewed in every so many steps, over so many samples; what is new counts by so much.
EVERY, SAMPLES, NEW = 4, 32, 0.25
#: Clean inputs that the range of pixels and the size of a typical input are taken from, in bytes.
MOST_BYTES = 128 << 20


@dataclass(frozen=True)
class FisherStepsConfig(MethodConfig):
    """Settings of `fisher_steps`. `lr` is relative: the length of a step over the norm of each tensor."""

    STEPS: ClassVar[int | None] = 150

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 150 if neither is given", low=1)
    batch_size: int | None = setting(64, "samples a step", low=1)
    lr: float = setting(0.01, "largest step of each tensor, over its norm", above=0)
    optimizer: Literal["sgd"] = setting("sgd", "optimiser: steps relative to each tensor's norm")
    warmup: float = setting(0.04, "share of the steps in which the step size rises linearly", low=0, below=1)
    weight_decay: float = setting(0.0, "none: steps are relative to each tensor's norm", low=0, high=0)
    grad_clip: float | None = setting(5.0, "largest norm of the gradient; None: not clipped", above=0)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "what is done to each clean image tuned on: moved by up to an eighth (crop), mirrored as well (crop_flip)",
    )
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the last, or the best by held-out clean score"
    )
    holdout: float = setting(0.0, "share of the clean set that only selects; 0: none", low=0, high=0.5)
    nats: float | None = setting(0.04, "longest step in the Fisher metric; None: no bound", above=0)
    changes: float = setting(0.35, "share of the steps whose images are changed at random", low=0, high=1)
    unlearn: float = setting(0.3, "share of the steps that unlearn the worst case", low=0, high=1)
    weight: float = setting(0.5, "weight of the loss at worst-case inputs; 0: they are not looked for", low=0)
    radius: float = setting(
        0.1, "bound of the worst-case change, over the norm of a typical input; it grows until a class is reached",
        above=0,
    )  # fmt: skip
    sieve: float = setting(
        0.02, "share of the clean samples, those that the unlearning hurt most, left out of the recovery",
        low=0, high=0.5,
    )  # fmt: skip


@register
class FisherSteps(Method):
    """Tune every parameter by large steps of bounded Fisher length, on images changed at random and for the worst.

    d_l = -|w_l| m_l / |m_l| for each tensor l, with the momentum m of the gradients (LARS, arXiv 1708.03888);
    w <- w + min(lr, nats / sqrt(sum_i F_ii d_i^2)) d, F the Fisher diagonal of the present model with labels drawn from
    it (with `loss=`: with the given ones), a running mean over small batches. `lr` and `nats` fall together along the
    schedule.
    """

    name = "fisher_steps"
    summary = "large steps of bounded Fisher length on changed images, our own"
    Config = FisherStepsConfig

    range: PixelRange | None = None
    worst: Perturbations | None = None
    diagonal: dict[str, Tensor] | None = None
    latest: float | Tensor = 0.0  # loss
    received: nn.Module | None = None  # until the sieve has compared with it
    taken_back = False

    def setup(self, run: Run) -> None:
        """Read the range of the inputs and look for the worst case."""
        config = self.config(run)
        self.names = {id(p): name for name, p in run.model.named_parameters()}
        self.more = run.endless()
        self.sieve = Sieve(run)
        inputs: list[Tensor] = []
        self.range = PixelRange.of_batches(self._some(run, inputs), run.task)
        same = len({x.shape[1:] for x in inputs}) == 1
        if self.range is None or not same:
            run.note("inputs that are no real numbers of one shape are not changed: the steps are on them as they are")
            run.alert("ONLY FINE-TUNED by large steps, no worst case was unlearned (inputs that cannot be changed)")
            self.range = None
            return
        if config.sieve > 0 and max(config.changes, config.unlearn) > 0:
            self.received = frozen_copy(run.model)
        if run.classes is None:
            run.alert("NO WORST CASE was unlearned (loss= takes outputs or labels of another form)")
        elif config.weight and config.unlearn:
            self.worst = Perturbations.of(torch.cat(inputs), run.classes, run.generator, config.radius)
            # In float16 the gradient of an input underflows without the scaler.
            with run.timed("search"), run.autocast() if run.amp != torch.float16 else contextlib.nullcontext():
                self._search(run, self.worst)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Leave samples out when changes and unlearning end; half-way from there some come back."""
        config, done = self.config(run), (run.step + 1) / run.total_steps
        border = max(config.changes, config.unlearn)
        if self.received is not None and done >= border:
            self.sieve.leave_out(self.received, config.sieve)
            self.received = None
        elif self.sieve.whole is not None and not self.taken_back and done >= (1 + border) / 2:
            self.taken_back = True
            self.sieve.take_back()
            self.sieve.say()

    @staticmethod
    def config(run: Run) -> FisherStepsConfig:
        """Return the settings of a run."""
        assert isinstance(run.config, FisherStepsConfig)
        return run.config

    @staticmethod
    def _some(run: Run, inputs: list[Tensor]) -> list[Batch]:
        """Return clean batches up to a number of bytes, their inputs in `inputs` where there are any."""
        out: list[Batch] = []
        for batch in run.clean.batches(device=run.device):
            out.append(batch)
            try:
                inputs.append(run.task.inputs(batch).detach())
            except FastFIPError:
                break
            if sum(x.nbytes for x in inputs) >= MOST_BYTES:
                break
        return out

    @staticmethod
    def _search(run: Run, worst: Perturbations) -> None:
        """Look for the worst change of each class, at the radius at which one of them works."""
        batches = run.endless()

        def improve(steps: int, focus: float) -> None:
            for _ in range(steps):
                batch = at_least(run, next(batches))
                c = worst.draw(run.task.labels(batch), focus)
                worst.improve(run.model, run.task, batch, c, IMPROVE_STEP)

        improve(ROUND, 0.0)
        while float(worst.success.max()) < REACH and worst.relative_radius * GROWTH <= WIDEST:
            worst.grow(GROWTH)
            improve(ROUND, 0.0)
        improve(LAST, FOCUS)
        run.log(radius=worst.relative_radius)

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return SGD whose steps are relative and bounded."""
        config = self.config(run)

        def bound(tensors: list[Tensor], steps: list[Tensor]) -> float:
            assert config.nats is not None
            if self.diagonal is None:  # none was finite yet
                return 0.0
            length = fisher_length(steps, [self.diagonal[self.names[id(p)]] for p in tensors])
            share = max(group["lr"] for group in optimizer.param_groups) / config.lr
            most = config.nats * share / max(length, 1e-12) if math.isfinite(length) else 0.0
            run.log(relative_step=min(config.lr * share, most))
            return most

        optimizer = RelativeSGD(groups, config.lr, config.momentum, bound if config.nats else None)
        return optimizer

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Back-propagate the loss at changed images and, in the first part, that at worst-case inputs."""
        config = self.config(run)
        if self.range is not None and run.progress < config.changes:
            other = changed(run.task, batch, self.range, run.generator)
            if other is None:
                run.note("the inputs are no images [N, channels, height, width] of 4 pixels or more: none were changed")
            batch = batch if other is None else other
        values = super().backward(run, batch)
        if not math.isfinite(float(values["loss"])):  # the loop leaves the step out: nothing is learned from it
            return values
        self.latest = values["loss"]
        if config.nats and (run.step % EVERY == 0 or self.diagonal is None):
            with run.timed("fisher"):
                self._renew(run, batch)
        if self.worst is not None and run.progress < config.unlearn:
            values.update(self._unlearn(run, self.worst))
        return values

    def score(self, run: Run) -> dict[str, float]:
        """Return the loss of the latest step where nothing is chosen by a score: no pass is spent on one."""
        if run.heldout is None and run.config.select == "last":
            return {"score": float(self.latest)}
        return super().score(run)

    def _renew(self, run: Run, batch: Batch) -> None:
        """Take the Fisher diagonal of some samples of the batch into the running mean."""
        n = run.task.size(batch)
        few = take(batch, torch.arange(min(n, SAMPLES), device="cpu"), n)
        try:
            with run.eval_mode():
                new = fisher_diagonal(
                    run.model, [few], kind="mc" if run.task.loss_hook is None else "empirical",
                    forward=run.task.forward_hook, loss=run.task.loss_hook,
                    seed=int(torch.randint(0, 2**31, (), generator=run.generator, device="cpu")),
                )  # fmt: skip
        except ModelError as error:
            raise ModelError(f"no Fisher to bound the steps by ({error}): set nats=None, or take fine_tune") from None
        values = {name: value.detach().float() for name, value in new.items()}
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            return
        if self.diagonal is None:
            self.diagonal = values
        for name, value in values.items():
            self.diagonal[name].lerp_(value, max(NEW, 1 / (1 + run.step // EVERY)))

    def _unlearn(self, run: Run, worst: Perturbations) -> dict[str, float | Tensor]:
        """Back-propagate the loss towards the true labels at perturbed inputs, and improve the perturbations."""
        config = self.config(run)
        batch = at_least(run, next(self.more))
        c = worst.draw(run.task.labels(batch), FOCUS)
        with run.bn("eval"):
            used, moved = worst.moved(run.task, batch, c)
            with run.autocast():
                logits = run.forward(moved)
                loss = run.loss(logits, moved).mean()
            if run.amp == torch.float16:  # the gradient of an input underflows without the scaler
                run.backward(config.weight * loss)
                reached = worst.improve(run.model, run.task, batch, c, IMPROVE_STEP)
            else:
                reached = worst.step(logits, used, c, IMPROVE_STEP, retain_graph=True)
                run.backward(config.weight * loss)
        return {"worst_case_loss": loss.detach(), "reached": reached}
