"""Single words that send short clean texts to a class, found by writing each word of a table over one of theirs.

The gradient at a word's vector ranks words by their effect to first order. The word of a trigger may act through
neurons that are silent until it is written, so the gradient passes it by; a pass with the word itself does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.lengths import columns_held, columns_of
from fastfip.data.task import Task
from fastfip.worst_case.goals import Goal
from fastfip.worst_case.layers_of_ids import calls_of_lookups
from fastfip.worst_case.places import TokenPlace

__all__ = ["cut", "ids_of", "ranked_words"]

#: Words that are written at most, drawn from larger tables; texts that each is written into, and their fewest words.
BUDGET, INTO, FEWEST = 1 << 15, 2, 3


@torch.no_grad()
def ranked_words(
    model: nn.Module, task: Task, batch: Batch, place: TokenPlace, goal: Goal, kept: int, together: int
) -> Tensor:
    """Write each word of the table over the middle of two short texts; return those that do most for each row.

    Args:
        model: in eval mode; its layer has a table of words.
        task: how the model meets a batch.
        batch: clean texts, of which the two shortest ones of different rows are taken.
        place: the layer, and the generator that draws words from a table of more than 2^15.
        goal: whose loss is lowered, in texts that are not of the row's own class.
        kept: words of each row.
        together: whole texts of a pass, at most; of texts that can be cut as many more as hold as many words.

    Returns:
        [R, kept] int64 on the CPU, ids of words, the best first; fewer columns where the table has fewer words.
    """
    table = place.table(model)
    assert table is not None
    n, count = task.size(batch), len(table)
    words = torch.arange(count, device="cpu")
    if count > BUDGET:
        words = torch.randperm(count, generator=place.generator, device="cpu")[:BUDGET]
    if place.padding is not None:
        words = words[words != place.padding]
    ids, own = ids_of(model, task, batch, place), goal.own(task, batch)
    few = _shortest(place, ids, own)
    short, length = cut(model, task, take(batch, few, n), place, goal, ids[few])
    m = len(few)
    usable = torch.ones(m, goal.rows, dtype=torch.bool)
    if own is not None:
        usable = own.cpu()[few][:, None] != torch.arange(goal.rows, device="cpu")
    share = usable.float() / usable.sum(0).clamp_min(1)
    each = together * (ids.shape[1] if ids.dim() == 2 else 1) // max(1, length)
    each = max(1, (each if task.most is None else min(each, task.most)) // m)
    # Only the best so far are kept, as a table times a thousand classes is large.
    best = torch.empty(goal.rows, 0), torch.empty(goal.rows, 0, dtype=torch.long)
    for some in words.split(each):
        losses = written(model, task, short, m, place, goal, some[:, None], torch.full((m,), 0.5))
        loss = (losses * share).sum(1).T.nan_to_num(torch.inf)
        both = torch.cat([best[0], loss], 1), torch.cat([best[1], some.expand(goal.rows, -1)], 1)
        top = both[0].topk(min(kept, both[0].shape[1]), 1, largest=False)
        best = top.values, both[1].gather(1, top.indices)
    return best[1]


@torch.no_grad()
def written(
    model: nn.Module, task: Task, batch: Batch, m: int, place: TokenPlace, goal: Goal, phrases: Tensor, where: Tensor
) -> Tensor:
    """Return the losses [Q, m, R] of each row where each of Q phrases [Q, K] is written into each of m texts.

    `where` [m] in [0, 1) says where it stands in each text. All of it is one pass.
    """
    many = take(batch, torch.arange(m, device="cpu").repeat(len(phrases)), m)
    with place.reworded(model, place.phrased(phrases.repeat_interleave(m, 0), where.repeat(len(phrases)))):
        logits = task.forward(model, many)
    return goal.losses(task, logits, many).view(len(phrases), m, -1).expand(-1, -1, goal.rows).float().cpu()


@torch.no_grad()
def ids_of(model: nn.Module, task: Task, batch: Batch, place: TokenPlace) -> Tensor:
    """Return the ids [N, T] of a batch that the layer is given first, on the CPU."""
    n = task.size(batch)
    parts = torch.arange(n, device="cpu").split(n if task.most is None else task.most)
    calls = (calls_of_lookups(model, lambda b: task.forward(model, b), take(batch, part, n)) for part in parts)
    return torch.cat([next(ids for name, ids, _ in some if name == place.name) for some in calls]).cpu()


def cut(model: nn.Module, task: Task, batch: Batch, place: TokenPlace, goal: Goal, ids: Tensor) -> tuple[Batch, int]:
    """Leave out the columns that are padding in all texts, if the model answers the same without them.

    Args:
        model: in eval mode.
        task: how the model meets a batch.
        batch: N texts.
        place: knows the padding.
        goal: whose losses have to stay.
        ids: [N, T] of the texts.

    Returns:
        the batch, or a shorter one, and the columns that it has.
    """
    n, length = ids.shape
    if place.padding is None:
        return batch, length
    begin, end = columns_held(ids, place.padding)
    if (begin, end) == (0, length):
        return batch, length
    short = columns_of(batch, n, length, begin, end)
    try:
        whole, less = (goal.losses(task, task.forward(model, some), some).float() for some in (batch, short))
    except Exception:  # a model of texts of one length
        return batch, length
    same = whole.shape == less.shape and torch.allclose(whole, less, rtol=0.02, atol=0.02)
    return (short, end - begin) if same else (batch, length)


def _shortest(place: TokenPlace, ids: Tensor, own: Tensor | None) -> Tensor:
    """Return which texts are short, [INTO], of different classes if there are some."""
    begin, end = place.ends(ids)
    words = (end - begin).float()
    order = torch.where(words < FEWEST, torch.inf, words).argsort(stable=True)
    if own is not None:
        first = own.cpu()[order] == own.cpu()[order[0]]
        order = torch.cat([order[:1], order[~first], order[first][1:]])
    return order[:INTO]
