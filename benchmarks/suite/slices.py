"""Which cells belong together: the smoke slice of every day, the day slice, the looks at the validation set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import fastfip
from benchmarks.suite.cells import FLOOR, Cell
from benchmarks.suite.networks import NETWORKS, Network

__all__ = ["SLICES", "cells", "measurable_methods", "methods", "networks", "own_methods"]

#: Networks with six attacks in all: four of them in one network, an all-to-all one, one with 43 classes.
SMOKE = ("resnet20-four", "digits-badnets-all", "gtsrb-badnets")
SMOKE_METHODS = ("fine_tune", "large_step", "fast_wfip", "fisher_steps")
#: Methods that take long, last: what is cut off is what they lack.
SLOW = ("fst", "d3", "i_bau", "ft_sam", "awm", "anp", "sau", "fip", "fast_fip")
SLICES = {"smoke": "development", "day": "development", "validation": "validation"}


def own_methods() -> list[str]:
    """Return the names of the package's methods: documents are the same where a package with more is installed."""
    return [name for name in fastfip.methods.names() if fastfip.methods.get(name).__module__.startswith("fastfip.")]


def measurable_methods() -> list[str]:
    """Return those of them that ask for nothing that the networks here have not: the weights before fine-tuning."""
    return [name for name in own_methods() if not fastfip.methods.get(name).needs_pretrained]


def methods() -> list[str]:
    """Return all methods, the floor first, what is slow last."""
    rest = [name for name in measurable_methods() if name not in FLOOR]
    return [*FLOOR, *sorted(rest, key=lambda name: (SLOW.index(name) if name in SLOW else -1, name))]


def networks(name: str) -> list[Network]:
    """Return the networks of a slice; clean ones of the bases that are used come with both sets."""
    if name == "smoke":
        return [NETWORKS[network] for network in SMOKE]
    of = SLICES[name]
    chosen = [network for network in NETWORKS.values() if network.backdoors and network.set == of]
    clean = [network for network in NETWORKS.values() if not network.backdoors]
    return chosen + [network for network in clean if any(c.base == network.base for c in chosen)]


def cells(
    name: str,
    *,
    only: Iterable[str] | None = None,
    use: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Sequence[str] = ("plain",),
) -> list[Cell]:
    """Return the cells of a slice, what matters most first: seed by seed, quick methods before slow ones."""
    smoke = name == "smoke"
    chosen = networks(name) if only is None else [NETWORKS[network] for network in only]
    return [
        Cell(network.name, method, fraction, seed, setting)
        for seed in (seeds or ((0,) if smoke else (0, 1, 2)))
        for setting in settings
        for method in (use or (SMOKE_METHODS if smoke else methods()))
        for fraction in (fractions or ((0.05,) if smoke else (0.05, 0.01)))
        for network in chosen
        if network.backdoors or setting not in ("hidden", "retune")
    ]
