"""The first search of `fisher_steps`: the worst change of each class, at the radius at which one of them works."""

from __future__ import annotations

from fastfip.methods._found import keep_changes
from fastfip.methods._search import SEARCH_BATCH, grow, improve
from fastfip.methods.base import Run
from fastfip.methods.wfip.unlearn import FOCUS
from fastfip.worst_case.universal import Perturbations

__all__ = ["TOKEN_RADIUS", "search_reach"]

#: The search ends with so many steps that favour the classes that are reached.
LAST = 10
#: The radius grows up to the first number; what is unlearned has at least the second one.
WIDEST, NARROWEST = 0.4, 0.15
#: The same at the vectors of tokens, which are written over and not moved: 1 is the size of a typical token.
TOKEN_RADIUS, TOKEN_WIDEST, TOKEN_NARROWEST = 0.3, 1.5, 0.5


def search_reach(run: Run, worst: Perturbations, near: bool = True) -> None:
    """Look for the worst change of each class, at the radius at which one of them works.

    Args:
        run: its model is in eval mode.
        worst: starts at its first radius.
        near: whether radii are tried below the one that what is unlearned has at least.
    """
    batches = run.endless()
    # Of more classes than a batch has samples each is drawn less than once a step: those that are reached get more,
    # yet most draws stay with the others.
    narrowest, widest = (TOKEN_NARROWEST, TOKEN_WIDEST) if worst.of_tokens else (NARROWEST, WIDEST)
    if not near:
        worst.radius *= max(1.0, narrowest / worst.relative_radius)
    grow(run, worst, batches, widest, 1.0 if len(worst.success) > SEARCH_BATCH else 0.0)
    worst.grow(max(1.0, narrowest / worst.relative_radius))
    improve(run, worst, batches, LAST, FOCUS)
    run.log(radius=worst.relative_radius)
    keep_changes(run, worst)
