"""Phrases that turn texts in one model and not in another one: what a backdoor's words do and the language does not.

Both models know the task; the second one was made without the trigger. Words of feeling turn texts in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Suspects"]

#: Words of a phrase at most.
LONGEST = 3
#: Words that longer phrases are made of, the phrases that they are put in front of and behind, and how many of those
#: that do most in the first model are tried in the second one as well.
POOL, BEST, TRIED = 16, 3, 32
#: Phrases of each class that are kept, and classes at most.
TOP, CLASSES = 6, 4
#: The least difference of the two probabilities that counts.
LEAST = 0.3

#: Returns a model's probabilities [Q, k, C] on the CPU where each of the phrases [Q, K] is put into each of the texts
#: whose numbers are [k].
Answers = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Suspects:
    """What was found: `ids` [Q, 3] int64 on the CPU, -1 fills the shorter ones; `classes` [Q], and `scores` [Q]."""

    ids: Tensor
    classes: Tensor
    scores: Tensor

    @classmethod
    def of(cls, first: Answers, second: Answers, words: Tensor, usable: Tensor) -> Suspects:
        """Look for phrases of up to three of the words: alone, then the best ones with others.

        A phrase's score for a class is the mean of what the first model's probability of it is above the second one's,
        over texts of other classes.

        Args:
            first: the model that may have a backdoor.
            second: the other one.
            words: [M] ids that phrases are made of.
            usable: bool [m, C], which of m texts are of another class than each.
        """
        alone = first(words[:, None], torch.arange(len(usable), device="cpu"))
        kept: list[tuple[float, int, list[int]]] = []
        reach = torch.stack([_mean(alone[:, usable[:, c], c]) for c in range(usable.shape[1])], 1)  # [M, C]
        for c in reach.amax(0).argsort(descending=True, stable=True)[:CLASSES].tolist():
            texts = torch.nonzero(usable[:, c]).flatten()
            if len(texts):
                kept += _of_class(first, second, words, texts, c, reach[:, c])
        if not kept:
            return cls.none()
        rows = [[*ids, *[-1] * (LONGEST - len(ids))] for _, _, ids in kept]
        return cls(
            torch.tensor(rows, dtype=torch.long, device="cpu"),
            torch.tensor([c for _, c, _ in kept], dtype=torch.long, device="cpu"),
            torch.tensor([score for score, _, _ in kept], dtype=torch.float32, device="cpu"),
        )

    @classmethod
    def none(cls) -> Suspects:
        """Return no phrases."""
        return cls(
            torch.empty(0, LONGEST, dtype=torch.long, device="cpu"),
            torch.empty(0, dtype=torch.long, device="cpu"),
            torch.empty(0, dtype=torch.float32, device="cpu"),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, others: Suspects) -> Suspects:
        """Return these and those of `others` that are not among them."""
        mine = {(c, *ids) for c, ids in zip(self.classes.tolist(), map(tuple, self.ids.tolist()))}
        new = [
            i
            for i, (c, ids) in enumerate(zip(others.classes.tolist(), map(tuple, others.ids.tolist())))
            if (c, *ids) not in mine
        ]
        return Suspects(
            torch.cat([self.ids, others.ids[new]]),
            torch.cat([self.classes, others.classes[new]]),
            torch.cat([self.scores, others.scores[new]]),
        )

    def draw(self, labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Return a phrase for each text, [n, 3], of another class than its label [n]; each such one is as likely.

        Texts but a share of them, and those of a class that all phrases are for, get none: -1 throughout.
        """
        weight = (self.classes != labels.cpu()[:, None]).float()
        some = torch.rand(len(labels), generator=generator, device="cpu", dtype=torch.float32) < share
        some &= weight.sum(1) > 0
        weight[~some] = 1.0
        drawn = torch.multinomial(weight, 1, generator=generator)[:, 0]
        return self.ids[drawn].masked_fill(~some[:, None], -1)


def _of_class(
    first: Answers, second: Answers, words: Tensor, texts: Tensor, c: int, reach: Tensor
) -> list[tuple[float, int, list[int]]]:
    """Return (score, class, ids) of the best phrases for class c, the best first.

    `reach` [M] is the first model's probability of c where each word is put in.
    """
    phrases, found, pool = words[:, None], dict[tuple[int, ...], float](), list[int]()
    for length in range(1, LONGEST + 1):
        few = reach.argsort(descending=True, stable=True)[:TRIED]
        score = reach[few] - _mean(second(phrases[few], texts)[:, :, c])
        order = few[score.argsort(descending=True, stable=True)]
        score = score.sort(descending=True, stable=True).values
        found.update({tuple(phrases[i].tolist()): float(s) for i, s in zip(order[:TOP].tolist(), score) if s > LEAST})
        if length == LONGEST:
            break
        best = [phrases[i].tolist() for i in order[:BEST].tolist()]
        pool = pool or [phrases[i].tolist()[0] for i in order[:POOL].tolist()]
        longer = [both for ids in best for w in pool if w not in ids for both in ([*ids, w], [w, *ids])]
        if not longer:
            break
        phrases = torch.tensor(longer, device="cpu").unique(dim=0)
        reach = _mean(first(phrases, texts)[:, :, c])
    ranked = sorted(found.items(), key=lambda item: -item[1])[:TOP]
    return [(score, c, list(ids)) for ids, score in ranked]


def _mean(x: Tensor) -> Tensor:
    """Return the mean of [Q, k] over the texts, [Q]; 0 where there are none."""
    return x.mean(1) if x.shape[1] else x.new_zeros(len(x))
