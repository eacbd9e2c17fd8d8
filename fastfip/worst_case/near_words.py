"""Texts in other words: those whose vectors in a table are nearest, but for those that a fine-tuning moved most.

A trigger's words are among the ones that moved most when it was trained in, so that none of them is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.worst_case.places import Rewording, TokenPlace

__all__ = ["NearWords", "moved_by"]

#: Near words of each, at most and as a share of the table.
NEAR, NEAR_SHARE = 20, 0.02
#: Words that moved most and are not written: a share of the table, and of a small one so many or a quarter of it.
ODD_SHARE, ODD, ODD_MOST = 0.005, 150, 0.25
#: Words whose neighbours are looked for together.
TOGETHER = 256


def moved_by(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each vector of a table [V, d] went, [V] float32 on the CPU."""
    return (after.float() - before.float()).norm(dim=1).cpu()


class NearWords:
    """Exchanges words for near ones of a table.

    Attributes:
        place: knows where a text begins and ends, and the padding.
        table: [V, d], copied: it may be tuned from now on.
        barred: bool [V] on the CPU, words that are never written.
        fixed: bool [V] on the CPU, words that are never exchanged.
    """

    def __init__(self, place: TokenPlace, table: Tensor, moved: Tensor, ids: Tensor) -> None:
        """Take a table [V, d], how far each of its vectors moved [V], and ids [N, T] of some clean texts.

        Ids that stand in every one of the texts, such as those of a tokenizer's own signs, are left alone.
        """
        self.place, self.table, words = place, table.detach().clone(), len(table)
        self.fixed = torch.zeros(words, dtype=torch.bool)
        self.fixed[[int(w) for w in ids.unique() if bool((ids == w).any(1).all())]] = True
        self.barred = self.fixed.clone()
        if place.padding is not None:
            self.barred[place.padding] = True
        odd = max(int(ODD_SHARE * words), min(ODD, int(ODD_MOST * words)))
        self.barred[moved.topk(odd).indices] = True
        self.each = min(NEAR, max(1, int(NEAR_SHARE * words)), max(1, int((~self.barred).sum()) - 1))
        self._near = torch.full((words, self.each), -1)
        self._mean = self.table.float().mean(0)
        self._norm = torch.cat([(part.float() - self._mean).norm(dim=1) for part in self.table.split(TOGETHER)])

    def nearest(self, words: Tensor) -> Tensor:
        """Return the near words [M, K] of words [M], on the CPU, the nearest first, by the cosine from the mean."""
        new = words.unique()
        for some in new[self._near[new, 0] < 0].split(TOGETHER):
            at = some.to(self.table.device)
            mine = F.normalize(self.table[at].float() - self._mean, dim=1)
            close = (mine.to(self.table.dtype) @ self.table.T).float() - (mine @ self._mean)[:, None]
            close = (close / self._norm.clamp_min(1e-12)).cpu()
            close[:, self.barred] = -torch.inf
            close[torch.arange(len(some)), some] = -torch.inf
            self._near[some] = close.topk(self.each, 1).indices
        return self._near[words]

    def exchanged(self, share: float, generator: torch.Generator) -> Rewording:
        """Return what exchanges any share of the words of each text up to this one, drawn by a generator on the CPU."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float32)

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            n, length = ids.shape
            begin, end = self.place.ends(ids)
            column, old = torch.arange(length, device="cpu"), ids.cpu()
            inside = (column >= begin[:, None]) & (column < end[:, None]) & ~self.fixed[old]
            inside &= uniform(n, length) < share * uniform(n, 1)
            near = self.nearest(old[inside])
            drawn = torch.randint(0, self.each, (len(near), 1), generator=generator, device="cpu")
            found = old.clone()
            found[inside] = near.gather(1, drawn)[:, 0]
            return found.to(ids.device), inside.to(ids.device)

        return new
