"""Steps relative to each tensor's size, as a whole no longer than a bound in the Fisher metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RelativeSGD", "fisher_length"]

#: What a bias or a norm layer's parameter counts as, at least, and what a weight does: root mean square of its entries.
SMALLEST_VECTOR, SMALLEST_WEIGHT = 0.1, 1e-3
#: A norm below this has lost its digits in float32, squares and all, and so has the direction.
VANISHED = 1e-15


def fisher_length(step: list[Tensor], diagonal: list[Tensor]) -> float:
    """Return sqrt(sum_i F_ii d_i^2): a step d changes the answers by half its square, in nats, to second order.

    It is not finite where the step or the diagonal is not.
    """
    return math.sqrt(sum(float((f * d.float().pow(2)).sum()) for d, f in zip(step, diagonal)))


class RelativeSGD(torch.optim.Optimizer):
    """SGD with momentum whose step is `lr` times the norm of each tensor, along the momentum of its gradients.

    d_l = -|w_l| m_l / |m_l|,  w_l <- w_l + lr d_l   for each tensor l  (LARS, You et al., arXiv 1708.03888, without its
    dependence on the gradient's size). One `lr` serves networks with and without normalisation layers, because a
    layer's output moves by a share of itself. A tensor of few or small entries counts as larger than it is: a vector
    as if the root mean square of its entries were 0.1 at least, a weight 0.001. One whose momentum has vanished in the
    tensor's precision stays.

    Args:
        params: tensors or groups.
        lr: length of a step over the tensor's norm.
        momentum: of the gradients.
        bound: gets the step d of every tensor, in the order of the groups, before it is scaled by `lr`; returns the
            largest factor that is allowed. None: no bound.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        bound: Callable[[list[Tensor], list[Tensor]], float] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.bound = bound

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        tensors: list[Tensor] = []
        steps: list[Tensor] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
                smallest = SMALLEST_VECTOR if p.dim() < 2 else SMALLEST_WEIGHT
                size = max(float(p.norm()), smallest * math.sqrt(p.numel()))
                tensors.append(p)
                length = float(momentum.norm())
                steps.append(momentum * (size / length if length > VANISHED else 0.0))
        if not tensors:
            return
        most = math.inf if self.bound is None else self.bound(tensors, steps)
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, step, lr in zip(tensors, steps, rates):
            p.sub_(step, alpha=min(lr, most))
