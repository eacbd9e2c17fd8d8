"""Texts of like lengths together, and no column that is padding in all texts of a batch.

In a random batch of sentences about half of what a transformer computes is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastfip.data.batch import Batch, map_tensors
from fastfip.data.task import Task
from fastfip.errors import DataError

__all__ = ["Padding", "alike", "columns_held", "columns_of", "token_ids"]

#: Batches whose samples are sorted by their lengths together. More save hardly anything, and leave less to chance.
POOL = 8


@dataclass(frozen=True)
class Padding:
    """How rows of token ids are filled up.

    Attributes:
        token: the id that fills them.
        cuts: whether the model answers the same without columns that are padding in all rows, so that `cut` takes them
            away.
    """

    token: int
    cuts: bool = False

    def lengths(self, task: Task, batch: Batch) -> Tensor | None:
        """Return how many tokens of each sample are no padding, int64 [N] on the CPU; None: there are no ids [N, T]."""
        ids = token_ids(task, batch)
        return None if ids is None else (ids != self.token).sum(1).cpu()

    def cut(self, task: Task, batch: Batch) -> Batch:
        """Return the batch without the columns at its ends that are padding in all rows; the given one stays."""
        ids = token_ids(task, batch) if self.cuts else None
        if ids is None:
            return batch
        n, length = ids.shape
        begin, end = columns_held(ids, self.token)
        return batch if (begin, end) == (0, length) else columns_of(batch, n, length, begin, end)


def columns_held(ids: Tensor, padding: int) -> tuple[int, int]:
    """Return the first column of ids [N, T] that is not padding in all rows, and the one after the last such.

    Where all is padding these are the first column of all and the one after the last.
    """
    held = torch.nonzero((ids != padding).any(0)).flatten()
    return (0, ids.shape[1]) if len(held) == 0 else (int(held[0]), int(held[-1]) + 1)


def columns_of(batch: Batch, n: int, length: int, begin: int, end: int) -> Batch:
    """Return a batch with some columns of each of its tensors [N, T, ...]: ids, masks, labels of tokens."""
    return map_tensors(lambda t: t[:, begin:end] if t.dim() > 1 and t.shape[:2] == (n, length) else t, batch)


def alike(index: Tensor, lengths: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Return samples in an order in which those of like lengths come together, in batches of `size`.

    What is left over for a last, smaller batch stays as it is: it would be the longest ones otherwise.

    Args:
        index: [n] samples in an order drawn before.
        lengths: [m], of sample number `index[i]` at that place.
        size: of a batch. Of each eight batches the samples are sorted, and the batches are drawn.
        generator: on the CPU.
    """
    full = len(index) // size * size
    out = []
    for pool in index[:full].split(POOL * size):
        batches = pool[lengths[pool].argsort(stable=True)].view(-1, size)
        out.append(batches[torch.randperm(len(batches), generator=generator, device="cpu")].flatten())
    return torch.cat([*out, index[full:]])


def token_ids(task: Task, batch: Batch) -> Tensor | None:
    """Return the inputs of a batch if they are whole numbers [N, T]; None: they are something else."""
    try:
        x = task.inputs(batch)
    except DataError:
        return None
    return x if x.dim() == 2 and not x.is_floating_point() and x.dtype != torch.bool else None
