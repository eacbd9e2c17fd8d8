"""Neural mask fine-tuning (NFT, Karim et al., ECCV 2024, arXiv 2407.10052): masks of neurons, tuned on mixed images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch, take
from fastfip.errors import ModelError
from fastfip.methods._classifier import Classifier
from fastfip.methods._masks import Masks, batchnorm_weights, output_rows, weights_of
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting
from fastfip.worst_case.pixels import perturbable

__all__ = ["NFT", "NFTConfig", "floor"]


@dataclass(frozen=True)
class NFTConfig(MethodConfig):
    """Settings of NFT: those of the released code, which states more of them than the paper.

    One sample a class needs no other setting: the regulariser's weight grows by itself as samples a class fall.
    """

    STEPS: ClassVar[int | None] = 1000

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 1000 if neither is given", low=1)
    batch_size: int | None = setting(128, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(0.05, "step size", above=0)
    momentum: float = setting(0.95, "momentum of SGD", low=0, below=1)
    lr_end: float = setting(0.4, "share of the step size at which the cosine ends", low=0, high=1)
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the best by held-out clean score, or the last"
    )
    masks: Literal["auto", "norm", "channels"] = setting(
        "auto", "what is masked: BatchNorm's gamma (norm), output channels of layers, or the first that there is"
    )
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "random changes of the clean images: moved by up to an eighth (crop), also mirrored (crop_flip)",
    )
    mixup: float = setting(1.0, "a of the Beta(a, a) that images are mixed by; 0: not mixed", low=0)
    floor: float = setting(0.8, "alpha of the floor mu_l = alpha * exp(-beta * l) of the masks", low=0, high=1)
    decay: float = setting(0.5, "beta of the floor: how fast it falls with depth", low=0)
    c: float = setting(1e-3, "weight of the mask regulariser, over the clean samples a class", low=0)


@register
class NFT(Method):
    """Tune one mask for each neuron on images mixed in pairs, the mask near one; then fold the masks.

        min_M  lam CE(f(x~; M), y) + (1 - lam) CE(f(x~; M), y') + (c / N_c) sum_l ||1 - M_l||_1,   mu_l <= M_l <= 1
        x~ = lam x + (1 - lam) x',   lam ~ Beta(a, a),   mu_l = alpha exp(-beta l),   N_c = samples a class

    M_l multiplies the gamma of the l-th BatchNorm (l = 1, 2, ... in the model's order), and its beta stays. A model
    without BatchNorm has masks on the output channels of its layers, except the classifier. Only masks get gradients.

    Differences from the released code: the first BatchNorm is masked too (there it is left out without a stated reason,
    so that l counts one less). The cosine runs over the steps, and not over five parts. The masks are folded. Images
    are cropped at random, but not mirrored (`augment="crop_flip"` does both).
    """

    name = "nft"
    summary = "NFT: a mask for each neuron, tuned on mixed images, folded into BatchNorm"
    Config = NFTConfig

    def setup(self, run: Run) -> None:
        """Choose what is masked."""
        config = run.config
        assert isinstance(config, NFTConfig)
        self.config = config
        places = (
            batchnorm_weights(run.model, run.frozen)
            if config.masks != "channels" and config.bn_mode != "freeze"
            else []
        )
        if not places:
            if config.masks == "norm":
                raise ModelError(
                    "masks='norm' finds no BatchNorm with a gamma that may be tuned: leave masks at 'auto'"
                )
            places = weights_of(run.model, frozen=run.frozen)
            places = (Classifier.of(run).spared(places) if places else []) or places
        if not places:
            raise ModelError("nft finds nothing to mask: the model has no BatchNorm, Linear or convolution of its own")
        self.masks = Masks.of(places, output_rows)
        self.floors = [floor(layer, config.floor, config.decay) for layer in range(1, len(self.masks) + 1)]
        classes = run.classes or 1
        self.weight = config.c / max(1.0, run.clean.n / classes)

    def parameter_groups(self, run: Run) -> Groups:
        """The masks."""
        return [{"params": self.masks.values}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser; its step size ends above zero."""
        self.optimizer = super().make_optimizer(run, groups)
        return self.optimizer

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the masks for one mixed batch."""
        if self.config.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * self.config.lr_end + group["lr"] * (1 - self.config.lr_end)
        share, other = self._partners(run, batch)
        with self.masks.tuning():
            with run.autocast():
                if other is None:
                    loss = run.loss(run.forward(batch), batch).mean()
                else:
                    x, partner = run.task.inputs(batch), run.task.inputs(other)
                    logits = run.forward(run.task.replace_inputs(batch, share * x + (1 - share) * partner))
                    loss = (share * run.loss(logits, batch) + (1 - share) * run.loss(logits, other)).mean()
            run.backward(loss)
        distance = torch.stack([(1 - value).abs().sum() for value in self.masks.values]).sum()
        run.backward(self.weight * distance)
        return {"loss": loss.detach(), "masked": distance.detach()}

    def _partners(self, run: Run, batch: Batch) -> tuple[float, Any]:
        """The share of the batch's own images, and the batch in another order; None where nothing can be mixed."""
        n = run.task.size(batch)
        if self.config.mixup == 0 or n < 2:
            return 1.0, None
        if not perturbable(run.task, batch):
            run.note("the inputs are no images or vectors of real numbers: they were not mixed")
            return 1.0, None
        a = torch.full((2,), self.config.mixup, dtype=torch.float64, device="cpu")
        share = float(torch._sample_dirichlet(a, run.generator)[0])
        return share, take(batch, torch.randperm(n, generator=run.generator, device="cpu"), n)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Clamp every mask to [mu_l, 1]."""
        self.masks.clamp_(self.floors)
        self.masks.write()

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Leave the kept masks in the weights."""
        if hasattr(self, "masks"):
            self.masks.write()


def floor(layer: int, alpha: float, beta: float) -> float:
    """Return mu_l = alpha * exp(-beta * l), the least value of the masks of layer l = 1, 2, ..."""
    return alpha * math.exp(-beta * layer)
