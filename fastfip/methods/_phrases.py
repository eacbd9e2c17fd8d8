"""Phrases in a run: the search on the received model, and one step away from them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._search import goal_of, perturbed_tokens, precision, token_place
from fastfip.methods.base import Run
from fastfip.worst_case.phrases import Phrases
from fastfip.worst_case.universal import Perturbations

__all__ = ["search_phrases", "unlearn_phrases", "worst_of_tokens"]

#: Each phrase is improved so many times in the search, all of them together at most so many times.
SWEEPS, MOST = 3, 60


def worst_of_tokens(run: Run, radius: float) -> Phrases | Perturbations | None:
    """Return what is to be improved and unlearned where a model takes token ids.

    Returns:
        phrases where it has a table of words; free vectors, bounded by `radius`, where it reads bags of words; None
        where it looks up nothing that is found.
    """
    found = token_place(run)
    if found is None:
        return None
    phrases = Phrases.of(run.model, found[0], goal_of(run), run.generator)
    if phrases is None:
        return perturbed_tokens(run, *found, radius)
    if run.micro_batch is not None:
        phrases.together = min(phrases.together, run.micro_batch)
    return phrases


def search_phrases(run: Run, phrases: Phrases, batches: Iterator[Batch]) -> None:
    """Improve every phrase a few times on the model as it is."""
    for turn in range(min(SWEEPS * phrases.count, MOST)):
        _improve(run, phrases, next(batches), turn)


def unlearn_phrases(run: Run, batch: Batch, phrases: Phrases, weight: float) -> dict[str, float | Tensor]:
    """Add the gradient of the loss at texts with a phrase in each, and improve one phrase.

    Args:
        run: its model has BatchNorm in eval mode meanwhile.
        batch: clean samples; it goes through the model in the run's parts.
        phrases: what is written over some of their words.
        weight: of the loss.
    """
    drawn, start = phrases.draw(run.task, batch), 0
    total: float | Tensor = 0.0
    with run.bn("eval"):
        for part, share in run.parts(batch):
            mine = drawn[start : start + run.task.size(part)]
            start += len(mine)
            with phrases.place.reworded(run.model, phrases.place.phrased(mine)):
                with run.autocast():
                    loss = run.loss(run.forward(part), part).mean()
                run.backward(weight * share * loss)
            total = total + share * loss.detach()
    _improve(run, phrases, batch, run.step)
    return {"worst_case_loss": total, "reached": float(phrases.success.max())}


def _improve(run: Run, phrases: Phrases, batch: Batch, turn: int) -> None:
    with run.eval_mode(), precision(run):
        phrases.improve(run.model, run.task, batch, turn % phrases.count)
