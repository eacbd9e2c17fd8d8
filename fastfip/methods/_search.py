"""The worst case that methods unlearn: where it can be looked for in a run, and the search that comes first."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastfip.data.batch import Batch, take
from fastfip.data.lengths import Padding
from fastfip.methods.base import Run
from fastfip.worst_case.added_points import AddedPoints
from fastfip.worst_case.goals import AwayFromTarget, Goal, TowardsClass
from fastfip.worst_case.pixels import perturbable
from fastfip.worst_case.places import TokenPlace
from fastfip.worst_case.universal import Perturbations

__all__ = [
    "IMPROVE_STEP", "SEARCH_BATCH", "added_points", "at_least", "group_by_length", "grow", "inputs_of",
    "latent_worst_case", "perturbed_tokens", "token_place", "worst_case",
]  # fmt: skip

#: Success of the most susceptible class at which the radius grows no more, and the factor by which it grows.
REACH, GROWTH = 0.9, 1.3
#: Steps at each radius.
STEPS = 10
#: Step of a perturbation, in radii, in the search and while the model unlearns.
IMPROVE_STEP = 0.3
#: Steps of the search for points that are added to clouds: most of it is in where they start from.
ADDED_STEPS = 20
#: Samples of a perturbed batch, at least.
SEARCH_BATCH = 64
#: The shortest clean texts, by which it is seen whether a model answers the same without padding.
FEW_TEXTS = 4
#: Clean batches in which the vectors of tokens are looked at, and those that tell what a wrong answer costs.
FEW_BATCHES = 8


def inputs_of(run: Run, most_bytes: int) -> tuple[list[Tensor], str]:
    """Return clean inputs of real numbers, up to so many bytes; or why they cannot be moved."""
    inputs: list[Tensor] = []
    for batch in itertools.islice(run.clean.batches(device=run.device), 64):
        if not perturbable(run.task, batch):
            return [], "no input of real numbers under a name that is known, such as x or image"
        inputs.append(run.task.inputs(batch).detach())
        if sum(x.nbytes for x in inputs) >= most_bytes:
            break
    return (inputs, "") if len({x.shape[1:] for x in inputs}) == 1 else ([], "the inputs differ in shape")


def worst_case(run: Run, inputs: list[Tensor], radius: float, classes: Tensor | None = None) -> Perturbations:
    """Return perturbations of the inputs, to be improved.

    There is one for each class, or for each of `classes` [K] if they are given; a few where there are no classes.
    """
    goal = goal_of(run) if classes is None else TowardsClass(len(classes), classes)
    return _in_parts(run, Perturbations.of(torch.cat(inputs), goal, run.generator, radius, ranks=run.ranks))


def added_points(run: Run, inputs: list[Tensor], axis: int, classes: Tensor | None = None) -> AddedPoints:
    """Return points for each class, or for each of `classes` [K], that send clouds of others there.

    Args:
        run: its model is in eval mode and takes point clouds.
        inputs: clean clouds.
        axis: of the points, see `fastfip.worst_case.points.points_axis`.
        classes: None: all.
    """
    assert run.classes is not None
    goal = TowardsClass(run.classes) if classes is None else TowardsClass(len(classes), classes)
    batches = run.endless()
    found = AddedPoints.among(run.model, run.task, batches, torch.cat(inputs), axis, goal, run.generator, run.ranks)
    _in_parts(run, found)
    improve(run, found, batches, ADDED_STEPS, 0.0)
    return found


def token_place(run: Run) -> tuple[TokenPlace, Tensor] | None:
    """Return where the model looks up vectors for token ids, and clean examples of what is perturbed there.

    Returns:
        None where it looks up none, or where what is written there does not reach its outputs (compiled code).
    """
    batches = list(itertools.islice(run.clean.batches(device=run.device), FEW_BATCHES))
    whole = replace(run.alone, most=None)  # the layer is found by the rows of a batch, which has to go through as one
    with run.eval_mode():
        found = TokenPlace.of(run.model, lambda batch: whole.forward(run.model, batch), batches, run.generator)
    return found if found is not None and _reaches(run, *found, batches[0]) else None


@torch.no_grad()
def group_by_length(run: Run, place: TokenPlace) -> None:
    """Have clean texts of like lengths in a batch from now on, and leave padding out where the answers stay the same.

    Args:
        run: of several processes each does the same.
        place: knows what fills the rows; where nothing does, batches stay as they are.
    """
    if place.padding is None:
        return
    task, clean = replace(run.alone, most=None), run.clean.grouped_by_length(Padding(place.padding))
    if clean.lengths is None:
        return
    run.clean, padding = clean, Padding(place.padding, cuts=True)
    if run.classes is None:  # labels may be of tokens, or have as many columns
        return
    shortest = clean.lengths[clean.index].argsort(stable=True)[:FEW_TEXTS]
    few = next(iter(clean.subset(shortest).batches(device=run.device)))
    less = padding.cut(task, few)
    same = less is not few
    if same:
        with run.eval_mode():
            try:
                a, b = (task.forward(run.model, some) for some in (few, less))
                room = max(1e-3, 4 * torch.finfo(a.dtype).eps)
                same = a.shape == b.shape and torch.allclose(a, b, rtol=room, atol=room)
            except Exception:  # a model of texts of one length
                same = False
    if same if run.ranks is None else run.ranks.from_first(same):
        clean.padding = padding


def latent_worst_case(run: Run, radius: float) -> Perturbations | None:
    """Return perturbations of the vectors that the model looks up for token ids; None: see `token_place`."""
    found = token_place(run)
    return None if found is None else perturbed_tokens(run, *found, radius)


def perturbed_tokens(run: Run, place: TokenPlace, like: Tensor, radius: float) -> Perturbations:
    """Return perturbations at a place of which `like` are clean examples."""
    return _in_parts(run, Perturbations.of(like, goal_of(run), run.generator, radius, place, run.ranks))


def _in_parts(run: Run, worst: Perturbations) -> Perturbations:
    """Have batches go through the model in the run's parts."""
    worst.together = run.together
    return worst


@torch.no_grad()
def _reaches(run: Run, place: TokenPlace, like: Tensor, batch: Batch) -> bool:
    """Return whether vectors of other tokens in their place change the answers."""
    whole = replace(run.alone, most=None)  # what is written over goes through the model in one pass
    with run.eval_mode():
        plain = whole.forward(run.model, batch)
        used = like[torch.arange(run.task.size(batch), device=like.device) % len(like)]
        with place.moved(run.model, whole, batch, used) as moved:
            return not torch.equal(whole.forward(run.model, moved), plain)


def goal_of(run: Run) -> Goal:
    """Return what the perturbations of a run are for: its classes or, where there are none, a larger loss."""
    if run.classes is not None:
        return TowardsClass(run.classes)
    with run.eval_mode():
        return AwayFromTarget.of(
            run.forward, run.task, itertools.islice(run.clean.batches(device=run.device), FEW_BATCHES)
        )


def grow(
    run: Run,
    worst: Perturbations,
    batches: Iterator[Batch],
    widest: float = math.inf,
    focus: float = 0.0,
    rounds: int | None = None,
) -> None:
    """Improve the perturbations, and widen the radius until the most susceptible class is reached from nine in ten.

    Args:
        run: its model is in eval mode.
        worst: starts at its first radius.
        batches: clean ones without an end.
        widest: radius that is not passed.
        focus: classes are drawn in proportion to their success to this power.
        rounds: radii that are tried at most; None: any number.
    """
    for _ in itertools.count() if rounds is None else range(rounds):
        improve(run, worst, batches, STEPS, focus)
        if float(worst.success.max()) >= REACH or worst.relative_radius * GROWTH > widest:
            break
        worst.grow(GROWTH)


def improve(run: Run, worst: Perturbations, batches: Iterator[Batch], steps: int, focus: float) -> None:
    """Take so many steps of the perturbations, each on a batch of its own."""
    for _ in range(steps):
        batch = at_least(run, next(batches))
        worst.improve(run.model, run.task, batch, worst.choose(run.task, batch, focus), IMPROVE_STEP)


def precision(run: Run) -> contextlib.AbstractContextManager[None]:
    """Return the run's autocast; in float16 the gradient of an input underflows without the scaler, so none."""
    return run.autocast() if run.amp != torch.float16 else contextlib.nullcontext()


def at_least(run: Run, batch: Batch) -> Batch:
    """Return a small batch repeated, so that with few clean samples every class is tried all the same."""
    n = run.task.size(batch)
    if n >= SEARCH_BATCH:
        return batch
    index = torch.arange(n, device="cpu").repeat(-(-SEARCH_BATCH // n))[:SEARCH_BATCH]
    return take(batch, index, n)
