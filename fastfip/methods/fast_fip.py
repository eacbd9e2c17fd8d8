"""Fast FIP (arXiv 2409.00863): only the singular values of each weight move, a few thousand numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fastfip.errors import ConfigError
from fastfip.methods._fip_config import FIPConfig
from fastfip.methods._space import Space, Spectral
from fastfip.methods.base import Run, register, setting
from fastfip.methods.fip import FIP

__all__ = ["FastFIP", "FastFIPConfig"]


@dataclass(frozen=True)
class FastFIPConfig(FIPConfig):
    """Settings of Fast FIP: those of FIP, in the space of spectral shifts."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "worst_case": {
            **FIPConfig.PRESETS["worst_case"],
            "steps": 160,
            "lr": 0.1,
            "affine": True,
            "trust": 0.005,
            "radius_factor": 1.6,
            "weight": 0.5,
            "turns": True,
            "improve_every": 2,
            "average": 0.2,
        },
        "paper": {**FIPConfig.PRESETS["paper"], "affine": False},
        "released": {**FIPConfig.PRESETS["released"], "affine": True},
    }

    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm; eval keeps the running statistics")
    select: Literal["best", "last"] = setting(
        "last",
        "which epoch is kept: the best by held-out clean score, or the last, which is a mean of states (average)",
    )
    unlearn: float = setting(0.3, "share of the steps that unlearn; the rest recovers", low=0, high=1)
    rank: int | float | None = setting(
        None,
        "directions of each weight that move, the largest first: a number, a share of the energy, or None for all",
        above=0,
    )
    affine: bool = setting(None, "whether biases and the affine part of norm layers are tuned as well")


@register
class FastFIP(FIP):
    """FIP on spectral shifts: U, V and sigma computed once, delta tuned, folded back exactly."""

    name = "fast_fip"
    summary = "Fast FIP: FIP on the singular values of each weight"
    Config = FastFIPConfig

    def make_space(self, run: Run) -> Space:
        """Return the spectral shifts."""
        if run.config.trace_way not in ("auto", "exact"):  # type: ignore[attr-defined]
            raise ConfigError("fast_fip has an exact trace of its own, in delta-space: leave trace_way at 'auto'")
        return Spectral(run, run.config.affine, run.config.rank)  # type: ignore[attr-defined]

    @torch.no_grad()
    def score(self, run: Run) -> dict[str, float]:
        """Score with W(delta) in place."""
        self.space.begin()
        try:
            return super().score(run)
        finally:
            self.space.leave(fold=False)
