"""The received model's answers, held where the words of texts are exchanged at random.

A few clean texts hold few of the words that a model knows. Texts of any words at all show what it knows of the others,
and hardly ever a trigger of several words; one of a single word is among them as rarely as any other word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.methods._received import giving
from fastfip.methods.base import Run
from fastfip.methods.wfip.clean import divergence
from fastfip.worst_case.places import Rewording, TokenPlace

__all__ = ["hold_answers"]


def hold_answers(run: Run, batch: Batch, place: TokenPlace, received: nn.Module, weight: float) -> Tensor | float:
    """Add the gradient of the divergence from the received model's answers at texts of exchanged words.

    Args:
        run: its model has BatchNorm in eval mode meanwhile.
        batch: clean texts; they go through the model in the run's parts.
        place: exchanges the words, others in each call.
        received: what `kept_received` returned.
        weight: of the divergence, in nats.

    Returns:
        the divergence, the mean over the texts.
    """
    generator = run.own_generator()
    total: Tensor | float = 0.0
    with run.bn("eval"):
        for part, share in run.parts(batch):
            new = _once(place.scrambled(run.model, generator))
            with torch.no_grad(), giving(run, received) as given, place.reworded(given, new), run.autocast():
                target = run.task.forward(given, part)
            with place.reworded(run.model, new):
                with run.autocast():
                    answer = run.forward(part)
                loss = divergence(target, answer)
                run.backward(weight * share * loss)
            total = total + share * loss.detach()
    return total


def _once(new: Rewording) -> Rewording:
    """Return what exchanges the same words whenever it is called: of two models that read the same texts."""
    drawn: list[tuple[Tensor, Tensor]] = []

    def same(ids: Tensor) -> tuple[Tensor, Tensor]:
        if not drawn:
            drawn.append(new(ids))
        return drawn[0]

    return same
