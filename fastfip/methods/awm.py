"""Adversarial weight masking (AWM, Chai and Chen, NeurIPS 2022, arXiv 2207.04497)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastfip.data.batch import Batch
from fastfip.errors import ModelError
from fastfip.methods._masks import Masks, per_element, weights_of
from fastfip.methods._pixels import PixelConfig, range_of
from fastfip.methods.base import Groups, Method, Run, register, setting

__all__ = ["AWM", "AWMConfig"]

#: Passes over the clean set that a part of a round takes.
ROUND = 5


@dataclass(frozen=True)
class AWMConfig(PixelConfig):
    """Settings of AWM, the released code's: 20 rounds, in each five passes of the perturbation and five of the masks.

    With one sample a class or fewer, `alpha` and `tau` are those that its authors give for that case.
    """

    epochs: int | None = setting(100, "passes over the clean set by the masks", low=1)
    batch_size: int | None = setting(128, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(0.01, "step size of the masks", above=0)
    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size after the warm-up")
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm; eval keeps the running statistics")
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the best by held-out clean score, or the last"
    )
    layers: Literal["auto", "conv", "all"] = setting(
        "auto", "whose weights are masked: convolutions', or Linear too; auto: Linear too where they hold the most"
    )
    inner: int | None = setting(
        None, "steps of a round, so many of the perturbation, then of the masks; None: five passes", low=1
    )
    delta_lr: float = setting(10.0, "step size of the perturbation, in pixels", above=0)
    labels: Literal["predicted", "given"] = setting(
        "predicted", "labels that the perturbation leads away from: the model's own answers, or the data's"
    )
    alpha: float | None = setting(None, "weight of the clean loss; None: 0.9, one sample a class 0.99", low=0, high=1)
    gamma: float = setting(1e-8, "weight of the masks' L1 norm", low=0)
    tau: float | None = setting(
        None, "largest L1 norm of the perturbation, in pixels of [0, 1]; None: 1000, one sample a class 100", above=0
    )


@register
class AWM(Method):
    """Mask the weights that a universal perturbation uses.

        min_{m in [0,1]}  alpha CE(f(x; m w), y) + (1 - alpha) CE(f(x + delta; m w), y) + gamma ||m||_1
        delta ~ argmax_{||delta||_1 <= tau}  CE(f(x + delta; m w), argmax f(x; m w))

    Each round first tunes the perturbation, from zero, by plain gradient ascent, and then the masks by Adam. There is
    one mask for each element of each convolution weight. BatchNorm and biases are not masked, nor are Linear layers if
    convolutions hold most weights. Perturbation, norm and clipping are in pixels of [0, 1], however inputs are
    normalised.

    Differences from the released code: the perturbed image is clipped and the norm is bounded in every ascent step, so
    that what is optimised is what is applied. Sets smaller than a batch work, and the last batch of a pass may be small
    (there it is left out). Neither part computes gradients that it does not use. The algorithm in the paper leads away
    from the true labels (`labels="given"`). Its code and objective lead away from the model's answers; this is the
    default.
    """

    name = "awm"
    summary = "AWM: masks on weights against a universal perturbation, in rounds"
    Config = AWMConfig

    def setup(self, run: Run) -> None:
        """Choose the weights; read the range of the inputs."""
        config = run.config
        assert isinstance(config, AWMConfig)
        self.config = config
        convolutions, everything = (weights_of(run.model, kind, run.frozen) for kind in (_ConvNd, (nn.Linear, _ConvNd)))
        mine = convolutions if config.layers == "conv" else everything
        if config.layers == "auto" and 2 * _size(convolutions) >= _size(everything):
            mine = convolutions
        if not mine:
            raise ModelError(f"awm finds no weight to mask with layers={config.layers!r}: try layers='all'")
        self.masks = Masks.of(mine, per_element)
        passes = ROUND * len(run.clean.order(config.batch_size))
        self.inner = passes if config.inner is None else config.inner
        few = run.classes is not None and run.clean.n <= run.classes
        self.alpha = (0.99 if few else 0.9) if config.alpha is None else config.alpha
        self.tau = (100.0 if few else 1000.0) if config.tau is None else config.tau
        self.range = range_of(run, "the masks were tuned by the clean loss alone")
        self.deltas: dict[tuple[int, ...], Tensor] = {}
        self.order: Iterator[Batch] | None = None

    def parameter_groups(self, run: Run) -> Groups:
        """The masks."""
        return [{"params": self.masks.values}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Take one step of the masks; before the first of a round, all steps of the perturbation."""
        if self.range is not None and run.step % self.inner == 0:
            self.ascend(run)
        values: dict[str, float | Tensor] = {}
        with self.masks.tuning():
            with run.autocast():
                loss = run.loss(run.forward(batch), batch).mean()
            run.backward(self.alpha * loss)
            values["loss"] = loss.detach()
            delta = None if self.range is None else self.deltas.get(tuple(run.task.inputs(batch).shape[1:]))
            if delta is not None and self.alpha < 1:
                assert self.range is not None
                moved = self.range.moved(run.task, batch, delta)
                with run.bn("eval"), run.autocast():
                    there = run.loss(run.forward(moved), batch).mean()
                run.backward((1 - self.alpha) * there)
                values["perturbed_loss"] = there.detach()
        scale = 1.0 if run.scaler is None else run.scaler.get_scale()
        gradients = [value.grad for value in self.masks.values if value.grad is not None]
        if gradients:
            torch._foreach_add_(gradients, self.config.gamma * scale)  # masks are not negative: gamma * ||m||_1
        return values

    def ascend(self, run: Run) -> None:
        """Find the perturbation of a round, one for each shape of inputs, with the masks as they are."""
        self.deltas = {}
        self.masks.write()
        with run.eval_mode():
            for _ in range(self.inner):
                batch = self._next(run)
                x = run.task.inputs(batch)
                shape = tuple(x.shape[1:])
                delta = self.deltas.get(shape, torch.zeros(1, *shape, device=x.device, dtype=x.dtype))
                self.deltas[shape] = self._step(run, batch, delta)

    def _step(self, run: Run, batch: Batch, delta: Tensor) -> Tensor:
        assert self.range is not None
        # In float16 the gradient of an input underflows without the scaler, so that this pass stays in float32.
        cast = run.autocast() if run.amp != torch.float16 else contextlib.nullcontext()
        delta = delta.detach().requires_grad_(True)
        if self.config.labels == "predicted" and run.classes is not None and run.task.loss_hook is None:
            with torch.no_grad(), cast:
                batch = run.task.relabel(batch, run.forward(batch).argmax(1))
        moved = self.range.moved(run.task, batch, delta)
        with cast:
            loss = run.task.loss(run.forward(moved), batch).mean()
        (gradient,) = torch.autograd.grad(loss, delta, allow_unused=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            return delta.detach()
        found = delta.detach() + self.config.delta_lr * gradient
        return found * min(1.0, self.tau / max(float(found.abs().sum()), 1e-30))

    def _next(self, run: Run) -> Batch:
        """The next batch of the perturbation's own order, over and over."""
        if self.order is None:
            self.order = run.endless()
        return next(self.order)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Clamp the masks to [0, 1]."""
        self.masks.clamp_(0.0)
        self.masks.write()

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Leave the kept masks in the weights."""
        self.order = None
        if hasattr(self, "masks"):
            self.masks.write()


def _size(places: list[tuple[str, nn.Module, str]]) -> int:
    weights = {id(w): w.numel() for _, module, key in places if (w := module._parameters[key]) is not None}
    return sum(weights.values())
