"""The published objective of FIP and Fast FIP (arXiv 2409.00863, CCS 2024).

    L(theta) + eta_f * Tr F(theta) + (eta_r / 2) * sum_i F_ii (theta_i - theta_i^0)^2

L is the clean loss. Tr F is the trace of the empirical Fisher information at the current weights; it is exact, and so
is its gradient. F_ii is the Fisher diagonal at the received weights theta^0, which is computed once. The package's
default is another method, `fisher_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._space import Space, SpaceMethod, Spectral
from fastfip.methods.base import MethodConfig, Run, register, setting

__all__ = ["FIP", "FIPConfig", "FastFIP", "FastFIPConfig", "retainer"]


@dataclass(frozen=True)
class FIPConfig(MethodConfig):
    """Settings of FIP: those of the paper as far as they are known (learning rate, length, eta_r), without its decay.

    The code that was released with the paper has another penalty (benchmarks/purification/released_fip.py), so its
    eta_f does not tell which eta_f is right here.
    """

    epochs: int | None = setting(100, "passes over the clean set", low=1)
    batch_size: int | None = setting(128, "samples in a step", low=1)
    momentum: float = setting(0.95, "momentum of SGD", low=0, below=1)
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size")
    eta_f: float = setting(1e-3, "weight of the Fisher trace", low=0)
    eta_r: float = setting(5.0, "weight of the retainer", low=0)
    trace_every: int = setting(1, "the trace term is added once in this many steps", low=1)
    trace_way: Literal["auto", "exact", "perturb", "signs"] = setting(
        "auto", "how the gradient of the trace is computed (docs/trace.md)"
    )


def retainer(tensors: list[Tensor], anchor: list[Tensor], diagonal: list[Tensor]) -> Tensor:
    """Return sum_i F_ii (theta_i - theta_i^0)^2 / 2, the anchor at the received weights (FIP; EWC's form)."""
    total = sum(
        ((d * (t - t0).pow(2)).sum() for t, t0, d in zip(tensors, anchor, diagonal)),
        start=torch.zeros((), device=tensors[0].device),
    )
    return total / 2


@register
class FIP(SpaceMethod):
    """Tune every parameter on the sum of the clean loss, the Fisher trace and the retainer."""

    name = "fip"
    summary = "FIP as published: every weight, towards a minimum with a small Fisher trace"
    Config: ClassVar[type[MethodConfig]] = FIPConfig
    over_ranks = True
    keeps = ("anchor", "diagonal", "signs")

    @property
    def signs(self) -> Tensor | None:
        """State of the generator of the trace's random signs, if there is one."""
        penalty = getattr(self.space, "penalty", None)
        return None if penalty is None else penalty._generator.get_state()

    @signs.setter
    def signs(self, state: Tensor | None) -> None:
        self.space.signs = state  # type: ignore[attr-defined]

    def setup(self, run: Run) -> None:
        """Take the Fisher diagonal of the received model, if the retainer needs it."""
        super().setup(run)
        config: Any = run.config
        self.anchor: list[Tensor] = []
        self.diagonal: list[Tensor] = []
        if config.eta_r > 0:
            with run.timed("fisher"):
                self.diagonal = [d.detach() for d in self.space.diagonal(run, "empirical")]
            self.anchor = [t.detach().clone() for t in self.space.tensors]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the three terms."""
        config: Any = run.config
        self.space.begin()
        with run.autocast():
            loss = run.losses(batch).mean()
        run.backward(loss)
        values: dict[str, float | Tensor] = {"loss": loss.detach()}
        self.space.end()
        if config.eta_f > 0 and run.step % config.trace_every == 0:
            self.space.begin()
            with torch.autocast(run.device.type, enabled=False):
                trace = self.space.trace(run, batch)
            run.backward(config.eta_f * trace)
            self.space.end()
            values["fisher_trace"] = trace.detach()
        if self.anchor:
            term = retainer(self.space.tensors, self.anchor, self.diagonal)
            run.backward(run.once(config.eta_r * term))
            values["retainer"] = term.detach()
        return values


@dataclass(frozen=True)
class FastFIPConfig(FIPConfig):
    """Settings of Fast FIP: those of FIP (SGD, BatchNorm in train mode), in the space of spectral shifts.

    The paper's own settings of Fast FIP are not known, and its released code has no runnable path for it.
    """

    trace_way: Literal["auto", "exact"] = setting("auto", "the trace of the shifts has an exact gradient of its own")
    rank: int | float | None = setting(
        None,
        "directions of each weight that move, the largest first: a number, a share of the energy, or None for all",
        above=0,
    )
    affine: bool = setting(False, "whether biases and the affine part of norm layers are tuned as well")
    cache: str | None = setting(
        None,
        "file, named *.factors, that keeps the weights' decomposition for later runs on the same weights; None: none",
    )


@register
class FastFIP(FIP):
    """FIP on spectral shifts: U, V and sigma are computed once, delta is tuned, and folded back exactly.

    W(delta) = U diag(relu(sigma + delta)) V^T; the Fisher trace and the retainer are those of delta.
    """

    name = "fast_fip"
    summary = "Fast FIP as published: FIP on the singular values of each weight"
    lends_weights = True
    Config: ClassVar[type[MethodConfig]] = FastFIPConfig

    def make_space(self, run: Run) -> Space:
        """Return the spectral shifts."""
        config: Any = run.config
        return Spectral(run, config.affine, config.rank, config.cache)
