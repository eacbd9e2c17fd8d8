"""Fisher Information guided Purification (FIP, arXiv 2409.00863): tune every weight towards a smooth minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._fip_config import FIPConfig
from fastfip.methods._objective import Objective, Paper, WorstCase
from fastfip.methods._released import Released
from fastfip.methods._space import Space, Weights
from fastfip.methods.base import Groups, Method, Run, register

__all__ = ["FIP", "FIPConfig"]

VARIANTS: dict[str, type[Objective]] = {"worst_case": WorstCase, "paper": Paper, "released": Released}


@register
class FIP(Method):
    """Tune every parameter; the Fisher says where the net is sharp and what clean data needs."""

    name = "fip"
    summary = "Fisher Information guided Purification: every weight, towards a smooth minimum"
    Config = FIPConfig

    objective: Objective

    def setup(self, run: Run) -> None:
        """Take the Fisher diagonal, look for worst-case inputs (by variant)."""
        self.space = self.make_space(run)
        config = run.config
        assert isinstance(config, FIPConfig)
        self.objective = VARIANTS[config.variant](run, self.space, config)
        self.objective.setup()

    def make_space(self, run: Run) -> Space:
        """Return what is tuned."""
        return Weights(run)

    def parameter_groups(self, run: Run) -> Groups:
        """What the space says."""
        return self.space.groups(run)

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser; Adam forgets in a hundred steps, for gradients fall in the recovery."""
        if run.config.optimizer == "adam":
            return torch.optim.Adam(groups, lr=run.config.lr, betas=(0.9, 0.99), weight_decay=run.config.weight_decay)
        return super().make_optimizer(run, groups)

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """One step of the objective."""
        values = self.objective.backward(batch)
        self.objective.remember()
        return values

    def is_candidate(self, run: Run) -> bool:
        """What the objective says."""
        return self.objective.is_candidate()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Shorten the steps of the coordinates that clean data needs (trust); average the last states; sieve."""
        self.objective.after_step()

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Give the model plain weights again."""
        if hasattr(self, "space"):
            self.space.leave(fold=True)
