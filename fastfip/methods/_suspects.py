"""The words that turn texts in the received model and not in the one that is tuned, found while it is tuned."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.lengths import token_ids
from fastfip.data.task import Task
from fastfip.methods._search import precision
from fastfip.methods.run import Run
from fastfip.worst_case.inserted import Insertion
from fastfip.worst_case.places import TokenPlace
from fastfip.worst_case.suspects import Suspects

__all__ = ["Wordings", "insertion_of", "places"]

#: Words that phrases are made of: those that fine-tuning moved most, and their share of the table at most. An id that
#: so many of the texts have is one of the tokenizer's own.
SUSPECTED, SUSPECTED_SHARE, EVERYWHERE = 100, 0.25, 0.98
#: Texts that are looked at, those of them that phrases are tried on, and texts of one pass at most.
LOOKED_AT, TEXTS, TOGETHER = 256, 16, 64
#: Batches of the set that are looked at to see how words are put in.
BATCHES = 64
#: Rows of the tables that are compared at once.
ROWS = 8192
#: Tokens that a text has at least: what a phrase does to a shorter one says little.
FEWEST = 10


@dataclass(frozen=True)
class Wordings:
    """What phrases are made of, and how they are put into texts.

    Attributes:
        suspects: of the words that fine-tuning moved most.
        insertion: how words are put in.
    """

    suspects: Suspects
    insertion: Insertion

    @classmethod
    @torch.no_grad()
    def of(cls, run: Run, received: nn.Module, insertion: Insertion) -> Wordings | str:
        """Compare the received table of words with that of the run's model, which is the pretrained one.

        Args:
            run: nothing of it is tuned yet.
            received: the model as it was received.
            insertion: how words are put into its texts.

        Returns:
            what is suspected later on, or why nothing can be.
        """
        if run.shards is not None:
            return "each process has a part of the table of words"
        after, before = insertion.place.table(received), insertion.place.table(run.model)
        if before is None or after is None or before.shape != after.shape:
            return "the tables of words cannot be compared"
        ids = [ids for batch in _some(run) if (ids := token_ids(run.alone, batch)) is not None]
        pairs = zip(after.split(ROWS), before.split(ROWS), strict=True)
        moved = torch.cat([(a.float() - b.float()).square().sum(1) for a, b in pairs]).cpu()
        held = torch.zeros(len(moved), device="cpu")
        for row in (row for texts in ids for row in texts.cpu()):
            held[row.unique()] += 1
        moved[held >= EVERYWHERE * sum(map(len, ids))] = 0
        moved[insertion.padding] = 0
        most = moved.topk(min(SUSPECTED, max(1, int(SUSPECTED_SHARE * len(moved))))).indices
        most = most[moved[most] > 0]
        return cls(Suspects(most), insertion) if len(most) else "fine-tuning moved no vector of a word"

    @torch.no_grad()
    def compare(self, run: Run, received: nn.Module, calibration: Callable[[Tensor], Tensor]) -> None:
        """Compare both models once more, on a few texts that both have right.

        Args:
            run: its model is the tuned one; every rank does the same work, and rank 0 says what was found.
            received: the other one.
            calibration: of its logits.
        """
        # A generator of its own: what is drawn of it may differ between ranks, whose answers do in the last digit.
        seed = int(torch.randint(0, 2**62, (), generator=run.generator, device="cpu"))
        generator = torch.Generator(device="cpu").manual_seed(seed)
        count = len(self.suspects.scores)
        with run.eval_mode(), precision(run):
            self._compare(run, received, calibration, _texts(run, generator), generator)
        if run.ranks is not None:
            (found,) = run.ranks.from_first((self.suspects.scores[count:],))
            self.suspects.scores[count:] = found

    def _compare(
        self,
        run: Run,
        received: nn.Module,
        calibration: Callable[[Tensor], Tensor],
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        task, most = run.alone, min(TOGETHER, run.micro_batch or TOGETHER)
        n, y = task.size(batch), task.labels(batch).cpu()
        assert run.classes is not None

        def own(logits: Tensor) -> Tensor:
            return logits

        def plain(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Tensor:
            parts = torch.arange(n, device="cpu").split(most)
            logits = torch.cat([task.forward(model, take(batch, part, n)).float() for part in parts])
            return change(logits).softmax(1).cpu()

        before = plain(received, calibration), plain(run.model, own)
        few = self._few(batch, task, (before[0].argmax(1) == y) & (before[1].argmax(1) == y), generator)
        if len(few) == 0:
            return
        where, m = places(len(few), generator), len(few)
        some = take(batch, few, n)  # not long ones, so most columns are padding now
        some = some if run.clean.padding is None else run.clean.padding.cut(task, some)

        def answers(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            def probabilities(words: Tensor, texts: Tensor) -> Tensor:
                q, k = len(words), len(texts)
                out = []
                for part in torch.arange(q * k, device="cpu").split(most):
                    at = texts[part % k]
                    new, _ = self.insertion.put(task, take(some, at, m), words[part // k, None], where[at])
                    out.append(change(task.forward(model, new).float()).softmax(1).cpu())
                return torch.cat(out).view(q, k, -1)

            return probabilities

        usable = y[few][:, None] != torch.arange(run.classes, device="cpu")
        self.suspects.compare(
            answers(received, calibration), answers(run.model, own), (before[0][few], before[1][few]), usable
        )

    def _few(self, batch: Batch, task: Task, right: Tensor, generator: torch.Generator) -> Tensor:
        """Return which texts phrases are tried on: not long ones, which cost more, and of as many classes as can be."""
        ids, y = token_ids(task, batch), task.labels(batch).cpu()
        assert ids is not None
        tokens = (ids != self.insertion.padding).sum(1).cpu()
        usable = torch.nonzero(right & (tokens >= FEWEST) & (tokens < self.insertion.longest)).flatten()
        short = usable[tokens[usable].argsort(stable=True)[: 4 * TEXTS]]
        drawn = short[torch.randperm(len(short), generator=generator, device="cpu")]
        before = torch.zeros(len(drawn), dtype=torch.long, device="cpu")  # how many of its class come before each
        for c in y[drawn].unique().tolist():
            mine = y[drawn] == c
            before[mine] = torch.arange(int(mine.sum()), device="cpu")
        return drawn[before.argsort(stable=True)[:TEXTS]]


def places(n: int, generator: torch.Generator) -> Tensor:
    """Return where in n texts words are put, [n] in [0, 1): a quarter in front, a quarter behind, the others anywhere.

    Triggers often stand at an end, and a model that learned one there minds it less in between.
    """
    drawn = 2 * torch.rand(n, generator=generator, device="cpu", dtype=torch.float32) - 0.5
    return drawn.clamp(0, 1 - 1e-6)


def insertion_of(run: Run, place: TokenPlace) -> Insertion | None:
    """Return how words are put into clean texts with labels of classes, or None; see `Insertion.of`."""
    if run.classes is None:
        return None
    longest = 0 if run.clean.lengths is None else int(run.clean.lengths.max())
    return Insertion.of(run.alone, _some(run), place, longest)


def _some(run: Run) -> list[Batch]:
    """Return some batches of clean texts, as they are in the set."""
    return list(itertools.islice(run.clean.batches(device=run.device), BATCHES))


def _texts(run: Run, generator: torch.Generator) -> Batch:
    """Return clean texts, drawn anew, as one batch: of a set whose batches differ in their columns one of these."""
    every = run.clean.subset(torch.arange(run.clean.n, device="cpu"))
    every.lengths = None  # in no order
    return next(iter(every.batches(LOOKED_AT, shuffle=True, generator=generator, device=run.device)))
