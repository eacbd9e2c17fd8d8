"""Super-fine-tuning (Sha et al., arXiv 2212.09067): fine-tuning with a step size in short cycles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["SuperFineTune", "SuperFineTuneConfig", "cycled"]


@dataclass(frozen=True)
class SuperFineTuneConfig(MethodConfig):
    """Settings of super-fine-tuning, from a public implementation for CIFAR-10: there 100 epochs and `lr_first` 2.5.

    With 500 steps instead of its 10,000, 2.5 left a ResNet-20 with an accuracy of 40 % (a single trial); 1.0 was chosen
    by clean accuracy. For a network without normalisation layers, try a tenth of all three, its setting for GTSRB.
    """

    epochs: int | None = setting(20, "passes over the clean set", low=1)
    batch_size: int | None = setting(100, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(0.03, "smallest step size, at which each cycle begins and ends", above=0)
    momentum: float = setting(0.0, "momentum of SGD", low=0, below=1)
    schedule: Literal["constant"] = setting("constant", "the cycles are the course of the step size")
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the last, or the best by held-out clean score"
    )
    holdout: float = setting(
        0.0, "share of the clean set that is held out, only to choose a state; 0: none", low=0, high=0.5
    )
    lr_first: float = setting(1.0, "largest step size of the cycles of the first phase", above=0)
    lr_second: float = setting(0.05, "largest step size of the cycles of the second phase", above=0)
    first: float = setting(0.4, "share of the steps in the first phase", low=0, high=1)
    cycle: int = setting(20, "steps of a cycle: half of them up, half of them down", low=2)


def cycled(step: int, lr: float, highest: float, cycle: int) -> float:
    """Return the step size at a step 0, 1, ...: from `lr` straight up to `highest` in half a cycle, and down again."""
    up, place = cycle // 2, step % cycle
    share = place / up if place < up else (cycle - place) / (cycle - up)
    return lr + (highest - lr) * share


@register
class SuperFineTune(Method):
    """Tune every parameter by the mean clean loss, with a step size in cycles: very large ones first, then small ones.

    lr_t = lr + (lr_max - lr) * triangle(t / cycle), where each phase has its own lr_max. The first phase leaves the
    minimum that holds the backdoor, and the second settles in another one. The optimiser is plain SGD; no image is
    changed.
    """

    name = "super_fine_tune"
    summary = "super-fine-tuning: fine-tuning with a step size in cycles, very large ones first"
    Config = SuperFineTuneConfig
    takes_parts = True

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser."""
        self.optimizer = super().make_optimizer(run, groups)
        return self.optimizer

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Set the step size; the clean loss."""
        config = run.config
        assert isinstance(config, SuperFineTuneConfig)
        highest = config.lr_first if run.progress < config.first else config.lr_second
        for group in self.optimizer.param_groups:
            group["lr"] *= cycled(run.step, config.lr, highest, config.cycle) / config.lr
        return super().backward(run, batch)
