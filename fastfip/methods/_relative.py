"""Steps relative to each tensor's size, as a whole no longer than a bound in the Fisher metric."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.stateless import _reparametrize_module

from fastfip.data.batch import Batch
from fastfip.methods._batchnorm import kept_statistics
from fastfip.methods.config import MethodConfig
from fastfip.methods.run import Run

__all__ = ["RelativeSGD", "fisher_length", "gentle"]

C = TypeVar("C", bound=MethodConfig)

#: What a bias or a norm layer's parameter counts as, at least, and what a weight does: root mean square of its entries.
SMALLEST_VECTOR, SMALLEST_WEIGHT = 0.1, 1e-3
#: A norm below this has lost its digits in float32, squares and all, and so has the direction.
VANISHED = 1e-15
#: One below so many roundings of the largest has none either: a bias before BatchNorm, whose gradient is zero but for
#: rounding. It would be moved at random, and differently by each number of processes.
NOISE = 100.0
#: The forward mode is taken if the first derivative is within this share of the difference quotient.
ALIKE = 0.2
#: Model -> whether it is.
_TRUSTED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def fisher_length(run: Run, batch: Batch, tensors: list[Tensor], step: list[Tensor], share: float) -> float:
    """Return the length of a step d in the Fisher metric of the model as it is: sqrt(d^T F d), all of F.

    d^T F d = mean_n [sum_c p_nc u_nc^2 - (sum_c p_nc u_nc)^2],  u_n the derivative of the logits of sample n along d:
    no labels enter, and half the square is what the step changes of the answers, in nats, to second order. The
    derivative is torch's forward mode, in the mode in which the model is tuned; where an operation has none, or where
    the first one is not what a difference quotient says (weights that a module keeps elsewhere as well), it is that
    quotient, of two passes, which has lost half of its digits. Where `loss=` takes outputs that are no logits [N, C], F
    is the empirical Fisher: mean_n (derivative of the loss of sample n along d)^2.

    Args:
        run: its model holds `tensors`; afterwards it is as it was, to the bit.
        batch: a few samples.
        tensors: what moves.
        step: by how much, a tensor for each.
        share: of the step that a difference is taken over.

    Returns:
        not finite where outputs are not.
    """

    def outputs() -> Tensor:
        logits = run.forward(batch)
        out = run.task.loss(logits, batch) if run.classes is None else logits
        return out if out.dtype == torch.float64 else out.float()

    mode = run.bn("train") if run.config.bn_mode == "train" else contextlib.nullcontext()
    with kept_statistics(run), run.eval_mode(), mode:  # dropout would draw anew for the second pass
        here, u = _derivative(run.model, tensors, step, share, outputs)
    if run.classes is None:
        return float(u.square().mean().sqrt())
    p = here.softmax(1)
    return float(((p * u * u).sum(1) - (p * u).sum(1).square()).mean().clamp_min(0).sqrt())


def _derivative(
    model: nn.Module, tensors: list[Tensor], step: list[Tensor], share: float, outputs: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and their derivative along a step."""
    exact = _forward_mode(model, tensors, step, outputs) if _TRUSTED.get(model, True) else None
    if exact is not None and model in _TRUSTED:
        return exact
    here = outputs()
    with _moved(tensors, step, share):
        u = (outputs() - here) / share
    _TRUSTED[model] = exact is not None and bool((exact[1] - u).norm() <= ALIKE * u.norm())
    return exact if exact is not None and _TRUSTED[model] else (here, u)


def _forward_mode(
    model: nn.Module, tensors: list[Tensor], step: list[Tensor], outputs: Callable[[], Tensor]
) -> tuple[Tensor, Tensor] | None:
    moved = {id(t): (t, d) for t, d in zip(tensors, step)}
    named = {name: moved[id(p)] for name, p in model.named_parameters() if id(p) in moved}
    try:
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of how it has written some derivatives
            duals = {name: forward_ad.make_dual(t.detach(), d.to(t.dtype)) for name, (t, d) in named.items()}
            with _reparametrize_module(model, duals, tie_weights=True):
                out = forward_ad.unpack_dual(outputs())
            return None if out.tangent is None else (out.primal.clone(), out.tangent.clone())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # what has no derivative says it in many ways
        return None


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
    tensor's precision, or beside those of the others, stays.

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
        sizes: list[float] = []
        lengths: list[float] = []
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
                sizes.append(max(float(p.norm()), smallest * math.sqrt(p.numel())))
                tensors.append(p)
                lengths.append(float(momentum.norm()))
                steps.append(momentum)
        if not tensors:
            return
        least = max(lengths) * NOISE
        for i, (momentum, size, length) in enumerate(zip(steps, sizes, lengths)):
            known = length > max(VANISHED, least * torch.finfo(momentum.dtype).eps)
            steps[i] = momentum * (size / length if known else 0.0)
        most = math.inf if self.bound is None else self.bound(tensors, steps)
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, step, lr in zip(tensors, steps, rates):
            p.sub_(step, alpha=min(lr, most))


def gentle(config: C, **less: Any) -> C:
    """Return settings with these, for very few clean samples a class, in the place of those that are the defaults."""
    usual = type(config)()
    return config.replace(**{k: v for k, v in less.items() if getattr(config, k) == getattr(usual, k)})
