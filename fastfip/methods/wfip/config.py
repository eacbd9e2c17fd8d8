"""Settings of worst-case FIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastfip.methods.config import MethodConfig, setting

__all__ = ["FastWFIPConfig", "WFIPConfig"]


@dataclass(frozen=True)
class WFIPConfig(MethodConfig):
    """Settings of worst-case FIP on every weight."""

    STEPS: ClassVar[int | None] = 180

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 180 if neither is given", low=1)
    batch_size: int | None = setting(64, "samples in a step", low=1)
    warmup: float = setting(0.05, "share of the steps in which the step size rises linearly", low=0, below=1)
    grad_clip: float | None = setting(5.0, "largest norm of the gradient; None: not clipped", above=0)
    trust: float | None = setting(
        None, "longest step of a coordinate, in units of 1/sqrt(F_ii); None: no bound", above=0
    )
    kl: float = setting(0.5, "share of the KL to the received model in the clean terms", low=0, high=1)
    budget: float = setting(
        0.5, "KL to the received model, in nats, above which the unlearning is turned down", above=0
    )
    weight: float = setting(0.25, "weight of the loss at worst-case inputs", low=0)
    unlearn: float = setting(0.4, "share of the steps that unlearn; the rest recovers", low=0, high=1)
    radius_factor: float = setting(1.0, "radius while unlearning, divided by the radius that the search found", above=0)
    sieve: float = setting(
        0.02, "share of the clean samples, those that the unlearning hurt most, left out of the recovery",
        low=0, high=0.5,
    )  # fmt: skip


@dataclass(frozen=True)
class FastWFIPConfig(WFIPConfig):
    """Settings of worst-case FIP on spectral shifts."""

    STEPS: ClassVar[int | None] = 160

    steps: int | None = setting(None, "optimiser steps, instead of epochs; 160 if neither is given", low=1)
    lr: float = setting(0.1, "step size", above=0)
    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm; eval keeps the running statistics")
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the best by held-out clean score, or the last, whose state is a mean of states"
    )
    trust: float | None = setting(
        0.005, "longest step of a coordinate, in units of 1/sqrt(F_ii); None: no bound", above=0
    )
    weight: float = setting(0.5, "weight of the loss at worst-case inputs", low=0)
    unlearn: float = setting(0.3, "share of the steps that unlearn; the rest recovers", low=0, high=1)
    radius_factor: float = setting(1.6, "radius while unlearning, divided by the radius that the search found", above=0)
    rank: int | float | None = setting(
        None,
        "directions of each weight that move, the largest first: a number, a share of the energy, or None for all",
        above=0,
    )
    affine: bool = setting(True, "whether biases and the affine part of norm layers are tuned as well")
    cache: str | None = setting(
        None,
        "file, named *.factors, that keeps the weights' decomposition for later runs on the same weights; None: none",
    )
