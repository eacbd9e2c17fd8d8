"""How a model and a batch meet where several processes share each batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from fastfip.data.batch import Batch, float32_batch, map_tensors, take
from fastfip.data.cleanset import CleanSet
from fastfip.data.fingerprint import of_values
from fastfip.data.task import Forward, Loss, Task
from fastfip.errors import DataError
from fastfip.nets.ranks import Ranks

__all__ = ["RankTask", "joined", "loader_like", "whole_loader"]


@dataclass(frozen=True)
class RankTask(Task):
    """A task whose passes are divided: each rank runs its rows of a batch, and all get the outputs of all rows.

    So what is computed of the outputs is the same on every rank, and as in one process. A gradient reaches the own
    rows only; what is tuned has to be summed over the ranks (`Ranks.sum_`). A batch of fewer samples than there are
    ranks is run by each of them as a whole. `most` is what one rank has go through the model together.
    """

    ranks: Ranks = field(kw_only=True)

    @property
    def alone(self) -> Task:
        """Return the task of this process alone."""
        return Task(self.forward_hook, self.loss_hook, self.most)

    def in_float32(self) -> Task:
        """Return the task for a model in float32 whose batches are of lower precision."""
        plain = replace(self.alone, most=None)
        hook: Forward = lambda model, batch: plain.forward(model, float32_batch(batch))  # noqa: E731
        return RankTask(hook, self.loss_hook, self.most, ranks=self.ranks)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of the whole batch, of which this rank has computed its rows."""
        n = self.size(batch)
        return self._of_all(self._pass(model, self.mine(batch, n), n), n)

    def losses(self, model: nn.Module, batch: Batch, loss: Loss | None = None) -> Tensor:
        """Return the loss of each sample of the whole batch, [N]: only losses cross the wire."""
        n, loss = self.size(batch), self.alone.loss if loss is None else loss
        mine = self.mine(batch, n)
        return self._of_all(loss(self._pass(model, mine, n), mine), n)

    def _pass(self, model: nn.Module, mine: Batch, n: int) -> Tensor:
        with contextlib.nullcontext() if self.ranks.rows(n) is None else self.ranks.norms():
            return self.alone.forward(model, mine)

    def _of_all(self, values: Tensor, n: int) -> Tensor:
        """Return what the ranks have of their rows, one or (tokens, say) several values for each, for all n rows."""
        rows = self.ranks.rows(n)
        mine = n if rows is None else rows.stop - rows.start
        if not values.dim() or len(values) % mine:
            raise DataError(f"{mine} samples gave values of shape {list(values.shape)}: processes cannot share a batch")
        whole = self.ranks.gathered(values.reshape(mine, len(values) // mine, *values.shape[1:]), n)
        return whole.reshape(-1, *values.shape[1:])

    def rows(self, n: int) -> slice:
        """Return which of n samples this rank runs."""
        return self.ranks.rows(n) or slice(None)

    def mine(self, batch: Batch, n: int | None = None) -> Batch:
        """Return this rank's rows of a batch; the batch itself where there are fewer rows than ranks."""
        n = self.size(batch) if n is None else n
        rows = self.ranks.rows(n)
        return batch if rows is None else take(batch, torch.arange(rows.start, rows.stop, device="cpu"), n)


def whole_loader(data: Any, ranks: Ranks) -> Any:
    """Return a loader of the whole data set in place of one whose `DistributedSampler` gives this rank a part of it.

    Its batches are those of all ranks together.
    """
    if type(data) is not DataLoader or not isinstance(data.sampler, DistributedSampler):
        return data
    return loader_like(data, data.dataset, batch_size=(data.batch_size or 1) * ranks.world)


def loader_like(data: Any, dataset: Any, **order: Any) -> DataLoader[Any]:
    """Return a plain loader that reads a data set as another loader does: by its workers and with its collator.

    Args:
        data: a DataLoader, or what has the attributes of one.
        dataset: what is read.
        **order: what DataLoader takes for the order and the size of batches.
    """
    workers: dict[str, Any] = {}
    if data.num_workers > 0:
        workers = {
            "prefetch_factor": data.prefetch_factor,
            "multiprocessing_context": data.multiprocessing_context,
        }
    return DataLoader(
        dataset,
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        **workers,
        **order,
    )


def joined(clean: CleanSet, ranks: Ranks, task: Task) -> tuple[CleanSet, bool]:
    """Return the clean set of all ranks, and whether it was joined of parts.

    Where every rank was given the same samples they are the set. Where each was given a part, in memory, the parts are
    joined in the order of the ranks; they may be of different lengths.

    Raises:
        DataError: the ranks have different samples behind loaders, which read them anew in each pass.
    """
    everyone = ranks.objects((clean.n, clean.live, _sketch(clean)))
    if all(other == everyone[0] for other in everyone):
        return clean, False
    if any(live for _, live, _ in everyone):
        raise DataError(
            "the ranks of the process group have different clean samples behind their loaders: give each the whole "
            "data set, or a DataLoader with a DistributedSampler"
        )
    parts = ranks.objects(list(clean.batches()))
    whole = CleanSet.of([batch for part in parts for batch in part], task)
    whole.batch_size = clean.batch_size * ranks.world
    return whole, True


def _sketch(clean: CleanSet) -> str:
    """Return what two sets of different samples differ in: labels, and the first and last samples in memory."""
    ends = [] if clean.live else [clean.subset(index).tensors() for index in (torch.tensor([0]), torch.tensor([-1]))]
    return of_values([clean.n, clean.labels, *(str(_plain(end)) for end in ends)])


def _plain(batch: Batch) -> list[Any]:
    found: list[Any] = []

    def keep(t: Tensor) -> Tensor:
        found.append(of_values([t]))
        return t

    map_tensors(keep, batch)
    return found
