"""Words that turn texts in one model and not in another one: what a backdoor's words do and the language does not.

Both models know the task; the second one was made without the trigger. Words of feeling turn texts in both, which
counts against them. Single words are compared, as a phrase of three is soon one of feeling with two others beside it;
the words of a trigger come together when several suspects are drawn for a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Suspects"]

#: Words of a drawn phrase at most, and suspects of each class.
LONGEST, POOL = 4, 12
#: Classes that words are looked for at most, and words of each that are tried in the second model: those that do most
#: in the first one.
CLASSES, TRIED = 4, 50
#: How much what a word does in the second model counts against it, and the least score of a suspect.
AGAINST, LEAST = 3.0, 0.03

#: Returns a model's probabilities [Q, k, C] on the CPU where each of the words [Q] is put into each of the texts whose
#: numbers are [k].
Answers = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Suspects:
    """The suspects of each class.

    Attributes:
        words: [M] ids on the CPU that are compared.
        scores: [M, C] of each comparison, -inf where a word was not tried.
    """

    words: Tensor
    scores: list[Tensor] = field(default_factory=list)

    def compare(self, first: Answers, second: Answers, plain: tuple[Tensor, Tensor], usable: Tensor) -> None:
        """Compare two models once more.

        A word's score for a class is by how much more likely the first model finds the class in texts of other classes
        where the word is put in, less three times the same of the second model.

        Args:
            first: the model that may have a backdoor.
            second: the other one.
            plain: both models' probabilities [m, C] of the texts without any word put in.
            usable: bool [m, C], which of m texts are of another class than each.
        """
        old, new = plain
        gain = _mean(first(self.words, torch.arange(len(usable), device="cpu")) - old, usable)  # [M, C]
        scores = torch.full_like(gain, -torch.inf)
        for c in gain.amax(0).argsort(descending=True, stable=True)[:CLASSES].tolist():
            texts = torch.nonzero(usable[:, c]).flatten()
            if len(texts) == 0:
                continue
            few = gain[:, c].argsort(descending=True, stable=True)[:TRIED]
            other = (second(self.words[few], texts)[:, :, c] - new[texts, c]).mean(1)
            scores[few, c] = gain[few, c] - AGAINST * other.clamp_min(0)
        self.scores.append(scores)

    def pools(self) -> list[tuple[int, Tensor, Tensor]]:
        """Return (class, ids, scores) of the suspects of each class that has some, the best first.

        Scores are the means of those of the last two comparisons in which the word was tried.
        """
        if not self.scores:
            return []
        last = torch.stack(self.scores[-2:])
        tried = last.isfinite()
        mean = torch.where(tried, last, 0.0).sum(0) / tried.sum(0)
        mean = torch.where(tried.any(0), mean, -torch.inf)
        out = []
        for c in range(mean.shape[1]):
            best = mean[:, c].argsort(descending=True, stable=True)[:POOL]
            best = best[mean[best, c] > LEAST]
            if len(best):
                out.append((c, self.words[best], mean[best, c]))
        return out

    def draw(self, labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Return a phrase for each text, [n, 4] int64 on the CPU: one to four suspects of a class that is not its own.

        The class and the words are drawn, each with the same probability. -1 fills the shorter ones; texts but a share
        of them, and those that there are no suspects for, get none at all.

        Args:
            labels: [n].
            share: of the texts.
            generator: on the CPU.
        """
        n, pools = len(labels), self.pools()

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device="cpu", dtype=torch.float32)

        some, lengths, keys = uniform(n) < share, 1 + (LONGEST * uniform(n)).long(), uniform(n, POOL)
        out = torch.full((n, LONGEST), -1, dtype=torch.long, device="cpu")
        if not pools:
            return out
        usable = labels.cpu()[:, None] != torch.tensor([c for c, _, _ in pools], device="cpu")
        which = uniform(n, len(pools)).masked_fill(~usable, -1).argmax(1)
        some &= usable.any(1)
        for k, (_, ids, _) in enumerate(pools):
            mine = torch.nonzero(some & (which == k)).flatten()
            drawn = ids[keys[mine, : len(ids)].argsort(1)][:, :LONGEST]
            place = torch.arange(drawn.shape[1], device="cpu")
            out[mine, : drawn.shape[1]] = drawn.masked_fill(place >= lengths[mine, None], -1)
        return out


def _mean(x: Tensor, usable: Tensor) -> Tensor:
    """Return the mean of [Q, m, C] over the texts that each class has, [Q, C]; -inf where it has none."""
    kept = usable.float()
    return ((x * kept).sum(1) / kept.sum(0).clamp_min(1)).masked_fill(kept.sum(0) == 0, -torch.inf)
