"""What follows the optimiser's step: the Fisher bounds its length, and the last states are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.methods.base import Run

__all__ = ["StateMean", "StepBound"]


class StepBound:
    """Cuts a step, coordinate by coordinate, to at most trust / sqrt(F_ii).

    In the Fisher's diagonal approximation no coordinate's step then costs more than trust^2 / 2 of
    KL(p_received || p) on clean data, however flat or sharp the model is.
    """

    def __init__(self, tensors: list[Tensor], diagonal: list[Tensor], trust: float) -> None:
        self.tensors, self.diagonal, self.trust = tensors, diagonal, trust

    def remember(self) -> None:
        """Keep where the tensors are before the optimiser's step."""
        self.previous = [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def shorten(self) -> None:
        """Cut the step that was just taken."""
        for t, before, d in zip(self.tensors, self.previous, self.diagonal):
            limit = self.trust / d.sqrt().clamp_min(1e-20)
            t.data.copy_(before + torch.minimum(torch.maximum(t.detach() - before, -limit), limit))


class StateMean:
    """Takes the states of the last steps into a mean, and puts the mean in place after the last one.

    The noise of small steps averages out (Polyak and Juditsky 1992), so that fewer samples a step are enough. A run
    that is stopped before its last step keeps a state that is no mean.
    """

    def __init__(self, tensors: list[Tensor], share: float) -> None:
        self.tensors, self.share = tensors, share
        self.mean: list[Tensor] = []
        self.count = 0

    @torch.no_grad()
    def add(self, run: Run) -> None:
        """Take the state after this step in, if it is one of the last `share` of the steps."""
        if run.step < (1 - self.share) * run.total_steps:
            return
        if not self.count:
            self.mean = [t.detach().clone() for t in self.tensors]
        self.count += 1
        for mean, t in zip(self.mean, self.tensors):
            mean.lerp_(t.detach(), 1 / self.count)
            if run.step + 1 == run.total_steps:
                t.data.copy_(mean)
