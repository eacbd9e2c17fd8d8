"""The search that comes before the first step: universal perturbations, and the radius at which one of them works."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastfip.data.batch import Batch
from fastfip.methods._found import keep_changes
from fastfip.methods._search import added_points, grow, inputs_of, latent_worst_case, precision, worst_case
from fastfip.methods.base import Run
from fastfip.worst_case.added_points import AddedPoints
from fastfip.worst_case.points import points_axis
from fastfip.worst_case.universal import Perturbations

__all__ = ["search", "search_points"]

#: Radii that are tried at most.
ROUNDS = 16
#: The first of them; at the vectors of tokens, which are written over and not moved, the second number.
RADIUS, TOKEN_RADIUS = 0.02, 0.1
#: Clean inputs that are looked at together, at most 64 batches; no more are read once they fill this.
MOST_BYTES = 128 << 20


def search(run: Run, batches: Iterator[Batch], radius_factor: float) -> Perturbations | None:
    """Look for universal perturbations; None and a note where there can be none.

    The radius grows until the most susceptible class is reached from 90 % of the clean samples. So the radius is the
    model's own; where a backdoor is the easiest thing to reach, the backdoor sets it.

    Args:
        run: its model is in eval mode.
        batches: batches of clean samples without an end.
        radius_factor: the radius that is left, over the one at which the search ended.
    """
    inputs, why_not = inputs_of(run, MOST_BYTES)
    worst = worst_case(run, inputs, RADIUS) if inputs else latent_worst_case(run, TOKEN_RADIUS)
    inputs.clear()
    if worst is None:
        run.note(f"no worst-case inputs were looked for ({why_not}): only the clean terms of the objective are left")
        run.alert(f"ONLY FINE-TUNED, nothing was unlearned ({why_not})")
        return None
    with run.timed("search"), precision(run):
        grow(run, worst, batches, rounds=ROUNDS)
        worst.grow(radius_factor)
        run.log(radius=worst.relative_radius)
        keep_changes(run, worst)
    return worst


def search_points(run: Run) -> AddedPoints | None:
    """Look for points that send clouds to each class; None where inputs are no point clouds, or there are no classes.

    Args:
        run: its model is in eval mode.
    """
    if run.classes is None:
        return None
    first = next(iter(run.clean.batches(device=run.device)))
    own = torch.Generator().manual_seed(run.seed)  # other runs are to draw what they would have drawn without this
    axis = points_axis(run.model, run.task, first, own)
    inputs, _ = ([], "") if axis is None else inputs_of(run, MOST_BYTES)
    if axis is None or not inputs:
        return None
    with run.timed("search"), precision(run):
        return added_points(run, inputs, axis)
