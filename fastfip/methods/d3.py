"""Distance-Driven Detoxification (D3, arXiv 2411.09585, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastfip.methods._departure import Departure
from fastfip.methods.base import MethodConfig, Run, register, setting

__all__ = ["D3", "D3Config"]


@dataclass(frozen=True)
class D3Config(MethodConfig):
    """Settings of D3. `weight` and `epsilon` are the paper's; optimiser, budget and crops the released code's."""

    epochs: int | None = setting(100, "passes over the clean set", low=1)
    batch_size: int | None = setting(256, "samples in a step; None: the batch size of the loader", low=1)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "random changes of the clean images: moved by up to an eighth (crop), also mirrored (crop_flip)",
    )
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    weight: float = setting(10.0, "weight (lambda) of the clean loss beyond epsilon", above=0)
    epsilon: float = setting(0.1, "clean loss that is allowed", low=0)


@register
class D3(Departure):
    """Move the classifier as far from its received weight as the clean loss allows.

    max |w - w_received|_F  such that  L(theta) <= epsilon and |w|_F = |w_received|_F, as a penalty:
    min weight * max(0, L(theta) - epsilon) - |w - w_received|_F, projected after each step. All of theta is tuned; the
    distance is that of the classifier's weight alone (the paper's choice against overfitting), which starts from random
    numbers. Loss and distance are divided by 1 + weight, as in the released code, so that lr means the same for every
    weight. The code takes the hinge sample by sample and has weight 0.5; the paper takes it of the mean, with 10.
    """

    name = "d3"
    summary = "Distance-Driven Detoxification: as far from the received classifier as the clean loss allows"
    Config = D3Config
    new_bias = False

    def objective(self, run: Run, clean: Tensor) -> Tensor:
        """Hinge of the clean loss, less the distance."""
        config = run.config
        assert isinstance(config, D3Config)
        distance = torch.linalg.vector_norm(self.classifier.weight - self.classifier.received)
        run.log(distance=distance)
        return (config.weight * (clean - config.epsilon).clamp_min(0) - distance) / (1 + config.weight)
