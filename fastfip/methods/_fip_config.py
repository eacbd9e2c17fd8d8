"""Settings of FIP and Fast FIP: what each variant presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fastfip.errors import ConfigError
from fastfip.methods.config import MethodConfig, setting

__all__ = ["FIPConfig"]


@dataclass(frozen=True)
class FIPConfig(MethodConfig):
    """Settings of FIP. What stands as None is set by the variant (see `PRESETS`); giving a value overrides that.

    Variants: "worst_case", the default of this package (see `docs/purification.md` for why); "paper", the published
    objective with the exact trace and the true diagonal; "released", the semantics of the code that was released with
    the paper, for comparison (its trace term is a random surrogate, see `_released.py`).
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "worst_case": {
            "epochs": None, "steps": 180, "batch_size": 64, "lr": 0.01, "momentum": 0.9, "schedule": "cosine",
            "warmup": 0.05, "grad_clip": 5.0, "eta_f": 0.0, "eta_r": 0.0, "trace_every": 5,
            "fisher": "mc", "radius_factor": 1.0, "weight": 0.25,
            "turns": False, "improve_every": 1, "average": 0.0,
        },
        "paper": {
            "epochs": 100, "steps": None, "batch_size": 128, "lr": 0.01, "momentum": 0.95, "schedule": "constant",
            "warmup": 0.0, "grad_clip": None, "eta_f": 1e-3, "eta_r": 5.0, "trace_every": 1,
            "fisher": "empirical", "radius_factor": 1.0, "weight": 0.25,
            "turns": False, "improve_every": 1, "average": 0.0,
        },
        "released": {
            "epochs": None, "steps": 2000, "batch_size": 128, "lr": 0.005, "momentum": 0.95, "schedule": "constant",
            "warmup": 0.0, "grad_clip": None, "eta_f": 0.5, "eta_r": 0.0, "trace_every": 5,
            "fisher": "empirical", "radius_factor": 1.0, "weight": 0.25,
            "turns": False, "improve_every": 1, "average": 0.0,
        },
    }  # fmt: skip

    variant: Literal["worst_case", "paper", "released"] = setting("worst_case", "which objective")
    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs", low=1)
    batch_size: int | None = setting(None, "samples a step", low=1)
    lr: float = setting(None, "step size", above=0)
    momentum: float = setting(None, "momentum of SGD", low=0, below=1)
    schedule: Literal["constant", "cosine"] = setting(None, "course of the step size")
    warmup: float = setting(None, "share of the steps with rising step size", low=0, below=1)
    grad_clip: float | None = setting(None, "largest norm of the gradient", above=0)
    eta_f: float = setting(None, "weight of the Fisher trace", low=0)
    eta_r: float = setting(None, "weight of the retainer", low=0)
    trace_every: int = setting(None, "the trace term is added every so many steps", low=1)
    trace_way: Literal["auto", "exact", "perturb", "signs"] = setting(
        "auto", "how the gradient of the trace is found (docs/trace.md)"
    )
    probes: int = setting(20, "Gaussian vectors of the released surrogate", low=1)
    fisher: Literal["empirical", "mc"] = setting(
        None, "labels of the Fisher diagonal: the data's, or drawn from the received net"
    )
    trust: float | None = setting(
        None,
        "longest step of a coordinate, in units of 1/sqrt(F_ii); None: no bound",
        above=0,
    )
    kl: float = setting(0.5, "share of the KL to the received net in the clean terms", low=0, high=1)
    budget: float = setting(0.5, "KL to the received net, in nats, above which the unlearning gives way", above=0)
    weight: float = setting(None, "weight of the loss at worst-case inputs", low=0)
    unlearn: float = setting(0.4, "share of the steps that unlearn; the rest recovers", low=0, high=1)
    turns: bool = setting(None, "the recovery takes the loss and the KL in turns, one pass a step instead of two")
    improve_every: int = setting(None, "perturbations are improved in every so many steps of the unlearning", low=1)
    average: float = setting(
        None, "share of the steps, at the end, whose states are averaged: the last state is the mean", low=0, below=1
    )
    sieve: float = setting(
        0.02,
        "share of the clean samples, those that the unlearning hurt most, left out of the recovery",
        low=0,
        high=0.5,
    )
    settle: float = setting(0.5, "share of the recovery whose states may be kept", above=0, high=1)
    focus: float = setting(2.0, "perturbations are drawn in proportion to success ** focus", low=0)
    reach: float = setting(0.9, "success at which the search stops to widen the radius", above=0, high=1)
    radius_factor: float = setting(None, "radius while unlearning, over the one found", above=0)
    search_rounds: int = setting(16, "most radii that the search tries", low=1)
    search_steps: int = setting(10, "steps of the search at each radius", low=1)
    search_growth: float = setting(1.3, "from one radius to the next", above=1)
    search_step: float = setting(0.3, "step of a perturbation, in radii", above=0)
    search_batch: int = setting(64, "samples of a perturbed batch, at least", low=1)

    def __post_init__(self) -> None:
        preset = self.PRESETS.get(self.variant)
        if preset is None:
            raise ConfigError(f"variant={self.variant!r}: must be one of {', '.join(self.PRESETS)}")
        length_given = self.epochs is not None or self.steps is not None
        for name, value in preset.items():
            if getattr(self, name) is None and not (name in ("epochs", "steps") and length_given):
                object.__setattr__(self, name, value)
        super().__post_init__()

    def replace(self, **changes: Any) -> FIPConfig:
        """Return a copy with some settings changed; a change of the variant brings that variant's presets along."""
        other = changes.get("variant", self.variant)
        if other != self.variant and other in self.PRESETS:
            mine = self.PRESETS[self.variant]
            if changes.get("steps") is not None or changes.get("epochs") is not None:  # the length is given already
                changes = {"steps": None, "epochs": None, **changes}
            for item in fields(self):
                own = item.name in mine or item.name in self.PRESETS[other]
                if own and item.name not in changes and getattr(self, item.name) == mine.get(item.name):
                    changes[item.name] = self.PRESETS[other].get(item.name)
            if changes.get("epochs") is not None and changes.get("steps") is not None:
                raise ConfigError("give epochs or steps, not both")
        return super().replace(**changes)
