"""Adversarial unlearning by implicit hypergradients (I-BAU, Zeng et al., ICLR 2022, arXiv 2110.03735)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.fisher.modes import readable
from fastfip.methods._pixels import PixelConfig, range_of
from fastfip.methods.base import Groups, Method, Run, register, setting

__all__ = ["IBAU", "IBAUConfig", "hypergradient"]

InnerSolver = Literal["fixed_point", "conjugate_gradient"]


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    params: Sequence[Tensor],
    terms: int = 5,
    step: float = 0.1,
    solver: InnerSolver = "fixed_point",
) -> tuple[Tensor, list[Tensor]]:
    """Return the outer loss and its gradient in the parameters, delta moving with them as a minimiser of `inner`.

    By the implicit function theorem d delta / d theta = -H^-1 d2 inner / (d delta d theta), H = d2 inner / d delta^2,
    so the gradient is d outer / d theta - d/d theta <d inner / d delta, H^-1 d outer / d delta>  (I-BAU, section 3).

    Args:
        inner: function of delta (and, by closure, of `params`) to a scalar, twice differentiable.
        outer: function of the same to a scalar.
        delta: a minimiser of `inner`, or near one.
        params: leaves that require gradients.
        terms: of the Neumann series step * sum_k (I - step H)^k that stands for H^-1, or iterations of the solver.
        step: of the fixed-point map delta - step * d inner / d delta. Where it does not contract (too long a step, or
            a delta that is no minimum) the series ends with the last term that did not grow.
        solver: the series, or conjugate gradients (for a positive definite H; stopped where the curvature is not).

    Where second derivatives overflow (a softmax inside the net) only the direct part is returned.
    """
    delta = delta.detach().requires_grad_(True)
    loss = outer(delta)
    by_delta, *direct = torch.autograd.grad(loss, [delta, *params], allow_unused=True)
    direct = [torch.zeros_like(p) if g is None else g for g, p in zip(direct, params)]
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    if by_delta is None or not slope.requires_grad:
        return loss.detach(), direct

    def curvature(v: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(slope, delta, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if out is None else out

    v = _series(curvature, by_delta, terms, step) if solver == "fixed_point" else _cg(curvature, by_delta, terms)
    mixed = torch.autograd.grad(slope, params, v.to(slope.dtype), allow_unused=True)
    if not all(bool(torch.isfinite(m).all()) for m in mixed if m is not None):
        return loss.detach(), direct
    return loss.detach(), [d if m is None else d - m for d, m in zip(direct, mixed)]


def _series(curvature: Callable[[Tensor], Tensor], g: Tensor, terms: int, step: float) -> Tensor:
    v = power = g
    for _ in range(terms - 1):
        following = power - step * curvature(power)
        size = float(following.norm())
        if not math.isfinite(size):
            return torch.full_like(g, torch.nan)  # the caller does without
        if size > float(power.norm()):
            break  # the map does not contract: more terms lead away
        v, power = v + following, following
    return step * v


def _cg(curvature: Callable[[Tensor], Tensor], g: Tensor, iterations: int) -> Tensor:
    x, r = torch.zeros_like(g), g.clone()
    p, size = r, r.square().sum()
    for _ in range(iterations):
        if float(size) == 0:
            break
        hp = curvature(p)
        bend = (p * hp).sum()
        if not float(bend) > 0:
            break
        x = x + size / bend * p
        r = r - size / bend * hp
        size, before = r.square().sum(), size
        p = r + size / before * p
    return x


@dataclass(frozen=True)
class IBAUConfig(PixelConfig):
    """Settings of I-BAU: those of the released code, in which an epoch is a round, except the number of rounds.

    Its five rounds pass over 5,000 images, which makes 250 steps. This is the default number of steps for a clean set
    of any size, because five rounds over few images leave more of a backdoor (a single trial on MNIST with 540 images:
    ASR 40 % instead of 6 %). With more than 5,000 images, give `epochs=5`.
    """

    STEPS: ClassVar[int | None] = 250

    epochs: int | None = setting(None, "rounds: each finds a perturbation, then passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 250 if neither is given", low=1)
    batch_size: int | None = setting(100, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(1e-3, "step size", above=0)
    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size after the warm-up")
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm; eval keeps the running statistics")
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    radius: float = setting(10.0, "largest L2 norm of the perturbation, in pixels of [0, 1]", above=0)
    delta_lr: float = setting(10.0, "step size of the perturbation, in pixels", above=0)
    ridge: float = setting(1e-3, "weight of the perturbation's squared L2 norm in the inner loss", low=0)
    share: float = setting(
        0.01, "share of each batch (one sample at least) that the outer loss perturbs", above=0, high=1
    )
    solver: Literal["fixed_point", "conjugate_gradient"] = setting(
        "fixed_point", "how H^-1 is applied in the hypergradient"
    )
    terms: int = setting(5, "terms of the fixed-point series, or iterations of conjugate gradients", low=1)
    inner_step: float = setting(0.1, "step of the fixed-point map", above=0)


@register
class IBAU(Method):
    """Unlearn the most harmful universal perturbation; the gradient includes how it depends on the weights.

        min_theta  L(f_theta(x + delta), y)
        delta = argmin_{|delta|_2 <= radius}  -L(f_theta(x + delta), y) + ridge |delta|^2

    Each round tunes the perturbation from zero by one pass of gradient steps, projected into the ball, and then makes
    one Adam step of the weights for each batch by `hypergradient`. Perturbation, ball and clipping are in pixels of [0,
    1].

    Differences from the released code: the ball (it is commented out there, with radius 10), and clipped images. The
    inner loss of the hypergradient is that of the step's own batch, and not of the first one. The inner labels are the
    given ones, as in the paper. The series ends if it diverges. The paper's outer loss perturbs every image
    (`share=1.0`), and the released code one in a hundred. The default here is one in a hundred, because with all of
    them held-out clean accuracy collapses (a single trial: to 40 % on an MNIST model of 98 %).
    """

    name = "i_bau"
    summary = "I-BAU: unlearning of a universal perturbation by implicit hypergradients"
    Config = IBAUConfig

    def setup(self, run: Run) -> None:
        """Read the range of the inputs."""
        config = run.config
        assert isinstance(config, IBAUConfig)
        self.config = config
        self.range = range_of(run, "the model was only fine-tuned")
        self.deltas: dict[tuple[int, ...], Tensor] = {}
        self.round = 0

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Find the perturbation at the start of a round; then take the hypergradient of a batch."""
        if self.range is None:
            return super().backward(run, batch)
        if self.round != run.epoch:
            self.ascend(run)
            self.round = run.epoch
        x = run.task.inputs(batch)
        params = [p for p in run.model.parameters() if p.requires_grad]
        delta = self.deltas.get(tuple(x.shape[1:]))
        if delta is None:  # this shape was not seen in the round's pass
            delta = torch.zeros_like(x[:1])
        rows = max(1, int(self.config.share * len(x)))
        chosen = torch.zeros(len(x), device="cpu")
        chosen[torch.randperm(len(x), generator=run.generator, device="cpu")[:rows]] = 1
        mask = chosen.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        loss, gradients = hypergradient(
            lambda d: self.inner(run, batch, d),
            lambda d: self.at(run, batch, mask * d),
            delta,
            params,
            self.config.terms,
            self.config.inner_step,
            self.config.solver,
        )
        scale = 1.0 if run.scaler is None else run.scaler.scale(torch.ones((), device=run.device))
        for p, g in zip(params, gradients):
            p.grad = g.to(p.dtype) * scale
        return {"loss": loss}

    def at(self, run: Run, batch: Batch, delta: Tensor) -> Tensor:
        """Return the mean loss of a batch moved by delta [1 or N, ch, ...]."""
        assert self.range is not None
        moved = self.range.moved(run.task, batch, delta)
        # Second derivatives in float16 overflow without a scaler of their own.
        cast = contextlib.nullcontext() if run.amp == torch.float16 else run.autocast()
        with readable(run.model, second_order=True), cast:
            return run.loss(run.forward(moved), batch).mean()

    def inner(self, run: Run, batch: Batch, delta: Tensor) -> Tensor:
        """Return what the perturbation minimises."""
        return self.config.ridge * delta.square().sum() - self.at(run, batch, delta)

    def ascend(self, run: Run) -> None:
        """Find the perturbation of a round, one for each shape of inputs, by one pass of projected gradient steps."""
        self.deltas = {}
        config = self.config
        with run.eval_mode():
            order = run.clean.batches(config.batch_size, shuffle=True, generator=run.generator, device=run.device)
            for batch in order:
                x = run.task.inputs(batch)
                shape = tuple(x.shape[1:])
                delta = self.deltas.get(shape, torch.zeros_like(x[:1])).detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(self.inner(run, batch, delta), delta)
                if bool(torch.isfinite(gradient).all()):
                    found = delta.detach() - config.delta_lr * gradient
                    size = torch.linalg.vector_norm(found).clamp_min(1e-30)
                    self.deltas[shape] = found * (config.radius / size).clamp(max=1.0)
