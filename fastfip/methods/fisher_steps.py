"""Large steps of bounded Fisher length on changed images (`fisher_steps`), the package's own method.

A backdoor falls to large steps, which also ruin a model that cannot bear them. Three parts make them bearable and sure:

1. The step. Each tensor moves by a share of its own norm, between 0.5 and 2 % (less on texts, and where samples are
   few): so far that the whole step has a given length in the Fisher metric of the model as it is, sqrt(d^T F d). One
   setting serves networks with and without normalisation.
2. Images changed at random that keep their labels, in the first third of the steps by default
   (`fastfip.worst_case.changes`); clips alike in all frames, point clouds their own way (`fastfip.worst_case.points`);
   in texts words are exchanged.
3. The worst case: for each class the universal change of the input that sends samples there, unlearned meanwhile. In
   point clouds it is a few points at places of their own as well (`fastfip.worst_case.added_points`), in texts phrases
   of the model's own words (`fastfip.worst_case.phrases`), in bags of words their vectors are changed; without classes
   it is what raises every sample's loss. Of more than 64 classes 16 likely ones are looked at.

At the end the weights go a part of the way back towards the received ones: on the straight line between them clean
accuracy returns sooner than the backdoor. Nothing but `hold`, for point clouds and texts, holds the model to the
received one's answers: on images a divergence from these kept backdoors and saved no accuracy. docs/purification.md has
the evidence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastfip.data.augment import augmented, mirrored, movable
from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.methods._batchnorm import taken_anew
from fastfip.methods._gentle import FOUND_RADIUS, SPARSE, for_clouds, for_found, for_sparse, for_texts
from fastfip.methods._held import hold_answers
from fastfip.methods._phrases import search_phrases, unlearn_phrases, worst_of_tokens
from fastfip.methods._reach import TOKEN_RADIUS, search_reach
from fastfip.methods._received import giving, kept_received
from fastfip.methods._relative import RelativeSGD, fisher_length, received_values
from fastfip.methods._screen import few_of_many
from fastfip.methods._search import REACH, added_points, at_least, inputs_of, precision, worst_case
from fastfip.methods._symmetry import symmetric_classes
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting
from fastfip.methods.wfip.sieve import Sieve
from fastfip.methods.wfip.unlearn import unlearn
from fastfip.worst_case.added_points import AddedPoints
from fastfip.worst_case.changes import changed
from fastfip.worst_case.goals import TowardsClass
from fastfip.worst_case.phrases import Phrases
from fastfip.worst_case.pixels import PixelRange
from fastfip.worst_case.points import changed_points, moved_points, points_axis
from fastfip.worst_case.universal import Perturbations

__all__ = ["FisherSteps", "FisherStepsConfig"]

#: The step is measured in every so many steps, over so many samples and this share of the largest step; a new square of
#: its length counts by so much.
EVERY, SAMPLES, DIFFERENCE, NEW = 4, 32, 0.1, 0.25
#: No step is shortened below this share of the largest one; the bound grows by up to so much where the loss is low.
SHORTEST, MOST_GROWTH = 0.25, 3.0
#: Images that BatchNorm's statistics are taken from at the end, about.
STATISTICS = 1024
#: Clean inputs that the range of pixels and the size of a typical input are taken from, in bytes.
MOST_BYTES = 128 << 20


@dataclass(frozen=True)
class FisherStepsConfig(MethodConfig):
    """Settings of `fisher_steps`. `lr` is relative: the length of a step over the norm of each tensor."""

    STEPS: ClassVar[int | None] = 150

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 150 if neither is given", low=1)
    batch_size: int | None = setting(64, "samples a step", low=1)
    lr: float = setting(0.02, "largest step of each tensor, over its norm", above=0)
    optimizer: Literal["sgd"] = setting("sgd", "optimiser: steps relative to each tensor's norm")
    warmup: float = setting(0.04, "share of the steps in which the step size rises linearly", low=0, below=1)
    weight_decay: float = setting(0.0, "none: steps are relative to each tensor's norm", low=0, high=0)
    grad_clip: float | None = setting(5.0, "largest norm of the gradient; None: not clipped", above=0)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "what is done to each clean image tuned on: moved by up to an eighth (crop), mirrored as well (crop_flip)",
    )
    back: float = setting(
        0.1, "how far the tuned weights are taken back towards the received ones at the end; 0: not", low=0, below=1
    )
    mirror: bool = setting(
        True, "whether images are mirrored as well, of the classes whose mirror images the received model knows as well"
    )
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the last, or the best by held-out clean score"
    )
    holdout: float = setting(0.0, "share of the clean set that only selects; 0: none", low=0, high=0.5)
    length: float | None = setting(
        0.25, "longest step in the Fisher metric: half its square is the divergence, in nats; None: no bound", above=0
    )
    peak: float = setting(
        1.0, "loss, in nats, that the first part of the steps goes up to: below it the bound is wider; 0: never",
        low=0,
    )  # fmt: skip
    changes: float = setting(0.35, "share of the steps whose images are changed at random", low=0, high=1)
    unlearn: float = setting(0.3, "share of the steps that unlearn the worst case", low=0, high=1)
    weight: float = setting(0.5, "weight of the loss at worst-case inputs; 0: they are not looked for", low=0)
    radius: float = setting(
        0.05, "bound of the worst-case change, over the norm of a typical input; it grows until a class is reached",
        above=0,
    )  # fmt: skip
    hold: float = setting(
        0.0, "weight of the divergence from the received answers at texts of exchanged words, or at moved point clouds",
        low=0,
    )  # fmt: skip
    sieve: float = setting(
        0.02, "share of the clean samples, those that the unlearning hurt most, left out of the recovery",
        low=0, high=0.5,
    )  # fmt: skip


@register
class FisherSteps(Method):
    """Tune every parameter by large steps of bounded Fisher length, on images changed at random and for the worst.

    d_l = -|w_l| m_l / |m_l| for each tensor l, with the momentum m of the gradients (LARS, arXiv 1708.03888);
    w <- w + clip(length / sqrt(d^T F d), lr / 4, lr) d, F the Fisher of the present model (with `loss=`: the empirical
    one); the length is measured every fourth step by a difference quotient, and a running mean is taken. `lr` and
    `length` fall together along the schedule; in the first part `length` is wider where the loss is below `peak`. At
    the end w <- w + back (w_received - w). With fewer than three clean samples a class there is no lower bound, nothing
    is wider, BatchNorm is in eval mode, and the defaults are 75 steps of length 0.1; where one of more than 64 classes
    is reached all the same within a radius of 0.2, `weight` is 2, `length` 0.15, `back` 0.3, and images are not changed
    at random. For point clouds BatchNorm is in eval mode as well, `back` is 0.3 and `hold` 1, and each half of a batch
    unlearns one of the two worst cases. On token ids there is no lower bound, and the defaults are 75 steps of 32
    samples and half of the way back; with `hold`, texts of classes go none of it, and `changes` and `unlearn` are 0.95.
    `hold` times the divergence from the received answers is added, at moved clouds and at texts of exchanged words.
    """

    name = "fisher_steps"
    summary = "large steps of bounded Fisher length on changed images, our own"
    Config = FisherStepsConfig
    takes_parts = over_ranks = over_shards = True
    keeps = ("sparse", "found", "more", "sieve", "start", "symmetric", "range", "axis", "received", "worst", "added",
             "measured", "latest", "mean_loss", "taken_back", "phrases", "sieved", "held")  # fmt: skip

    range: PixelRange | None = None
    worst: Perturbations | None = None
    added: AddedPoints | None = None  # to point clouds
    phrases: Phrases | None = None  # of token ids
    measured: float | None = None  # mean square of the length of a step d
    seen: Batch = None  # what the gradient of this step is of
    latest: float | Tensor = 0.0  # loss
    mean_loss: float | None = None
    received: nn.Module | None = None  # until the sieve has compared with it, or to the end
    sieved = held = False  # the first is done; the second goes on to the end
    taken_back = False
    axis: int | None = None  # of the points, where inputs are point clouds
    symmetric: Tensor | None = None  # [classes]: whether their images may be mirrored
    sparse = False  # too few clean samples to learn anything again
    found = False  # a class is reached there, of many: nothing but what sends samples there is unlearned
    start: dict[str, Tensor] | None = None  # the received weights

    def setup(self, run: Run) -> None:
        """Read the range of the inputs and look for the worst case."""
        config = self.config(run)
        self.sparse = run.classes is not None and run.clean.n < SPARSE * run.classes
        usual = config.length == FisherStepsConfig().length
        if self.sparse and config.length is not None:
            for_sparse(run)
            run.alert(
                f"{run.clean.n} clean samples of {run.classes} classes cannot teach again what large steps destroy: "
                "steps are as short as the Fisher asks for, BatchNorm keeps its statistics, and the backdoor may stay"
            )
        self.more = run.endless()
        self.sieve = Sieve(run)
        if config.back > 0:
            self.start = received_values(run)
        if config.mirror and config.augment == "crop" and run.classes is not None:
            self.symmetric = symmetric_classes(run, run.classes)
        inputs, why_not = inputs_of(run, MOST_BYTES)
        if inputs:
            self.range = PixelRange.of_batches([(x,) for x in inputs], Task())
        few = None
        if config.weight and config.unlearn:
            few = few_of_many(run, inputs)
            worst = worst_case(run, inputs, config.radius, few) if inputs else worst_of_tokens(run, TOKEN_RADIUS)
            if isinstance(worst, Phrases):
                self.phrases = worst
                self.held = worst.remembers = config.hold > 0 and isinstance(worst.goal, TowardsClass)
                for_texts(run, self.held)
            else:
                self.worst = worst
        if self.range is None and self.worst is None and self.phrases is None:
            run.note("inputs that are no real numbers of one shape are not changed: steps are on them as they are")
            run.alert(f"ONLY FINE-TUNED by large steps, no worst case was unlearned ({why_not})")
            return
        if run.classes is not None:
            with run.eval_mode():
                some = next(iter(run.clean.batches(device=run.device)))
                self.axis = points_axis(run.model, run.task, some, run.generator)
            if self.axis is not None:
                for_clouds(run, run.task.inputs(some).shape[self.axis])
                self.held = self.config(run).hold > 0
                if self.worst is not None:
                    self.worst.together = run.together
        self.sieved = config.sieve == 0 or max(config.changes, config.unlearn) == 0
        if self.held or not self.sieved:
            self.received = kept_received(run, self.start or {})
        if self.worst is not None:
            with run.timed("search"), precision(run):
                search_reach(run, self.worst, near=self.axis is None)
                if self.axis is not None:
                    self.added = added_points(run, inputs, self.axis, few)
            near = self.sparse and few is not None and self.worst.relative_radius <= FOUND_RADIUS
            self.found = near and float(self.worst.success.max()) >= REACH
            if self.found:
                for_found(run, usual)
        if self.phrases is not None:
            with run.timed("search"):
                search_phrases(run, self.phrases, run.endless())

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Leave samples out when changes and unlearning end; half-way from there some come back; go back at the end.

        A run that is stopped before its last step keeps the weights that it has, and so does an earlier epoch that
        `select="best"` chooses.
        """
        config, done = self.config(run), (run.step + 1) / run.total_steps
        border = max(config.changes, config.unlearn)
        if self.received is not None and not self.sieved and done >= border:
            received, self.sieved = self.received, True
            self.received = received if self.held else None
            self.sieve.leave_out(lambda: giving(run, received), config.sieve)
        elif self.sieve.whole is not None and not self.taken_back and done >= (1 + border) / 2:
            self.taken_back = True
            self.sieve.take_back()
            self.sieve.say()
        if self.start is not None and run.step + 1 == run.total_steps:
            self._go_back(run, self.start)

    def fold(self, run: Run) -> None:
        """Go back where the last step was left out, with a loss that is not finite."""
        if self.start is not None and run.step == run.total_steps > 0 and not (run.interrupted or run.diverged):
            self._go_back(run, self.start)

    @torch.no_grad()
    def _go_back(self, run: Run, start: dict[str, Tensor]) -> None:
        """Take the weights a part of the way back, and BatchNorm's statistics anew for what they are then."""
        for name, p in run.model.named_parameters():
            if name in start:
                p.lerp_(start[name], self.config(run).back)
        self._statistics(run)
        self.start = None

    def _statistics(self, run: Run) -> None:
        """Take BatchNorm's statistics from clean images that are changed as in the steps.

        From images as they are, which the model fits too well by then, they cost the ResNet-20 two points.
        """

        def shown() -> Iterator[Batch]:
            seen = 0
            while seen < STATISTICS:
                for batch in run.clean.batches(
                    run.config.batch_size, shuffle=True, generator=run.generator, device=run.device, smallest=2
                ):
                    yield self._mirrored(run, self._moved(run, batch))
                    seen += run.task.size(batch)
                    if seen >= STATISTICS:
                        break

        taken_anew(run, shown())

    @staticmethod
    def config(run: Run) -> FisherStepsConfig:
        """Return the settings of a run."""
        assert isinstance(run.config, FisherStepsConfig)
        return run.config

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return SGD whose steps are relative and bounded."""
        config = self.config(run)

        def bound(tensors: list[Tensor], steps: list[Tensor]) -> float:
            assert config.length is not None
            if run.step % EVERY == 0 or self.measured is None:
                with run.timed("fisher"):
                    self._measure(run, tensors, steps)
            share = max(group["lr"] for group in optimizer.param_groups) / config.lr
            if self.measured is None:  # nothing finite was measured yet
                return 0.0
            most = config.length * share * self._growth(run) / max(math.sqrt(self.measured), 1e-12)
            # Far from its minimum the answers have to change: there the length alone would let a network stand still.
            # A pretrained model of texts has learned what a few of them cannot teach it again, so none is there.
            if not self.sparse and self.phrases is None:
                most = max(most, SHORTEST * config.lr * share)
            run.log(relative_step=min(config.lr * share, most))
            return most

        tables = {id(m.weight) for m in run.model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        optimizer = RelativeSGD(groups, config.lr, config.momentum, bound if config.length else None, tables, run.norms)
        return optimizer

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Back-propagate the loss at changed images and, in the first part, that at worst-case inputs."""
        config = self.config(run)
        batch = self._mirrored(run, batch if self.axis is None else self._moved(run, batch))
        if self.range is not None and run.progress < config.changes and not self.found:
            batch = self._changed(run, batch, self.range)
        self.seen = batch
        with self._reworded(run):
            values = super().backward(run, batch)
        if not math.isfinite(float(values["loss"])):  # the loop leaves the step out: nothing is learned from it
            return values
        self.latest = values["loss"]
        loss = float(self.latest)
        self.mean_loss = loss if self.mean_loss is None else 0.9 * self.mean_loss + 0.1 * loss
        if (self.worst is not None or self.phrases is not None) and run.progress < config.unlearn:
            values.update(self._unlearn(run))
        if self.held and self.received is not None:
            batch, place = next(self.more), None if self.phrases is None else self.phrases.place
            batch = batch if self.axis is None else self._moved(run, batch)
            values["divergence"] = hold_answers(run, batch, place, self.received, config.hold)
        return values

    def _changed(self, run: Run, batch: Batch, known: PixelRange) -> Batch:
        if self.axis is not None:
            return changed_points(run.task, batch, self.axis, run.generator)
        other = changed(run.task, batch, known, run.generator, movable(run.task, batch, run.classes))
        if other is None:
            run.note("the inputs are no images of 4 pixels or more, clips or point clouds: none were changed")
        return batch if other is None else other

    def _reworded(self, run: Run) -> contextlib.AbstractContextManager[None]:
        if self.phrases is not None and run.progress < self.config(run).changes:
            return self.phrases.place.reworded(run.model, generator=run.own_generator())
        return contextlib.nullcontext()

    def _moved(self, run: Run, batch: Batch) -> Batch:
        if self.axis is not None and run.config.augment != "none":
            return moved_points(run.task, batch, self.axis, run.generator)
        how = run.config.augment if movable(run.task, batch, run.classes) else "none"
        return batch if how == "none" else augmented(run.task, batch, how == "crop_flip", run.generator) or batch

    def _mirrored(self, run: Run, batch: Batch) -> Batch:
        if self.symmetric is None:
            return batch
        may = self.symmetric[run.task.labels(batch).cpu()]
        drawn = torch.rand(len(may), generator=run.generator, device="cpu", dtype=torch.float32) < 0.5
        return mirrored(run.task, batch, may & drawn) or batch

    def score(self, run: Run) -> dict[str, float]:
        """Return the loss of the latest step where nothing is chosen by a score: no pass is spent on one."""
        if run.heldout is None and run.config.select == "last":
            return {"score": float(self.latest)}
        return super().score(run)

    def _growth(self, run: Run) -> float:
        """Return the factor of the bound: (peak / loss)^2 in the first part where the loss is below its peak.

        A network that learns the changed images at once, with its loss near zero, is one that larger steps do not harm.
        """
        config = self.config(run)
        if self.sparse or self.mean_loss is None or run.progress >= max(config.changes, config.unlearn):
            return 1.0
        return min(MOST_GROWTH, max(1.0, (config.peak / max(self.mean_loss, 1e-6)) ** 2))

    def _measure(self, run: Run, tensors: list[Tensor], steps: list[Tensor]) -> None:
        """Take the length of a step into the running mean."""
        n = run.task.size(self.seen)
        few = take(self.seen, torch.arange(min(n, SAMPLES), device="cpu"), n)
        square = fisher_length(run, few, tensors, steps, DIFFERENCE * self.config(run).lr) ** 2
        if math.isfinite(square):
            old = square if self.measured is None else self.measured
            self.measured = old + (square - old) * max(NEW, 1 / (1 + run.step // EVERY))

    def _unlearn(self, run: Run) -> dict[str, float | Tensor]:
        """Back-propagate the loss towards the true labels at the worst case, and improve what was found of it."""
        batch, weight = next(self.more), self.config(run).weight
        if self.phrases is not None:
            return unlearn_phrases(run, batch, self.phrases, weight, self.config(run).unlearn)
        assert self.worst is not None
        batch = at_least(run, batch)
        if self.added is None:
            return unlearn(run, batch, self.worst, weight)
        n = run.task.size(batch)
        one, other = (take(batch, half, n) for half in torch.arange(n, device="cpu").tensor_split(2))
        values = unlearn(run, one, self.worst, weight)
        values["reached_by_points"] = unlearn(run, other, self.added, weight)["reached"]
        return values
