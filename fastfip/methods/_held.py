"""The received model's answers, held at clean samples whose labels are not learned in that pass.

These are point clouds, moved a little, and texts whose words are exchanged at random. A few clean texts hold few of the
words that a model knows. Texts of any words at all show what it knows of the others, and hardly ever a trigger of
several words; one of a single word is among them as rarely as any other word.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.methods._received import giving
from fastfip.methods.base import Run
from fastfip.methods.wfip.clean import divergence
from fastfip.worst_case.places import Rewording, TokenPlace

__all__ = ["hold_answers"]


def hold_answers(
    run: Run, batch: Batch, place: TokenPlace | None, received: nn.Module, weight: float
) -> Tensor | float:
    """Add the gradient of the divergence from the received model's answers.

    Args:
        run: its model has BatchNorm in eval mode meanwhile.
        batch: clean samples; they go through the model in the run's parts.
        place: exchanges the words of texts, others in each call; None: the samples are taken as they are.
        received: what `kept_received` returned.
        weight: of the divergence, in nats.

    Returns:
        the divergence, the mean over the samples.
    """
    generator = run.own_generator() if place is not None else None
    total: Tensor | float = 0.0
    with run.bn("eval"):
        for part, share in run.parts(batch):
            new = None if place is None else _once(place.scrambled(run.model, generator))
            with torch.no_grad(), giving(run, received) as given, _reworded(place, given, new), run.autocast():
                target = run.task.forward(given, part)
            with _reworded(place, run.model, new):
                with run.autocast():
                    answer = run.forward(part)
                loss = divergence(target, answer)
                run.backward(weight * share * loss)
            total = total + share * loss.detach()
    return total


def _reworded(
    place: TokenPlace | None, model: nn.Module, new: Rewording | None
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if place is None or new is None else place.reworded(model, new)


def _once(new: Rewording) -> Rewording:
    """Return what exchanges the same words whenever it is called: of two models that read the same texts."""
    drawn: list[tuple[Tensor, Tensor]] = []

    def same(ids: Tensor) -> tuple[Tensor, Tensor]:
        if not drawn:
            drawn.append(new(ids))
        return drawn[0]

    return same
