"""A first, short tuning that only finds something out, after which the same weights are tuned again from the start."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.methods.config import learning_rate
from fastfip.methods.run import Run

__all__ = ["Scout"]


class Scout:
    """The first steps of a run, and those that begin anew after them, each with a schedule of their own.

    Attributes:
        over: whether tuning has begun anew.
    """

    def __init__(self, run: Run, share: float) -> None:
        """Remember the weights that the run's model has, until tuning begins anew.

        Args:
            run: nothing of it is tuned yet; its frozen tensors are left out.
            share: of the steps that are the first ones; where that is less than one step there are none.
        """
        self.share, self.over = share, False
        self.weights: list[Tensor] = [t.clone() for t in self._state(run)]

    def first(self, run: Run) -> int:
        """Return how many steps come before tuning begins anew."""
        return int(self.share * run.total_steps)

    def place(self, run: Run) -> tuple[int, int]:
        """Return the number of the present step in its part of the run, and how many steps that part has."""
        first = self.first(run)
        return (run.step, first) if run.step < first else (run.step - first, run.total_steps - first)

    def set_size(self, run: Run, optimizer: torch.optim.Optimizer) -> None:
        """Set the step size of an optimiser whose groups all have the config's to that of the present step."""
        at, count = self.place(run)
        for group in optimizer.param_groups:
            group["lr"] = run.config.lr * learning_rate(at, count, run.config.schedule, run.config.warmup)

    @torch.no_grad()
    def begin_anew(self, run: Run, optimizer: torch.optim.Optimizer) -> None:
        """Take the weights back, and what the optimiser knows of the steps before."""
        for t, value in zip(self._state(run), self.weights, strict=True):
            t.copy_(value)
        optimizer.state.clear()

    def end(self) -> None:
        """Forget the weights: tuning does not begin anew once more."""
        self.weights, self.over = [], True

    @staticmethod
    def _state(run: Run) -> list[Tensor]:
        every = {id(t): t for t in (*run.model.parameters(), *run.model.buffers()) if id(t) not in run.frozen}
        return list(every.values())
