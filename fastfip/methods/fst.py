"""Feature Shift Tuning (FST, arXiv 2310.01875, NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastfip.methods._departure import Departure
from fastfip.methods.base import MethodConfig, Run, register, setting

__all__ = ["FST", "FSTConfig"]


@dataclass(frozen=True)
class FSTConfig(MethodConfig):
    """Settings of FST: those of the paper (lr 0.01, alpha 0.2), except alpha at large norms and the length.

    The paper's ten epochs of 1,000 images are 80 steps, too few for small models to learn a classifier anew. In single
    trials, ten passes over 5 % of MNIST and CIFAR-10 (220 and 180 steps) left accuracies of 91.7 and 67 %, and 800
    steps left 95.8 and 75. So the length is a number of steps, for a clean set of any size. The clean images are
    cropped at random, as in the released code.
    """

    STEPS: ClassVar[int | None] = 800

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 800 if neither is given", low=1)
    batch_size: int | None = setting(128, "samples in a step; None: the batch size of the loader", low=1)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "random changes of the clean images: moved by up to an eighth (crop), also mirrored (crop_flip)",
    )
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    alpha: float | None = setting(
        None, "weight of the inner product with the received classifier; None: 0.2, at most 1 / its squared norm", low=0
    )


@register
class FST(Departure):
    """Tune all parameters with a new random classifier, which keeps its norm and is turned away from the received one.

    min L(theta, w) + alpha <w, w_received>  with  |w| = |w_received|, where w is the weight of the last layer (its bias
    starts at random too). The features then have to change. The released code scales w to this norm only after each
    step; here the first step has it too.

    The inner product is between -|w|^2 and |w|^2, and the paper has a different alpha for each data set. By default,
    alpha is 0.2 but at most 1 / |w|^2, so that turning w round is worth at most one nat of clean loss. Without this
    bound, clean accuracy collapses if the received classifier is large.
    """

    name = "fst"
    summary = "Feature Shift Tuning: fine-tuning with a new classifier turned away from the received one"
    Config = FSTConfig

    def objective(self, run: Run, clean: Tensor) -> Tensor:
        """Clean loss and inner product."""
        config = run.config
        assert isinstance(config, FSTConfig)
        alpha = config.alpha
        if alpha is None:
            alpha = min(0.2, 1 / max(float(self.classifier.norm) ** 2, 1e-12))
        return clean + alpha * (self.classifier.weight * self.classifier.received).sum()
