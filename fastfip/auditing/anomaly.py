"""Whether one class is reached by so much smaller a change than the others that chance does not explain it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FEWEST", "LEVEL", "SMALLER", "Anomaly", "anomaly"]

#: Fewer classes than these have no spread to speak of.
FEWEST = 5
#: A class is flagged where chance would set one apart so far in fewer than this share of clean nets ...
LEVEL = 0.05
#: ... and its change is at most this many times the median of the classes.
SMALLER = 0.5
#: A spread of the logarithms below this is rounding: most sizes are the largest that the search tries.
LEAST_SPREAD = 1e-3
_DRAWS = 20_000


@dataclass(frozen=True)
class Anomaly:
    """How far each class stands out by the size of its change.

    Attributes:
        classes: labels, the one that stands out most first. index: in the same order, how many (consistent) standard
            deviations the logarithm of the size is below its median: (median - log size) / (1.4826 MAD).
        ratio: size of the first over the median. p: share of clean nets in which chance sets the first apart so far,
            if logarithms of sizes are draws from one normal distribution; None where it cannot be told.
        why_not: why it cannot be told, else "".
    """

    classes: tuple[int, ...]
    index: tuple[float, ...]
    ratio: float
    p: float | None
    why_not: str = ""


def anomaly(classes: Sequence[int], size: Tensor, reached: Tensor) -> Anomaly:
    """Rank classes by the size of the change that reaches them.

    The index is Neural Cleanse's (S&P 2019, sec. 4), but of the logarithms, sizes being positive and skewed. There an
    index above 2 is called an attack; of ten draws from a normal distribution one is that far out in a third of the
    cases, and of 43 in two thirds. So the index is turned into the share of such draws in which it is reached, by
    simulation with the same number of classes.

    Args:
        classes: labels [C].
        size: [C], positive.
        reached: [C], False where `size` is only a lower bound.
    """
    log = size.double().clamp_min(1e-12).log()
    median = log.quantile(0.5)
    spread = 1.4826 * float((log - median).abs().quantile(0.5))
    order = sorted(range(len(classes)), key=lambda k: (float(log[k]), k))
    index = [float(median - log[k]) / spread if spread > LEAST_SPREAD else 0.0 for k in order]
    ratio = float((log[order[0]] - median).exp())
    why_not = ""
    if len(classes) < FEWEST:
        why_not = f"{len(classes)} classes are too few to compare ({FEWEST} are needed)"
    elif int(reached.sum()) * 2 <= len(classes):
        why_not = f"only {int(reached.sum())} of {len(classes)} classes were reached, so that there is no median"
    elif not spread > LEAST_SPREAD or not math.isfinite(spread):
        why_not = "all sizes are nearly equal"
    p = None if why_not else _share_beyond(index[0], len(classes))
    return Anomaly(tuple(int(classes[k]) for k in order), tuple(index), ratio, p, why_not)


def _share_beyond(index: float, classes: int) -> float:
    table = _null(classes)
    return (1 + int((table >= index).sum())) / (1 + len(table))


@functools.lru_cache(maxsize=16)
def _null(classes: int) -> Tensor:
    """Largest indices of samples of `classes` draws from a normal distribution."""
    draws = torch.randn(_DRAWS, classes, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    median = draws.quantile(0.5, dim=1, keepdim=True)
    spread = 1.4826 * (draws - median).abs().quantile(0.5, dim=1)
    return (median[:, 0] - draws.amin(1)) / spread
