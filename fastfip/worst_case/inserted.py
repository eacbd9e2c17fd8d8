"""Words put in between those of a text: what a phrase does there hides nothing of the text.

A layer that looks up words has no room for more of them, so they are put into the batch, where the mask of the padding
is as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.data.batch import Batch, map_batch
from fastfip.data.lengths import token_ids
from fastfip.data.task import Task
from fastfip.worst_case.places import TokenPlace

__all__ = ["Insertion"]


@dataclass(frozen=True)
class Insertion:
    """How words are put into the texts of a batch.

    Attributes:
        place: knows the padding, and where texts begin and end.
        masks: names of the batch's tensors [N, T] that are one at tokens and zero at padding.
        left: whether the padding is in front of the texts.
        tail: 1 where every text ends with the same id, such as [SEP], which stays the last one.
        longest: columns that a batch has at most afterwards.
    """

    place: TokenPlace
    masks: frozenset[str]
    left: bool
    tail: int
    longest: int

    @classmethod
    def of(cls, task: Task, batches: list[Batch], place: TokenPlace, longest: int) -> Insertion | None:
        """Look at batches of clean texts.

        Args:
            task: where the ids are in them.
            batches: as many as there are kinds, such as those with and without padding.
            place: the layer that looks them up.
            longest: columns that the model surely takes.

        Returns:
            None where words cannot be put in: nothing fills the rows, the padding's id is within texts as well, or
            batches have tensors [N, T] beside the ids that are no mask of the padding and not the same throughout, such
            as positions.
        """
        if place.padding is None or not batches:
            return None
        masks: dict[str, bool] = {}
        constants: dict[str, set[float]] = {}
        front, ends = 0, set[int]()
        for batch in batches:
            ids = token_ids(task, batch)
            if ids is None or not bool(_spans(place, ids)[2].all()):
                return None
            shown = ids != place.padding
            front += int((~shown[:, 0]).sum()) - int((~shown[:, -1]).sum())
            longest = max(longest, ids.shape[1])
            ends |= set(ids.gather(1, place.ends(ids)[1][:, None].to(ids.device) - 1)[:, 0].tolist())

            def look(name: str, value: object, ids: Tensor = ids, shown: Tensor = shown) -> object:
                if isinstance(value, Tensor) and value is not ids and value.shape[:2] == ids.shape:
                    same = value.dim() == 2 and bool((value.to(torch.float64) == shown).all())
                    masks[name] = masks.get(name, True) and same
                    one = value.numel() > 0 and bool((value == value.flatten()[0]).all())
                    constants.setdefault(name, set()).add(float(value.flatten()[0]) if one else math.nan)
                return value

            map_batch(look, batch, path="")
        for name, mask in masks.items():
            if not mask and (len(constants[name]) > 1 or math.isnan(next(iter(constants[name])))):
                return None
        own = frozenset(name for name, mask in masks.items() if mask)
        return cls(place, own, front > 0, int(len(ends) == 1), longest)

    @property
    def padding(self) -> int:
        """Return the id that fills the rows."""
        assert self.place.padding is not None
        return self.place.padding

    def pieces(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Return a piece of the text before each of ids [N, T], [N, K] on the CPU; -1 fills the shorter ones.

        Any number of words is as likely, up to those of both texts; of longer pieces half as many as the text itself
        has, and one more, and what it has room for, is taken. `generator` is on the CPU.
        """
        n = len(ids)
        begin, end, whole = _spans(self.place, ids)
        words = torch.where(whole, (end - self.tail - begin).clamp_min(0), 0)
        others = words.roll(1)
        most = torch.minimum(words, others)
        room = self.longest - (ids != self.padding).sum(1).cpu()
        drawn = torch.rand(2, n, generator=generator, device="cpu", dtype=torch.float32)
        width = torch.minimum(1 + (drawn[0] * most).long(), torch.minimum(most, words // 2 + 1))
        width = torch.minimum(width, room).clamp_min(0)
        first = begin.roll(1) + (drawn[1] * (others - width + 1)).long()
        column = torch.arange(max(1, int(width.max())), device="cpu")
        found = ids.roll(1, 0).cpu().gather(1, (first[:, None] + column).clamp(0, ids.shape[1] - 1))
        return found.masked_fill(column >= width[:, None], -1)

    def put(self, task: Task, batch: Batch, phrases: Tensor, share: Tensor) -> tuple[Batch, Tensor]:
        """Put a phrase in between the words of each text that has room for it.

        Args:
            task: where the ids are in the batch.
            batch: N texts of ids [N, T]; left as it is.
            phrases: [N, K] ids on the CPU; -1 fills the shorter ones, at their end.
            share: [N] in [0, 1), where in its text each stands.

        Returns:
            the batch, with more columns where they are needed, and bool [N] on the CPU, which texts have their phrase.
        """
        ids = task.inputs(batch)
        n, length = ids.shape
        padding = self.padding
        begin, end, whole = _spans(self.place, ids)
        width = (phrases >= 0).sum(1)
        tokens = (ids != padding).sum(1).cpu()
        done = whole & (width > 0) & (tokens + width <= self.longest)
        width = torch.where(done, width, 0)
        # Columns are added where the padding is, and texts stay where they were but for the words after the phrase.
        more = max(0, int((tokens + width).max()) - length)
        at = begin + (share * (end - begin - self.tail + 1).clamp_min(1)).long() + (more if self.left else 0)
        column = torch.arange(length + more, device="cpu")
        moved = at - width if self.left else at  # where the phrase begins
        into = column - moved[:, None]
        inside = (into >= 0) & (into < width[:, None])
        if self.left:
            source = torch.where(column < moved[:, None], column + width[:, None], column)
        else:
            source = torch.where(into >= width[:, None], column - width[:, None], column)
        source, inside = source.clamp(0, length + more - 1).to(ids.device), inside.to(ids.device)
        words = phrases.gather(1, into.clamp(0, phrases.shape[1] - 1)).to(ids.device, ids.dtype)
        new = torch.where(inside, words, self._wider(ids, more, padding).gather(1, source))

        def changed(name: str, value: object) -> object:
            if value is ids:
                return new
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != ids.shape:
                return value
            if name in self.masks:
                return (new != padding).to(value.dtype)
            first = value[:, :1]  # the same throughout
            return torch.cat([value, first.expand(-1, more, *first.shape[2:])], 1)

        return map_batch(changed, batch, path=""), done

    def _wider(self, ids: Tensor, more: int, padding: int) -> Tensor:
        return F.pad(ids, (more, 0) if self.left else (0, more), value=padding)


def _spans(place: TokenPlace, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each text of ids [N, T] begins, behind a first token that is always the same, and where it ends.

    And bool [N], which texts are in one piece and not empty; all on the CPU.
    """
    assert place.padding is not None
    begin, end = place.ends(ids)
    tokens = (ids != place.padding).sum(1).cpu()
    return begin, end, (tokens > 0) & (end - begin + place.head == tokens)
