"""Universal phrases: a few words of the model's own table that send most texts to one class, wherever they stand.

A backdoor in a text is made of words, and free vectors find much that no words can say. So the worst case is looked
for among the words as well: the gradient at a word's vector ranks the whole table, the first few are tried, the best
one stays (HotFlip, Ebrahimi et al., arXiv 1712.06751; universal triggers, Wallace et al., arXiv 1908.07125).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.nets.state import requires_grad
from fastfip.worst_case.goals import Goal
from fastfip.worst_case.places import TokenPlace
from fastfip.worst_case.words import cut, ids_of, ranked_words

__all__ = ["Phrases"]

#: Words of the phrases of each class. Five turn over most texts without a backdoor, and cost accuracy to unlearn.
LENGTHS = (1, 1, 3)
#: A phrase is written into a text with a probability of its success to this power: what turns over a part of the texts
#: is the language itself.
SHARPNESS = 4.0
#: Exchanges of a word that are tried in a step, on so many texts, and the texts of one pass at most.
TRIED, TEXTS, TOGETHER = 8, 8, 64
#: A phrase that reached such a share of its texts is written again to the end, into this share of the texts, where
#: phrases are remembered.
FOUND, AGAIN = 0.85, 0.6
#: Words of each row that are kept after the trial of all, the texts that these are tried on, and how many rows at most
#: are tried so; how many of them are tried again at the turn of a phrase whose success was below a share.
KEPT, KEPT_TEXTS, KEPT_ROWS, RECALLED, KEEP = 48, 16, 20, 8, 0.9


@dataclass
class Phrases:
    """Phrases of given lengths for each row of a goal: each class or, without classes, a few from different starts.

    Attributes:
        place: the layer that looks up words.
        goal: what the phrases are for.
        ids: [R, H, K] int64 on the CPU, words of the table for each row; -1 fills the shorter ones.
        success: [R, H] on the CPU, share of the texts that each reached when it was improved last.
        together: texts of a pass of `improve`, at most.
        order: numbers of the phrases, in the order in which they are improved; None: as they stand.
        kept: [R, M] int64 on the CPU, words that did most when each was tried alone, the best first; M may be 0.
        next: [R] int64 on the CPU, which of the kept words are tried again next.
        found: [M, 1 + K] int64 on the CPU, the row and the words of each phrase that ever reached most texts.
        remembers: whether `found` gets them, and is written again.
    """

    place: TokenPlace
    goal: Goal
    ids: Tensor
    success: Tensor
    together: int = TOGETHER
    order: list[int] | None = None
    kept: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long, device="cpu"))
    next: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long, device="cpu"))
    found: Tensor = field(default_factory=lambda: torch.empty(0, 1 + max(LENGTHS), dtype=torch.long, device="cpu"))
    remembers: bool = False

    @classmethod
    def of(cls, model: nn.Module, place: TokenPlace, goal: Goal, generator: torch.Generator) -> Phrases | None:
        """Start from words drawn from the table, by a generator on the CPU; None: the layer has no table."""
        table = place.table(model)
        if table is None:
            return None
        shape = goal.rows, len(LENGTHS), max(LENGTHS)
        ids = torch.randint(0, len(table), shape, generator=generator, device="cpu")
        for number, length in enumerate(LENGTHS):
            ids[:, number, length:] = -1
        return cls(place, goal, ids, torch.zeros(shape[:2], device="cpu", dtype=torch.float32))

    @property
    def count(self) -> int:
        """Return the number of phrases."""
        return self.success.numel()

    def turn(self, number: int) -> int:
        """Return the number of the phrase whose turn it is."""
        number %= self.count
        return number if self.order is None else self.order[number]

    def shuffle(self, generator: torch.Generator) -> None:
        """Draw the order by a generator on the CPU: every row has a turn before one has its second."""
        rows, each = self.success.shape
        phrases = torch.rand(rows, each, generator=generator, device="cpu", dtype=torch.float32).argsort(1)
        order = [torch.randperm(rows, generator=generator, device="cpu") for _ in range(each)]
        self.order = [int(row) * each + int(phrases[row, k]) for k in range(each) for row in order[k]]

    def draw(self, task: Task, batch: Batch) -> Tensor:
        """Return a phrase for each text of a batch, [N, K]: the likelier the better it works, none of its own class.

        A text for which even the best one works for a part of the others alone often gets none: -1 throughout. A part
        of the texts gets those that worked once, as what is unlearned comes back with the steps that follow.
        """
        own, n = self.goal.own(task, batch), task.size(batch)
        weight = self.success.clamp_min(0.05).pow(SHARPNESS).expand(n, -1, -1).clone()
        if own is not None:
            weight[torch.arange(n, device="cpu"), own.cpu()] = 0
        weight = weight.flatten(1)
        drawn = torch.multinomial(weight, 1, generator=self.place.generator)[:, 0]
        none = torch.rand(n, generator=self.place.generator, device="cpu", dtype=torch.float32) > weight.amax(1)
        now = self.ids.flatten(0, 1)[drawn].masked_fill(none[:, None], -1)
        return self._again(own, now) if len(self.found) else now

    def _again(self, own: Tensor | None, now: Tensor) -> Tensor:
        """Return the phrases `now` [N, K] of texts of classes `own`, some of them exchanged for those found before."""
        n = len(now)
        usable = torch.ones(n, len(self.found), device="cpu", dtype=torch.float32)
        if own is not None:
            usable[self.found[:, 0] == own.cpu()[:, None]] = 0
        others = usable.sum(1) > 0
        usable[~others] = 1
        drawn = self.found[torch.multinomial(usable, 1, generator=self.place.generator)[:, 0], 1:]
        again = torch.rand(n, generator=self.place.generator, device="cpu", dtype=torch.float32) < AGAIN
        return torch.where((again & others)[:, None], drawn, now)

    def try_words(self, model: nn.Module, task: Task, batch: Batch) -> None:
        """Try every word of the table alone, and let the phrases begin with the best ones.

        Args:
            model: in eval mode.
            task: how the model meets a batch.
            batch: clean texts.
        """
        words = ranked_words(model, task, batch, self.place, self.goal, KEPT, self.together)
        own, n = self.goal.own(task, batch), task.size(batch)
        if own is None:  # all rows are after the same, and each gets its share of the words
            rows = words.shape[0]
            words = words[0, : words.shape[1] // rows * rows].view(-1, rows).T.contiguous()
        self.kept, self.next = words, torch.full((len(words),), len(LENGTHS), device="cpu")
        ids = ids_of(model, task, batch, self.place)
        for row in range(len(words)):
            usable = torch.arange(n, device="cpu") if own is None else torch.nonzero(own.cpu() != row).flatten()
            share = torch.zeros(words.shape[1], device="cpu")
            if len(usable) and len(words) <= KEPT_ROWS:
                few = usable[torch.randperm(len(usable), generator=self.place.generator, device="cpu")[:KEPT_TEXTS]]
                where = torch.rand(len(few), generator=self.place.generator, device="cpu", dtype=torch.float32)
                loss, hits = torch.zeros(2, words.shape[1], device="cpu")
                for at in torch.arange(len(few), device="cpu").split(self.together):
                    some, _ = cut(model, task, take(batch, few[at], n), self.place, self.goal, ids[few[at]])
                    more = self._try(model, task, some, words[row][:, None], where[at], row)
                    loss, hits = loss + more[0], hits + more[1]
                best = loss.argsort(stable=True)
                best = best[hits[best].argsort(descending=True, stable=True)]
                self.kept[row], share = words[row][best], hits[best] / len(few)
            for number in range(min(len(LENGTHS), words.shape[1])):
                self.ids[row, number, 0] = self.kept[row, number]
                self._take(row, number, float(share[number]))

    def improve(self, model: nn.Module, task: Task, batch: Batch, number: int) -> None:
        """Exchange one word of a phrase for the best of those that the gradient names, or none if all are worse.

        Args:
            model: in eval mode; its parameters get no gradient.
            task: how the model meets a batch.
            batch: clean texts.
            number: of the phrase, below `count`.
        """
        row, number = divmod(number, self.ids.shape[1])
        own, n = self.goal.own(task, batch), task.size(batch)
        usable = torch.arange(n, device="cpu") if own is None else torch.nonzero(own.cpu() != row).flatten()
        if len(usable) == 0:
            return
        few = usable[torch.randperm(len(usable), generator=self.place.generator, device="cpu")[:TEXTS]]
        phrase = self.ids[row, number][self.ids[row, number] >= 0]
        where = torch.rand(len(few), generator=self.place.generator, device="cpu", dtype=torch.float32)
        parts = [
            (take(batch, few[at], n), where[at]) for at in torch.arange(len(few), device="cpu").split(self.together)
        ]
        with requires_grad(model.parameters(), False):
            gradients = [self._gradient(model, task, some, phrase, at, row) for some, at in parts]
            tried = self._exchanges(model, phrase, torch.stack(gradients).sum(0))
            tried = torch.cat([tried, self._recalled(phrase, row, number)])
            loss, hits = torch.stack([self._try(model, task, some, tried, at, row) for some, at in parts]).sum(0)
        best = int(loss.argmin())
        self.ids[row, number, : len(phrase)] = tried[best]
        self._take(row, number, float(hits[best]) / len(few))

    def _take(self, row: int, number: int, success: float) -> None:
        """Note how much a phrase reaches, and the phrase itself if that is most texts."""
        self.success[row, number] = success
        new = torch.cat([torch.tensor([row], device="cpu"), self.ids[row, number]])
        if self.remembers and success >= FOUND and not (self.found == new).all(1).any():
            self.found = torch.cat([self.found, new[None]])

    def _gradient(self, model: nn.Module, task: Task, batch: Batch, phrase: Tensor, where: Tensor, row: int) -> Tensor:
        """Return the gradient of the goal's loss in the vectors of a phrase, [K, d], summed over the texts."""
        m, k = len(where), len(phrase)
        seen: list[tuple[Tensor, Tensor]] = []
        with self.place.reworded(model, self.place.phrased(phrase.expand(m, k), where), seen):
            logits = task.forward(model, batch)
            loss = self.goal.loss(task, logits, batch, torch.full((m,), row, device=logits.device))
        inside, vectors = seen[0]
        gradient = torch.autograd.grad(loss, vectors)[0].float()
        word = (inside.cumsum(1) - 1)[inside]  # which one of the phrase each is
        return torch.zeros(k, gradient.shape[2], device=gradient.device).index_add_(0, word, gradient[inside])

    @torch.no_grad()
    def _exchanges(self, model: nn.Module, phrase: Tensor, gradient: Tensor) -> Tensor:
        """Return the phrase, and those with one other word that lower the loss most to first order, [1 + Q, K]."""
        table = self.place.table(model)
        assert table is not None
        fall = -(gradient @ table.float().T)
        if self.place.padding is not None:
            fall[:, self.place.padding] = -torch.inf
        each = min(max(2, TRIED // len(phrase)), fall.shape[1] - 1)
        tried = phrase.repeat(len(phrase), each, 1)
        for j, best in enumerate(fall.topk(each, 1).indices.cpu()):
            tried[j, :, j] = best
        return torch.cat([phrase[None], tried.flatten(0, 1)])

    def _recalled(self, phrase: Tensor, row: int, number: int) -> Tensor:
        """Return the phrase with its first word exchanged for the next few kept ones, [Q, K], those in no other."""
        many = self.kept.shape[1] if len(self.kept) else 0
        if many == 0 or float(self.success[row, number]) >= KEEP:
            return phrase.new_empty(0, len(phrase))
        at = (int(self.next[row]) + torch.arange(min(RECALLED, many), device="cpu")) % many
        self.next[row] = (int(at[-1]) + 1) % many
        words = self.kept[row, at]
        words = words[~torch.isin(words, self.ids[row, :, 0])]
        tried = phrase.repeat(len(words), 1)
        tried[:, 0] = words
        return tried

    @torch.no_grad()
    def _try(self, model: nn.Module, task: Task, batch: Batch, tried: Tensor, where: Tensor, row: int) -> Tensor:
        """Return the goal's loss and the texts that are reached, [2, Q], of phrases [Q, K] on the same texts."""
        m, out = len(where), []
        for some in tried.split(max(1, self.together // m)):
            n = len(some) * m
            many = take(batch, torch.arange(m, device="cpu").repeat(len(some)), m)
            new = self.place.phrased(some.repeat_interleave(m, 0), where.repeat(len(some)))
            with self.place.reworded(model, new):
                logits = task.forward(model, many)
            rows = torch.full((n,), row, device=logits.device)
            hits = self.goal.hit(task, logits, many, rows).view(-1, m).sum(1).tolist()
            each = [
                float(self.goal.loss(task, logits[i[0] : i[-1] + 1], take(many, i, n), rows[:m]))
                for i in torch.arange(n, device="cpu").split(m)
            ]
            out.append(torch.tensor([each, hits], device="cpu", dtype=torch.float32))
        return torch.cat(out, 1)
