"""The clean samples: counted, split and batched in an order that only the seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from .data import Batch, Task, check_labels, iter_batches, move_to, to_tensors
from .errors import DataError

__all__ = ["CleanSet"]

#: Samples a step where the user's data come without batches: a dataset, or one tuple (x, y).
DEFAULT_BATCH = 128


class _Store(Protocol):
    """Where samples are. `parts` says which samples may share a batch: those of one number."""

    parts: Tensor | None

    def get(self, index: list[int]) -> Batch: ...

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]: ...


class CleanSet:
    """Clean samples that can be split and shuffled.

    A `DataLoader` over a map-style dataset stays live: its dataset (with transforms, augmentation), `collate_fn` and
    workers are used, and only the order is ours. Anything else is read once into memory and re-batched.

    Attributes:
        n: the number of samples. labels: their labels [n] int64, None where `loss=` takes something else.
        batch_size: the user's (of an iterable: its first batch's). notes: what the user should know.
    """

    def __init__(self, store: _Store, index: Tensor, labels: Tensor | None, batch_size: int, task: Task) -> None:
        self._store = store
        self._index = index
        self.labels = labels
        self.batch_size = batch_size
        self.task = task
        self.notes: list[str] = []

    @classmethod
    def of(cls, data: Any, task: Task | None = None) -> CleanSet:
        """Read what a user passes as clean data.

        Args:
            data: a DataLoader, a Dataset, an iterable of batches (a generator is used up), one batch `(x, y)`.
            task: what a batch means.

        Raises:
            DataError: no samples, uint8 images, labels that are no class indices (see `fastfip.data.iter_batches`).
        """
        task = Task() if task is None else task
        if isinstance(data, CleanSet):
            return data
        live = _live(data)
        if live is None:
            batches = list(iter_batches(data, task))
            single = isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and isinstance(data[0], Tensor))
            store: _Store = _Memory(batches, [task.size(batch) for batch in batches])
            size = DEFAULT_BATCH if single else task.size(batches[0])
            index = torch.arange(sum(task.size(batch) for batch in batches))
            return cls(store, index, _labels(batches, task), size, task)
        loader, index, size = live
        if len(index) == 0:
            raise DataError("the data gave no samples: the clean loader is empty")
        tensors = _tensor_dataset(loader)
        if tensors is not None:
            batches = list(iter_batches([tensors], task))
            store = _Memory(batches, [task.size(batch) for batch in batches])
            labels = [_labels(batches, task)]
        else:
            store = _Live(loader)
            order = [index[i : i + size].tolist() for i in range(0, len(index), size)]
            labels = [_labels([batch], task) for batch in iter_batches(store.loader(order), task)]
        if labels[0] is not None and tensors is not None:
            labels = [labels[0][index]]
        known = [y for y in labels if y is not None]
        return cls(store, index, torch.cat(known) if len(known) == len(labels) else None, size, task)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def n(self) -> int:
        """Return the number of samples."""
        return len(self._index)

    def check(self, classes: int | None) -> None:
        """Check the labels against the model's C outputs and note what is thin about the set.

        Raises:
            DataError: a label is out of range.
        """
        if self.labels is None or classes is None:
            return
        check_labels(self.labels, classes)
        missing = sorted(set(range(classes)) - set(self.labels.unique().tolist()))
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            self.notes.append(f"{len(missing)} of {classes} classes have no clean sample: {shown}")

    def subset(self, index: Tensor) -> CleanSet:
        """Return some of the samples, by their place in this set."""
        labels = None if self.labels is None else self.labels[index]
        return CleanSet(self._store, self._index[index], labels, self.batch_size, self.task)

    def split(self, holdout: float, seed: int | torch.Generator) -> tuple[CleanSet, CleanSet | None]:
        """Split into the samples that are tuned on and those that only select.

        About `holdout` of the samples are held out, class by class in proportion, and never the last sample of a class.
        Where every class has one sample nothing is held out, and `notes` says so.

        Returns:
            (tuned, held out or None)
        """
        if holdout <= 0:
            return self, None
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        labels = torch.zeros(self.n, dtype=torch.int64) if self.labels is None else self.labels
        members = [torch.nonzero(labels == c).flatten() for c in labels.unique().tolist()]
        members = [m[torch.randperm(len(m), generator=generator)] for m in members]
        wanted = min(max(1, round(holdout * self.n)), sum(len(m) - 1 for m in members))
        take = [min(int(holdout * len(m)), len(m) - 1) for m in members]
        # What rounding down left over goes to the classes with the largest remainders, ties by chance.
        order = torch.randperm(len(members), generator=generator).tolist()
        order.sort(key=lambda c: take[c] - holdout * len(members[c]))
        while sum(take) < wanted:
            for c in order:
                if sum(take) < wanted and take[c] < len(members[c]) - 1:
                    take[c] += 1
        held = torch.cat([m[:k] for m, k in zip(members, take)])
        if len(held) == 0:
            self.notes.append("one clean sample a class: nothing is held out, the score is taken on the tuned samples")
            return self, None
        rest = torch.cat([m[k:] for m, k in zip(members, take)])
        return self.subset(rest.sort().values), self.subset(held.sort().values)

    def batches(
        self,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        smallest: int = 1,
    ) -> Iterator[Batch]:
        """Walk the samples once.

        Args:
            batch_size: samples a batch; None: the user's.
            shuffle: draw the order from `generator`.
            generator: on the CPU.
            device: where the tensors go.
            smallest: a last batch of fewer samples is joined to the one before it (BatchNorm in train mode needs 2).
        """
        order = self.order(batch_size, shuffle=shuffle, generator=generator, smallest=smallest)
        for batch in self._store.loader(order):
            yield move_to(to_tensors(batch), device)

    def order(
        self,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        smallest: int = 1,
    ) -> list[list[int]]:
        """Return the batches of one pass, as indices of the store; see :meth:`batches`."""
        size = self.batch_size if batch_size is None else batch_size
        index = self._index
        if shuffle:
            index = index[torch.randperm(len(index), generator=generator)]
        parts = self._store.parts
        groups = [index] if parts is None else [index[parts[index] == p] for p in parts[index].unique().tolist()]
        chunks: list[list[int]] = []
        for group in groups:
            mine = [group[i : i + size].tolist() for i in range(0, len(group), size)]
            if len(mine) > 1 and len(mine[-1]) < smallest:
                mine[-2] += mine.pop()
            chunks += mine
        if shuffle and len(groups) > 1:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        return chunks

    def in_memory(self) -> CleanSet:
        """Return the set with its samples drawn once and kept: augmentation no longer changes them."""
        if isinstance(self._store, _Memory):
            return self
        batches = [to_tensors(batch) for batch in self._store.loader(self.order())]
        store = _Memory(batches, [self.task.size(batch) for batch in batches])
        out = CleanSet(store, torch.arange(self.n), self.labels, self.batch_size, self.task)
        out.notes = self.notes
        return out

    def tensors(self) -> Batch:
        """Return all samples as one batch.

        Raises:
            DataError: samples of differing shapes do not fit into one.
        """
        parts = self._store.parts
        if parts is not None and len(parts[self._index].unique()) > 1:
            raise DataError("the clean samples differ in shape and do not fit into one batch")
        return to_tensors(self._store.get(self._index.tolist()))


# -------------------- stores


class _Live:
    """The user's dataset behind their own loader's settings."""

    parts: Tensor | None = None

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.user = loader

    def get(self, index: list[int]) -> Batch:
        return next(iter(self.loader([index])))

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]:
        user = self.user
        more: dict[str, Any] = {}
        if user.num_workers > 0:
            more = {"prefetch_factor": user.prefetch_factor, "multiprocessing_context": user.multiprocessing_context}
        # persistent_workers would keep processes alive behind a loader that is gone after one pass.
        return DataLoader(
            user.dataset,
            batch_sampler=order,
            collate_fn=user.collate_fn,
            num_workers=user.num_workers,
            pin_memory=user.pin_memory,
            timeout=user.timeout,
            worker_init_fn=user.worker_init_fn,
            **more,
        )


class _Memory:
    """Batches that were read once. Those whose samples have the same shapes are joined, so that they can be mixed."""

    parts: Tensor | None

    def __init__(self, batches: list[Batch], sizes: list[int]) -> None:
        groups: dict[Any, list[int]] = {}
        for i, batch in enumerate(batches):
            groups.setdefault(_signature(batch, sizes[i]), []).append(i)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        total = starts[-1]
        self._joined = [
            _join([batches[i] for i in members], [sizes[i] for i in members]) for members in groups.values()
        ]
        part, local = torch.empty(total, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
        for p, members in enumerate(groups.values()):
            offset = 0
            for i in members:
                part[starts[i] : starts[i + 1]] = p
                local[starts[i] : starts[i + 1]] = torch.arange(offset, offset + sizes[i])
                offset += sizes[i]
        self.parts = part if len(groups) > 1 else None
        self._part, self._local = part, local

    def get(self, index: list[int]) -> Batch:
        return _take(self._joined[int(self._part[index[0]])], self._local[index])

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]:
        return (self.get(index) for index in order)


class _Rows:
    """A field of a batch with one entry for each sample."""

    def __init__(self, values: Tensor | list[Any]) -> None:
        self.values = values


def _signature(batch: Batch, size: int) -> Any:
    if isinstance(batch, Tensor):
        return ("rows", tuple(batch.shape[1:]), batch.dtype) if _is_rows(batch, size) else ("whole", id(batch))
    if isinstance(batch, Mapping):
        return ("dict", tuple((k, _signature(v, size)) for k, v in batch.items()))
    if isinstance(batch, (tuple, list)):
        if len(batch) == size and not any(isinstance(v, (Tensor, Mapping, tuple, list)) for v in batch):
            return "list"
        return ("tuple", tuple(_signature(v, size) for v in batch))
    return ("whole", repr(batch))


def _is_rows(value: Tensor, size: int) -> bool:
    return value.dim() > 0 and value.shape[0] == size


def _join(batches: list[Batch], sizes: list[int]) -> Batch:
    """Join batches of one signature; what has a row for each sample becomes `_Rows`."""
    first = batches[0]
    if isinstance(first, Tensor):
        return _Rows(torch.cat(batches) if len(batches) > 1 else first) if _is_rows(first, sizes[0]) else first
    if isinstance(first, Mapping):
        return {k: _join([b[k] for b in batches], sizes) for k in first}
    if isinstance(first, (tuple, list)):
        if _signature(first, sizes[0]) == "list":
            return _Rows([value for batch in batches for value in batch])
        return tuple(_join(list(items), sizes) for items in zip(*batches))
    return first


def _take(joined: Batch, index: Tensor) -> Batch:
    if isinstance(joined, _Rows):
        if isinstance(joined.values, Tensor):
            return joined.values[index.to(joined.values.device)]
        return [joined.values[i] for i in index.tolist()]
    if isinstance(joined, Mapping):
        return {k: _take(v, index) for k, v in joined.items()}
    if isinstance(joined, tuple):
        return tuple(_take(v, index) for v in joined)
    return joined


# -------------------- reading the user's


def _labels(batches: list[Batch], task: Task) -> Tensor | None:
    """Labels of batches [n], None where they are no class indices (`loss=` knows what to do with them)."""
    try:
        found = [task.labels(batch) for batch in batches]
        for y in found:
            check_labels(y)
    except DataError:
        return None
    return torch.cat(found).cpu()


def _live(data: Any) -> tuple[DataLoader[Any], Tensor, int] | None:
    """(loader, indices, batch size) of what has a map-style dataset; None for everything else."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=DEFAULT_BATCH)
    # A subclass may yield something else than its dataset's items, so only the class itself is taken apart.
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return None
    plain = type(data.batch_sampler) is BatchSampler
    if plain and data.batch_size:
        if isinstance(data.sampler, (SequentialSampler, RandomSampler)):
            return data, torch.arange(len(data.dataset)), data.batch_size  # type: ignore[arg-type]
        seen = list(data.sampler)
        # Sorted, so that the seed alone decides the order, not what the user's sampler drew.
        return data, torch.tensor(sorted(set(map(int, seen))), dtype=torch.int64), data.batch_size
    if data.batch_sampler is None:
        return None
    chunks = [list(map(int, chunk)) for chunk in data.batch_sampler]
    flat = sorted({i for chunk in chunks for i in chunk})
    return data, torch.tensor(flat, dtype=torch.int64), max((len(chunk) for chunk in chunks), default=1)


def _tensor_dataset(loader: DataLoader[Any]) -> Any | None:
    """All tensors of a TensorDataset (also in a Subset) with the default collate: no loading sample by sample."""
    collate: Callable[..., Any] = loader.collate_fn
    dataset = loader.dataset
    if collate is not default_collate:
        return None
    rows: Tensor | None = None
    while type(dataset) is Subset:
        here = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        rows = here if rows is None else here[rows]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    return tuple(t if rows is None else t[rows] for t in dataset.tensors)
