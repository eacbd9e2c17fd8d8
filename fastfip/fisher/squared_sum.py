"""Sums of squared per-sample gradients over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastfip.fisher.graph.forms import GradientForm, Workspace
from fastfip.fisher.graph.plan import Plan, UseGroup
from fastfip.fisher.graph.reading import as_real
from fastfip.ops.memory import accumulation_dtype, zeros_like


class SquaredSum:
    """Sums of squared per-sample gradients (`with_grad`: of the gradients too), over as many batches as are added."""

    def __init__(self, params: Mapping[str, Tensor], with_grad: bool = False, backend: str = "auto") -> None:
        self.params = dict(params)
        self.out = {k: zeros_like(p.detach(), accumulation_dtype(p.dtype)) for k, p in params.items()}
        self.grad = {k: _sums_of(p.detach()) for k, p in params.items()} if with_grad else None
        self.coverage: dict[str, str] = {}
        self.workspace = Workspace(backend=backend)

    def add(
        self, plan: Plan, weights: Tensor | None = None, retain_graph: bool = False, leaves: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Add what the plan covers (all but `plan.loop`), every sample's loss multiplied by its weight first.

        Returns the ordinary gradients of `leaves`, from the same pass.
        """

        def take(group: UseGroup, form: GradientForm) -> None:
            name, view = group.chain.param, group.chain.view
            grad = None if self.grad is None else view(self.grad[name])
            form.add_squares(view(self.out[name]), grad, self.workspace)

        with torch.no_grad():
            kept, leaf_gradients = plan.forms(take, weights, retain_graph, leaves)
            for n in range(plan.samples) if plan.pulled else ():
                self.add_one(plan.pull(n, kept))
        self.coverage.update({name: plan.coverage(name) for name in self.params})
        return leaf_gradients

    def add_one(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the square of one sample's gradients."""
        for name, g in gradients.items():
            g = g.detach()
            if g.is_complex():  # |g|^2
                self.out[name].add_(as_real(g).to(self.out[name].dtype).square().sum(-1))
            else:
                g = g.to(self.out[name].dtype)
                self.out[name].addcmul_(g, g)
            if self.grad is not None:
                self.grad[name].add_(g)


def _sums_of(p: Tensor) -> Tensor:
    """Where gradients of a parameter are summed."""
    dtype = accumulation_dtype(p.dtype)
    return torch.zeros_like(p, dtype=dtype.to_complex()) if p.is_complex() else zeros_like(p, dtype)
