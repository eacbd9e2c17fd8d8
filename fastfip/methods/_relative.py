"""Steps relative to each tensor's size, as a whole no longer than a bound in the Fisher metric."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._batchnorm import kept_statistics
from fastfip.methods.run import Run, norms_of
from fastfip.nets.shards import whole_value
from fastfip.nets.state import still_received

__all__ = ["RelativeSGD", "fisher_length", "received_values"]

#: What a bias or a norm layer's parameter counts as, at least, and what a weight does: root mean square of its entries.
SMALLEST_VECTOR, SMALLEST_WEIGHT = 0.1, 1e-3
#: A norm below this has lost its digits in float32, squares and all, and so has the direction.
VANISHED = 1e-15


@torch.no_grad()
def fisher_length(run: Run, batch: Batch, tensors: list[Tensor], step: list[Tensor], share: float) -> float:
    """Return the length of a step d in the Fisher metric of the model as it is: sqrt(d^T F d), all of F.

    d^T F d = mean_n [sum_c p_nc u_nc^2 - (sum_c p_nc u_nc)^2],  u_n the derivative of the logits of sample n along d:
    no labels enter, and half the square is what the step changes of the answers, in nats, to second order. The
    derivative is a difference quotient of two passes, in the mode in which the model is tuned. Where `loss=` takes
    outputs that are no logits [N, C], F is the empirical Fisher: mean_n (derivative of the loss of sample n along d)^2.

    Args:
        run: its model holds `tensors`; afterwards it is as it was, to the bit.
        batch: a few samples.
        tensors: what moves.
        step: by how much, a tensor for each.
        share: of the step that the difference is taken over.

    Returns:
        not finite where outputs are not.
    """

    def outputs() -> Tensor:
        logits = run.forward(batch)
        out = run.task.loss(logits, batch) if run.classes is None else logits
        return out if out.dtype == torch.float64 else out.float()

    mode = run.bn("train") if run.config.bn_mode == "train" else contextlib.nullcontext()
    with kept_statistics(run), run.eval_mode(), mode:  # dropout would draw anew for the second pass
        here = outputs()
        with _moved(tensors, step, share):
            u = (outputs() - here) / share
    if run.classes is None:
        return float(u.square().mean().sqrt())
    p = here.softmax(1)
    return float(((p * u * u).sum(1) - (p * u).sum(1).square()).mean().clamp_min(0).sqrt())


@contextlib.contextmanager
def _moved(tensors: list[Tensor], step: list[Tensor], share: float) -> Iterator[None]:
    saved = [t.clone() for t in tensors]
    try:
        for t, d in zip(tensors, step):
            t.add_(d.to(t.dtype), alpha=share)
        yield
    finally:
        for t, old in zip(tensors, saved):
            t.copy_(old)


class RelativeSGD(torch.optim.Optimizer):
    """SGD with momentum whose step is `lr` times the norm of each tensor, along the momentum of its gradients.

    d_l = -|w_l| m_l / |m_l|,  w_l <- w_l + lr d_l   for each tensor l  (LARS, You et al., arXiv 1708.03888, without its
    dependence on the gradient's size). One `lr` serves networks with and without normalisation layers, because a
    layer's output moves by a share of itself. A tensor of few or small entries counts as larger than it is: a vector
    as if the root mean square of its entries were 0.1 at least, a weight 0.001. One whose momentum has vanished in the
    tensor's precision stays. Of a table of vectors (`tables`) as many rows count as its momentum has weight in, (sum_r
    |m_r|)^2 / sum_r |m_r|^2: a batch looks up few of them, and a share of the whole table's norm would be many times
    theirs.

    Args:
        params: tensors or groups.
        lr: length of a step over the tensor's norm.
        momentum: of the gradients.
        bound: gets the step d of every tensor, in the order of the groups, before it is scaled by `lr`; returns the
            largest factor that is allowed. None: no bound.
        tables: ids of the parameters that are tables of vectors, [rows, d].
        norms: gives the L2 norm of each of some tensors.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        bound: Callable[[list[Tensor], list[Tensor]], float] | None = None,
        tables: Collection[int] = (),
        norms: Callable[[Sequence[Tensor]], list[float]] = norms_of,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.bound, self.tables, self.norms = bound, tables, norms

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        tensors: list[Tensor] = []
        momenta: list[Tensor] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                momenta.append(state["momentum"].mul_(group["momentum"]).add_(gradient))
                tensors.append(p)
        if not tensors:
            return
        norms = self.norms([*tensors, *momenta])  # of parts, all in one sum over the ranks
        steps: list[Tensor] = []
        for p, momentum, norm, length in zip(tensors, momenta, norms, norms[len(tensors) :]):
            smallest = SMALLEST_VECTOR if p.dim() < 2 else SMALLEST_WEIGHT
            size = max(norm, smallest * math.sqrt(p.numel()))
            if id(p) in self.tables:
                size *= math.sqrt(_rows_moving(momentum) / len(p))
            steps.append(momentum * (size / length if length > VANISHED else 0.0))
        most = math.inf if self.bound is None else self.bound(tensors, steps)
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, step, lr in zip(tensors, steps, rates):
            p.sub_(step, alpha=min(lr, most))


def _rows_moving(momentum: Tensor) -> float:
    """Return how many rows of a momentum [R, d] have a part in it: R where all are of one length, 1 where one is."""
    lengths = whole_value(torch.linalg.vector_norm(momentum, dim=1))
    return float(lengths.sum().square() / lengths.square().sum().clamp_min(VANISHED**2))


def received_values(run: Run) -> dict[str, Tensor]:
    """Return the received parameters by name, copied where nobody has them already."""
    named = {name: p.detach() for name, p in run.model.named_parameters() if p.is_floating_point()}
    if run.shards is not None:
        return {name: run.received[name] for name in named}
    return {
        name: run.received[name] if still_received(p, run.received.get(name)) else p.clone()
        for name, p in named.items()
    }
