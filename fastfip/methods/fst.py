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
    """Settings of FST: those of the paper (lr 0.01, alpha 0.2 for CIFAR-10), but for nets of large norm and the length.

    The paper's ten epochs of 1,000 images are 80 steps, too few for small nets to learn a classifier anew: ten passes
    over 5 % of MNIST and CIFAR-10 (220 and 180 steps) leave accuracies of 91.7 and 67 %, 800 steps 95.8 and 75.
    So it is a number of steps, for a clean set of any size. The clean images are cropped at random, as in the released
    code.
    """

    STEPS: ClassVar[int | None] = 800

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 800 if neither is given", low=1)
    batch_size: int | None = setting(128, "samples a step; None: the user's", low=1)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "what is done to each clean image tuned on: moved by up to an eighth (crop), mirrored as well (crop_flip)",
    )
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    alpha: float | None = setting(
        None, "weight of the inner product with the received classifier; None: 0.2, at most 1 / its squared norm", low=0
    )


@register
class FST(Departure):
    """Tune everything with the classifier drawn anew, kept at its norm and turned away from the received one.

    min L(theta, w) + alpha <w, w_received>  with  |w| = |w_received|, w the weight of the last layer (its bias is drawn
    anew too). The features then have to shift. The released code scales w to the norm after each step only; here the
    first step has it as well.

    The inner product runs from -|w|^2 to |w|^2, and the paper gives each data set an alpha of its own. By default alpha
    is 0.2 but at most 1 / |w|^2, so that turning w right round earns at most one nat of clean loss; without that bound
    clean accuracy collapses where the received classifier is large.
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
