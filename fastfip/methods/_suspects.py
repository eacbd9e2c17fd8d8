"""The search for phrases that turn texts in the received model and not in the one that is tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.methods._search import precision
from fastfip.methods.run import Run
from fastfip.worst_case.places import TokenPlace
from fastfip.worst_case.suspects import HIDES, LONGEST, Suspects
from fastfip.worst_case.words import ids_of, outputs_written

__all__ = ["find_suspects"]

#: Texts that phrases are tried on, and texts of one pass at most.
TEXTS, TOGETHER = 16, 128
#: The result names the best phrase of each class whose difference is at least this.
TELLING = 0.3


@torch.no_grad()
def find_suspects(
    run: Run,
    received: nn.Module,
    calibration: Callable[[Tensor], Tensor],
    place: TokenPlace,
    batch: Batch,
    words: Tensor,
) -> Suspects | None:
    """Look for phrases on a few texts of a batch, which the received model has right.

    Args:
        run: its model is the tuned one; every rank does the same work, and rank 0 says what was found.
        received: the other one.
        calibration: of its logits.
        place: where the models look up words.
        batch: clean texts.
        words: [M] that phrases are made of, on the CPU.

    Returns:
        None where nothing was found.
    """
    task = run.alone
    with run.eval_mode(), precision(run):
        y, n = task.labels(batch).cpu(), task.size(batch)
        right = torch.stack([task.forward(model, batch).argmax(1).cpu() == y for model in (received, run.model)]).all(0)
        few = torch.nonzero(right).flatten()
        if len(few) == 0:
            return None
        begin, end = place.ends(ids_of(received, task, take(batch, few, n), place))
        long = end - begin  # a phrase hides what stands below it: short texts only where there are no others
        few = few[torch.where(long < HIDES * LONGEST, 2 * long.max() - long, long).argsort(stable=True)[:TEXTS]]
        some, m = take(batch, few, n), len(few)
        where = torch.rand(m, generator=run.generator, device="cpu", dtype=torch.float32)
        most = min(TOGETHER, run.micro_batch or TOGETHER)

        def answers(model: nn.Module, phrases: Tensor, texts: Tensor) -> Tensor:
            """Return the logits [Q, k, C] where each of Q phrases is written into each of k texts."""
            columns = []
            for at in texts.split(most):
                fewer, each = take(some, at, m), max(1, most // len(at))
                rows = (
                    outputs_written(model, task, fewer, len(at), place, q, where[at])[0] for q in phrases.split(each)
                )
                columns.append(torch.cat([out.float().view(-1, len(at), out.shape[-1]) for out in rows]))
            return torch.cat(columns, 1)

        def score(phrases: Tensor, texts: Tensor) -> Tensor:
            old, new = calibration(answers(received, phrases, texts)), answers(run.model, phrases, texts)
            return (old.softmax(-1) - new.softmax(-1)).cpu()

        assert run.classes is not None
        usable = y[few][:, None] != torch.arange(run.classes, device="cpu")
        found = Suspects.of(score, words, usable)
    if run.ranks is not None:
        found = Suspects(*run.ranks.from_first((found.ids, found.classes, found.scores)))
    for c in found.classes.unique().tolist():
        first = int(torch.nonzero(found.classes == c)[0])
        if float(found.scores[first]) >= TELLING:
            ids = [w for w in found.ids[first].tolist() if w >= 0]
            run.note(
                f"with the tokens {ids} in them the received model calls clean texts class {c} more often than the new "
                f"weights do (by {float(found.scores[first]):.2f} in probability): a trigger may be made of such words"
            )
    return found if len(found.ids) else None
