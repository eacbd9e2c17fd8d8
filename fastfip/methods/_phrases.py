"""Phrases in a run: the search on the received model, and one step away from them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError
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

    Raises:
        ConfigError: each process has a part of the table only.
    """
    found = token_place(run)
    if found is None:
        return None
    if run.shards is not None:
        raise ConfigError(
            "phrases are looked for in the whole table of words, of which each process has a part: purify the model as "
            "it was before it was sharded, or take wfip, or weight=0, which leaves the worst case out"
        )
    phrases = Phrases.of(run.model, found[0], goal_of(run), run.generator)
    if phrases is None:
        return perturbed_tokens(run, *found, radius)
    if run.micro_batch is not None:
        phrases.together = min(phrases.together, run.micro_batch)
    return phrases


def search_phrases(run: Run, phrases: Phrases, batches: Iterator[Batch]) -> None:
    """Improve every phrase a few times on the model as it is; of more than `MOST` phrases some that are drawn.

    Where phrases are remembered, every word is tried alone before.
    """
    if phrases.remembers:
        with run.eval_mode(), precision(run):
            phrases.try_words(run.model, run.alone, next(batches))
        _from_first(run, phrases)
    if phrases.count > MOST:
        phrases.shuffle(run.generator)
    for turn in range(min(SWEEPS * phrases.count, MOST)):
        _improve(run, phrases, next(batches), turn)


def unlearn_phrases(run: Run, batch: Batch, phrases: Phrases, weight: float, until: float) -> dict[str, float | Tensor]:
    """Add the gradient of the loss at texts with a phrase in each, and improve one phrase.

    Args:
        run: its model has BatchNorm in eval mode meanwhile.
        batch: clean samples; it goes through the model in the run's parts.
        phrases: what is written over some of their words.
        weight: of the loss.
        until: share of the run in which every step does this.
    """
    drawn, start = phrases.draw(run.task, batch), 0
    total: float | Tensor = 0.0
    with run.bn("eval"):
        for part, share in run.parts(batch):
            mine = drawn[start : start + run.task.size(part)]
            start += len(mine)
            rows = run.task.rows(len(mine))
            with phrases.place.reworded(run.model, phrases.place.phrased(mine, rows=rows)):
                with run.autocast():
                    loss = run.loss(run.forward(part), part).mean()
                run.backward(weight * share * loss)
            total = total + share * loss.detach()
    _tell_left_out(run, phrases, until)
    # Where the search did not get through all phrases, this goes on from where it stopped.
    _improve(run, phrases, batch, run.step if phrases.order is None else MOST + run.step)
    return {"worst_case_loss": total, "reached": float(phrases.success.max())}


def _tell_left_out(run: Run, phrases: Phrases, until: float) -> None:
    """Alert the user if there are so many classes that some have no turn in the search and the steps."""
    turns = MOST + math.ceil(until * run.total_steps)
    if phrases.order is not None and turns < phrases.goal.rows:  # each class has a turn before one has its second
        left = phrases.goal.rows - turns
        run.alert(f"{left} of {phrases.goal.rows} classes, drawn at random, WERE NOT SEARCHED for phrases: too many")


def _improve(run: Run, phrases: Phrases, batch: Batch, turn: int) -> None:
    """Improve one phrase; every rank does the same work on the same few texts, and rank 0 says what was found."""
    with run.eval_mode(), precision(run):
        phrases.improve(run.model, run.alone, batch, phrases.turn(turn))
    _from_first(run, phrases)


def _from_first(run: Run, phrases: Phrases) -> None:
    if run.ranks is not None:
        known = ("ids", "success", "kept", "next", "found")
        first = run.ranks.from_first(tuple(getattr(phrases, name) for name in known))
        for name, value in zip(known, first, strict=True):
            setattr(phrases, name, value)
