"""The search that comes before the first step: universal perturbations, and the radius at which one of them works."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from fastfip.data.batch import Batch, take
from fastfip.methods._found import keep_changes
from fastfip.methods.base import Run
from fastfip.worst_case.pixels import perturbable
from fastfip.worst_case.universal import Perturbations

__all__ = ["IMPROVE_STEP", "SEARCH_BATCH", "at_least", "search"]

#: Radii that are tried at most, each larger than the one before it by the growth, with so many steps at each.
ROUNDS, GROWTH, STEPS = 16, 1.3, 10
#: Success of the most susceptible class at which the radius grows no more.
REACH = 0.9
#: Step of a perturbation, in radii, in the search and while the model unlearns.
IMPROVE_STEP = 0.3
#: Clean inputs that are looked at together, at most 64 batches; no more are read once they fill this.
MOST_BYTES = 128 << 20
#: Samples of a perturbed batch, at least.
SEARCH_BATCH = 64


def search(run: Run, batches: Iterator[Batch], first: Batch, radius_factor: float) -> Perturbations | None:
    """Look for a universal perturbation of each class; None and a note where there can be none.

    The radius grows until the most susceptible class is reached from 90 % of the clean samples. So the radius is the
    model's own; where a backdoor is the easiest thing to reach, the backdoor sets it.

    Args:
        run: its model is in eval mode.
        batches: batches of clean samples without an end.
        first: one of them.
        radius_factor: the radius that is left, over the one at which the search ended.
    """
    why_not = ""
    inputs: list[torch.Tensor] = []  # what the clean range and the norm of a typical input are taken from
    if not perturbable(run.task, first):
        why_not = "no input of real numbers under a name that is known, such as x or image"
    else:
        for clean in itertools.islice(run.clean.batches(device=run.device), 64):
            inputs.append(run.task.inputs(clean))
            if sum(x.nbytes for x in inputs) >= MOST_BYTES:
                break
        if len({x.shape[1:] for x in inputs}) > 1:
            why_not = "the inputs differ in shape"
        elif run.classes is None:
            why_not = "loss= takes outputs or labels of another form"
    if why_not or run.classes is None:
        run.note(f"no worst-case inputs were looked for ({why_not}): only the clean terms of the objective are left")
        run.alert(f"ONLY FINE-TUNED, nothing was unlearned ({why_not})")
        return None
    perturbations = Perturbations.of(torch.cat(inputs), run.classes, run.generator, ranks=run.ranks)
    inputs.clear()
    with run.timed("search"), run.autocast() if run.amp != torch.float16 else contextlib.nullcontext():
        for _ in range(ROUNDS):
            for _ in range(STEPS):
                batch = at_least(run, next(batches))
                targets = perturbations.draw(run.task.labels(batch), 0.0)
                perturbations.improve(run.model, run.task, batch, targets, IMPROVE_STEP)
            if float(perturbations.success.max()) >= REACH:
                break
            perturbations.grow(GROWTH)
        perturbations.grow(radius_factor)
        run.log(radius=perturbations.relative_radius)
        keep_changes(run, perturbations)
    return perturbations


def at_least(run: Run, batch: Batch) -> Batch:
    """Return a small batch repeated, so that with few clean samples every class is tried all the same."""
    n = run.task.size(batch)
    if n >= SEARCH_BATCH:
        return batch
    index = torch.arange(n, device="cpu").repeat(-(-SEARCH_BATCH // n))[:SEARCH_BATCH]
    return take(batch, index, n)
