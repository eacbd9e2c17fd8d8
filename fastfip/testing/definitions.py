"""What tests and benchmarks share: tolerances, and the Fisher quantities written from their definitions, in a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, pick
from fastfip.data.task import Task
from fastfip.fisher.graph.plan import selected
from fastfip.fisher.modes import readable


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ||got - want|| / ||want|| in float64; 0 if both are zero, infinite if there is a NaN."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error, size = float((got - want).norm()), float(want.norm())
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))


def worst_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor], floor: float = 0.0) -> float:
    """Return the largest relative error over the entries of two dicts with the same keys.

    An entry whose norm is below `floor` times the norm of everything (zero but for rounding) is measured against that.
    """
    assert set(got) == set(want), f"not the same entries: {set(got) ^ set(want)}"
    whole = sum(float(v.detach().double().norm()) ** 2 for v in want.values()) ** 0.5
    worst = 0.0
    for name, value in want.items():
        error = float((got[name].detach().double() - value.detach().double()).norm())
        size = max(float(value.detach().double().norm()), floor * whole)
        worst = max(worst, error / size if size else (0.0 if error == 0 else float("inf")))
    return worst


def loop_gradients(
    model: nn.Module,
    batch: Batch,
    samples: int,
    task: Task | None = None,
    *,
    params: Any = None,
    create_graph: bool = False,
) -> list[dict[str, Tensor]]:
    """Return each sample's own gradients, by one forward and one backward pass for each: the definition."""
    task, chosen = Task() if task is None else task, selected(model, params)
    each = []
    for n in range(samples):
        one = pick(batch, n, samples)
        with torch.enable_grad(), readable(model, second_order=create_graph):
            loss = task.loss(task.forward(model, one), one).sum()
            got = torch.autograd.grad(loss, list(chosen.values()), create_graph=create_graph, allow_unused=True)
        each.append({k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(chosen.items(), got)})
    return each


def loop_diagonal(
    model: nn.Module, batch: Batch, samples: int, task: Task | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the mean over samples of squared gradients, in a loop."""
    each = loop_gradients(model, batch, samples, task, **options)
    return {name: torch.stack([g[name].square() for g in each]).mean(0) for name in each[0]}


def loop_trace(model: nn.Module, batch: Batch, samples: int, task: Task | None = None, **options: Any) -> Tensor:
    """Return the mean over samples of the squared norm of the gradient, in a loop; differentiable."""
    each = loop_gradients(model, batch, samples, task, create_graph=True, **options)
    return torch.stack([torch.stack([v.square().sum() for v in g.values()]).sum() for g in each]).mean()
