"""The clean samples as the classifier sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Task
from fastfip.errors import DataError
from fastfip.methods._classifier import LastLayer, recorded
from fastfip.methods.base import Run

__all__ = ["FeatureSet"]


class FeatureSet(CleanSet):
    """Clean samples as the classifier sees them: batches (features [N, m + 1], labels, the samples themselves).

    The last entry is there only where the user's `loss=` needs it. With several views of each sample (a loader that
    augments), every shuffled pass walks the next view.
    """

    @classmethod
    def cached(cls, run: Run, clean: CleanSet, last: LastLayer, task: Task, views: int = 1) -> FeatureSet:
        """Run the clean samples through the net, `views` times, in eval mode.

        Args:
            run: its model, and its task for the samples.
            clean: the samples.
            last: where the features are read.
            task: the task of the features.
            views: passes over the samples, each with an augmentation of its own.
        """
        batches: list[Batch] = []
        for _ in range(views):
            for batch in clean.batches(device=run.device):
                with run.eval_mode(), torch.no_grad(), recorded({"": last.layer}) as seen:
                    run.forward(batch)
                h = last.features(seen[""][0])
                more = () if run.task.loss_hook is None else (batch,)
                batches.append((h, _labels(run.task, batch, h), *more))
        cached = CleanSet.of(batches, task)
        out = cls(cached._store, cached._index, cached.labels, clean.batch_size, task)
        out.views = [cached.subset(part) for part in torch.arange(cached.n, device="cpu").chunk(views)]
        out._index, out.turn = out.views[0]._index, -1
        return out

    views: list[CleanSet]
    turn: int

    def order(
        self,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        smallest: int = 1,
    ) -> list[list[int]]:
        """Return the batches of one pass over one view."""
        if shuffle:
            self.turn = (self.turn + 1) % len(self.views)
        size = self.batch_size if batch_size is None else batch_size
        return self.views[max(0, self.turn)].order(size, shuffle=shuffle, generator=generator, smallest=smallest)


def _labels(task: Task, batch: Batch, h: Tensor) -> Tensor:
    try:
        return task.labels(batch)
    except DataError:
        return torch.zeros(len(h), device=h.device)
