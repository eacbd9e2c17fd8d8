"""Phrases that turn texts in one model and not in another one: what a backdoor's words do and the language does not.

Both models know the task; the second one was made without the trigger. Words of feeling turn texts in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Suspects"]

#: A text has to have so many times the words of a phrase that is written over its own.
HIDES = 4
#: Words of a phrase at most; phrases and words of each length that longer ones are made of; those that are kept of each
#: class, and how many classes at most are looked for.
LONGEST, BEST, POOL, TOP, CLASSES = 3, 4, 24, 10, 4
#: The least difference of the two probabilities that counts.
LEAST = 0.1

#: Returns, for phrases [Q, K] and numbers of texts [k], by how much more the first model answers each class than the
#: second one where a phrase is written into a text, [Q, k, C].
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Suspects:
    """What was found: `ids` [Q, K] int64 on the CPU, -1 fills the shorter ones; `classes` [Q], and `scores` [Q]."""

    ids: Tensor
    classes: Tensor
    scores: Tensor

    @classmethod
    def of(cls, score: Score, words: Tensor, usable: Tensor) -> Suspects:
        """Look for phrases of up to three of the words: alone, then the best ones with others.

        Args:
            score: tries phrases on m texts.
            words: [M] that phrases are made of.
            usable: bool [m, C], of which texts each class is looked for: those of others.
        """
        ids, all_texts = words[:, None], torch.arange(len(usable), device="cpu")
        alone = _means(score(ids, all_texts), usable)
        found: list[tuple[float, int, list[int]]] = []
        for c in alone.amax(0).argsort(descending=True)[:CLASSES].tolist():
            best, values, texts = ids, alone[:, c], torch.nonzero(usable[:, c]).flatten()
            if len(texts) == 0:
                continue
            pool = words[values.argsort(descending=True, stable=True)[:POOL]].tolist()
            for length in range(1, LONGEST + 1):
                order = values.argsort(descending=True, stable=True).tolist()
                found += [(float(values[i]), c, best[i].tolist()) for i in order[:TOP] if float(values[i]) > LEAST]
                longer = [[*best[i].tolist(), w] for i in order[:BEST] for w in pool if w not in best[i].tolist()]
                if length == LONGEST or not longer:
                    break
                best = torch.tensor(longer, device="cpu")
                values = score(best, texts)[:, :, c].mean(1)
        kept = [item for c in {item[1] for item in found} for item in sorted(f for f in found if f[1] == c)[-TOP:]]
        kept.sort(reverse=True)
        rows = [[*ids, *[-1] * (LONGEST - len(ids))] for _, _, ids in kept]
        return cls(
            torch.tensor(rows, dtype=torch.long, device="cpu").view(-1, LONGEST),
            torch.tensor([c for _, c, _ in kept], dtype=torch.long, device="cpu"),
            torch.tensor([value for value, _, _ in kept], dtype=torch.float32, device="cpu"),
        )

    def draw(self, n: int, share: float, generator: torch.Generator) -> Tensor:
        """Return a phrase for each of n texts, [n, K]; -1 throughout in those but a share of them.

        Every class is as likely, and its phrases in proportion to their scores squared.
        """
        total = torch.zeros(1 + int(self.classes.max()), device="cpu").index_add_(0, self.classes, self.scores.square())
        weight = self.scores.square() / total[self.classes]
        drawn = torch.multinomial(weight, n, replacement=True, generator=generator)
        none = torch.rand(n, generator=generator, device="cpu", dtype=torch.float32) >= share
        return self.ids[drawn].masked_fill(none[:, None], -1)


def _means(scores: Tensor, usable: Tensor) -> Tensor:
    """Return the mean of [Q, m, C] over the texts that each class has, [Q, C]; -1 where it has none."""
    kept = usable.float()
    mean = (scores * kept).sum(1) / kept.sum(0).clamp_min(1)
    return mean.masked_fill(kept.sum(0) == 0, -1.0)
