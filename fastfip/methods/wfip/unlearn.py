"""One step away from the worst case: the loss towards the true labels at perturbed inputs, back-propagated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._search import IMPROVE_STEP
from fastfip.methods.base import Run
from fastfip.worst_case.universal import Perturbations

__all__ = ["FOCUS", "unlearn"]

#: Perturbations are drawn in proportion to success ** FOCUS.
FOCUS = 2.0


def unlearn(
    run: Run,
    batch: Batch,
    worst: Perturbations,
    weight: float,
    improve: bool = True,
    inputs_only: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> dict[str, float | Tensor]:
    """Add the gradient of the loss at perturbed inputs; return what the history shows.

    Args:
        run: its model has BatchNorm in eval mode meanwhile.
        batch: clean samples, at which perturbations are put; it goes through the model in the run's parts.
        worst: the perturbations.
        weight: of the loss.
        improve: whether the perturbations take a step as well, from the same pass.
        inputs_only: a block whose backward passes are for gradients of inputs.
    """
    c = worst.choose(run.task, batch, FOCUS)
    total: float | Tensor = 0.0
    hits: list[Tensor] = []
    sums = worst.sums(c) if improve else None
    with run.bn("eval"):
        places, start = run.parts(batch), 0
        for part, share in places:
            mine = c[start : start + run.task.size(part)]
            start += len(mine)
            with worst.moved(run.model, run.task, part, mine) as (used, moved):
                with run.autocast():
                    logits = run.forward(moved)
                    loss = run.loss(logits, moved).mean()
                if sums is not None and run.amp != torch.float16:
                    with inputs_only():
                        sums.add(worst.gradient(run.task, logits, moved, used, mine, retain_graph=True))
                run.backward((weight if share == 1 else weight * share) * loss)
            total = total + (loss.detach() if share == 1 else share * loss.detach())
            hits.append(worst.goal.hit(run.task, logits.detach(), moved, mine))
            del used, moved, logits, loss  # with the graph, before the next part
        if improve and run.amp == torch.float16:
            # The gradient of an input underflows without the scaler: a pass of its own, in float32.
            reached = worst.improve(run.model, run.task, batch, c, IMPROVE_STEP)
        else:
            if sums is not None:
                worst.move(sums, IMPROVE_STEP)
            reached = worst.count(torch.cat(hits), c)
    return {"worst_case_loss": total, "reached": reached}
