"""Adversarial Neuron Pruning (ANP, Wu and Wang, NeurIPS 2021, arXiv 2110.14430)."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.methods._batchnorm import kept_statistics, statistics_of
from fastfip.methods._classifier import Classifier
from fastfip.methods._masks import Masks, batchnorm_weights, output_rows, weights_of
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting
from fastfip.nets.state import requires_grad

__all__ = ["ANP", "ANPConfig"]

#: Thresholds that are tried, lowest first: the released code's.
THRESHOLDS = tuple(k / 20 for k in range(1, 19))
#: Held-out scores that the choice of neurons may take.
MOST_SCORES = 200


@dataclass(frozen=True)
class ANPConfig(MethodConfig):
    """Settings of ANP: those of the paper, 2000 steps if neither `steps` nor `epochs` is given."""

    STEPS: ClassVar[int | None] = 2000

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 2000 if neither is given", low=1)
    batch_size: int | None = setting(128, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(0.2, "step size of the masks", above=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size after the warm-up")
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    radius: float = setting(0.4, "largest relative change (eps) of a neuron's weight or bias by the adversary", low=0)
    inner: int = setting(1, "steps of the adversary", low=1)
    alpha: float = setting(0.2, "weight of the clean loss; the rest is that of the perturbed model", low=0, high=1)
    threshold: float | None = setting(
        None, "masks up to this are pruned (0.2 in the paper); None: chosen by held-out clean accuracy", low=0, high=1
    )
    tolerance: float = setting(0.05, "clean accuracy that pruning may cost where it chooses the threshold", low=0)


@register
class ANP(Method):
    """Prune the neurons whose small changes do the most harm. A backdoored model has neurons that do much harm.

        min_{m in [0,1]^n}  alpha L(m w, b) + (1 - alpha) max_{|delta|, |xi| <= eps} L((m + delta) w, (1 + xi) b)

    w and b are the BatchNorm scale and shift of a neuron. Without BatchNorm they are its row of weights and its bias,
    in every Linear layer and convolution except the classifier. The adversary starts at random and takes sign steps of
    eps / inner. At the end, neurons with low masks lose their w (b stays), and all others get their full w back.

    Neurons are pruned in the order of their masks, lowest first, in blocks between the thresholds 0.05, 0.1 .. 0.9, as
    long as the held-out clean accuracy stays within `tolerance` of the received model's. A block that costs more is
    halved until the neurons that clean images need are found, and these are spared. (In a model without BatchNorm, a
    hundred masks may be zero, in no order; one channel among them that clean images need would end the pruning.)
    Blocks that are needed for the samples that are tuned on are given back, the last one first. The released code and
    BackdoorBench choose by test accuracy and attack success. At least the neuron with the lowest mask is pruned. If
    `loss=` takes outputs other than logits, the mean loss may rise by `tolerance` instead.

    The released code never projects, so that with its random start the change reaches 2 eps. As there, BatchNorm uses
    batch statistics while masks are tuned, and the pruned model has the running statistics of the received one.
    """

    name = "anp"
    summary = "Adversarial Neuron Pruning: masks of neurons against adversarial changes of them, then pruning"
    Config = ANPConfig

    def setup(self, run: Run) -> None:
        """Choose the neurons; score the received net."""
        config = run.config
        assert isinstance(config, ANPConfig)
        self.config = config
        places = [] if config.bn_mode == "freeze" else batchnorm_weights(run.model, run.frozen)
        if not places:
            places = Classifier.of(run).spared(weights_of(run.model, frozen=run.frozen))
        masks = Masks.of(places, output_rows)
        found = {
            id(b): b
            for _, module, _ in places
            if (b := module._parameters.get("bias")) is not None and id(b) not in run.frozen
        }
        self.biases: list[nn.Parameter] = list(found.values())
        self.received_biases = [b.detach().clone() for b in self.biases]
        self.statistics = [b.detach().clone() for b in statistics_of(run)]
        with run.timed("score"):
            self.before = self.score(run)
        self.masks = masks

    def parameter_groups(self, run: Run) -> Groups:
        """The masks."""
        return [{"params": self.masks.values}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """The adversary's steps, then the gradients of both losses."""
        config = self.config
        values: dict[str, float | Tensor] = {}
        if config.radius > 0 and config.alpha < 1:
            with kept_statistics(run):
                delta, xi = self.adversary(run, batch)
                with self.perturbed(delta, xi):
                    robust = self._loss(run, batch)
                    run.backward((1 - config.alpha) * robust)
            values["perturbed_loss"] = robust.detach()
        with self.masks.tuning():
            clean = self._loss(run, batch)
            run.backward(config.alpha * clean)
        return {"loss": clean.detach(), **values}

    def _loss(self, run: Run, batch: Batch) -> Tensor:
        with run.autocast():
            return run.loss(run.forward(batch), batch).mean()

    def adversary(self, run: Run, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return relative changes of the neurons' weights and biases, within the radius, that raise the loss."""
        eps, step = self.config.radius, self.config.radius / self.config.inner

        def start(like: list[Tensor]) -> list[Tensor]:
            draws = [
                torch.rand(t.shape, generator=run.generator, device="cpu", dtype=torch.float32).mul_(2 * eps).sub_(eps)
                for t in like
            ]
            return [d.to(t.device, t.dtype) for d, t in zip(draws, like)]

        delta, xi = start(self.masks.values), start(self.received_biases)
        for _ in range(self.config.inner):
            with self.perturbed(delta, xi):
                run.backward(self._loss(run, batch))
                b_gradients = [b.grad for b in self.biases]
            gradients = [value.grad for value in self.masks.values]
            for value in self.masks.values:
                value.grad = None
            with torch.no_grad():
                for d, g in zip(delta, gradients):
                    if g is not None:
                        d.add_(g.sign().nan_to_num_(), alpha=step).clamp_(-eps, eps)
                for x, b, g in zip(xi, self.received_biases, b_gradients):
                    if g is not None:
                        x.add_((g * b).sign().nan_to_num_(), alpha=step).clamp_(-eps, eps)
        return delta, xi

    @contextlib.contextmanager
    def perturbed(self, delta: list[Tensor], xi: list[Tensor]) -> Iterator[None]:
        """Give the neurons (m + delta) w and (1 + xi) b for a block; gradients arrive at the masks and biases."""
        values = [v.detach() for v in self.masks.values]
        saved = [v.clone() for v in values]
        try:
            with torch.no_grad():
                for v, d in zip(values, delta):
                    v.add_(d)
                for b, received, x in zip(self.biases, self.received_biases, xi):
                    b.copy_(received * (1 + x))
            with requires_grad(self.biases, True), self.masks.tuning():
                yield
        finally:
            with torch.no_grad():
                for b, received in zip(self.biases, self.received_biases):
                    b.copy_(received)
                    b.grad = None
                for v, s in zip(values, saved):
                    v.copy_(s)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Clamp the masks to [0, 1]."""
        self.masks.clamp_(0.0)
        self.masks.write()

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Prune."""
        if not hasattr(self, "masks") or not len(self.masks):
            return
        # Those of the passes were taken with every neuron at its mask: not those of the few that are pruned.
        for b, received in zip(statistics_of(run), self.statistics):
            b.copy_(received)
        masks = torch.cat([v.detach().flatten() for v in self.masks.values])
        order = masks.argsort(stable=True)
        if run.step == 0 or float(masks[order[0]]) >= 1:
            self._prune(order[:0])
            return
        try:
            with run.timed("score"):
                gone = self.choose(run, masks[order], order)
        except KeyboardInterrupt:
            run.interrupted = True
            run.note("interrupted while the neurons were chosen: none was pruned")
            self._prune(order[:0])
            return
        self._prune(gone)
        highest = float(masks[gone].max())
        spared = int((masks <= highest).sum()) - len(gone)
        left = f", {spared} of them spared" if spared > 0 else ""
        run.note(f"{len(gone)} of {len(order)} neurons pruned: masks up to {highest:.2g}{left}")

    def choose(self, run: Run, masks: Tensor, order: Tensor) -> Tensor:
        """Return which neurons are pruned [k], given the masks [n], lowest first, and whose they are [n]."""

        def up_to(threshold: float) -> int:
            return int((masks <= threshold).sum())

        if self.config.threshold is not None:
            return order[: max(1, up_to(self.config.threshold))]
        self.scored = 0
        self.ends = [0]
        gone, start = order[:0], 0
        for end in sorted({up_to(t) for t in THRESHOLDS}):
            gone, start = self._joined(run, gone, order[start:end]), end
        self.joined = gone
        if run.heldout is not None and len(gone):
            gone = self._confirmed(run, gone)
        return gone if len(gone) else order[:1]

    def _confirmed(self, run: Run, gone: Tensor) -> Tensor:
        """Return the first blocks of `gone`, as many as the samples tuned on can do without too.

        Two hundred choices by a few hundred held-out samples fit these: a Wide ResNet lost 10 points where 5 were asked
        for.
        """
        heldout = run.heldout
        run.heldout = run.clean.in_memory()  # what a user's dataset draws anew in each pass would not compare
        try:
            self._prune(gone[:0])
            before = self.score(run)

            def too_many(k: int) -> bool:
                self._prune(gone[: self.ends[k]])
                return not self._acceptable(self.score(run), before)

            first = bisect.bisect_left(range(1, len(self.ends)), True, key=too_many)
            return gone[: self.ends[first]]
        finally:
            run.heldout = heldout

    def _joined(self, run: Run, gone: Tensor, more: Tensor) -> Tensor:
        """Return `gone` and those of `more` that clean accuracy can do without: halved until the others stand alone."""
        if not len(more) or self.scored >= MOST_SCORES:
            return gone
        both = torch.cat([gone, more])
        self._prune(both)
        self.scored += 1
        if self._acceptable(self.score(run), self.before):
            self.ends.append(len(both))
            return both
        if len(more) == 1:
            return gone
        half = len(more) // 2
        return self._joined(run, self._joined(run, gone, more[:half]), more[half:])

    def _acceptable(self, now: dict[str, float], before: dict[str, float]) -> bool:
        if "heldout_acc" in now:
            return now["heldout_acc"] >= before["heldout_acc"] - self.config.tolerance - 1e-9
        return now["score"] <= before["score"] + self.config.tolerance

    @torch.no_grad()
    def _prune(self, which: Tensor) -> None:
        """Give the neurons a mask of zero or one, counted through all masks."""
        keep = torch.ones(sum(v.numel() for v in self.masks.values), device=which.device)
        keep[which] = 0
        for value, part in zip(self.masks.values, keep.split([v.numel() for v in self.masks.values])):
            value.copy_(part.reshape(value.shape))
        self.masks.write()
