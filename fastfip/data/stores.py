"""Where the clean samples are: behind the user's own loader, or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
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

from fastfip.data.batch import Batch, map_batch, map_tensors
from fastfip.errors import DataError

__all__ = [
    "DEFAULT_BATCH",
    "Live",
    "Memory",
    "Store",
    "bytes_of",
    "count_of",
    "first_of",
    "half_of_memory",
    "kept",
    "live_loader",
    "spread",
    "tensors_of",
]

#: Batches of an iterable that are kept, at most: one that has no end must not fill the memory.
MOST_BATCHES = 1_000_000

#: Samples a step where the user's data come without batches: a dataset, or one tuple (x, y).
DEFAULT_BATCH = 128


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches of an iterable, which is read to its end.

    Raises:
        DataError: they fill half of the machine's memory, or are a million.
    """
    most, held, out = half_of_memory(), 0, list[Batch]()

    for batch in batches:
        held += bytes_of(batch)
        out.append(batch)
        if held > most or len(out) > MOST_BATCHES:
            raise DataError(
                f"{len(out):,} batches ({held / 1e9:.1f} GB) were read without reaching an end: pass fewer samples, a "
                "generator that ends (fastfip.data.reservoir keeps a random part of a long one), or a Dataset, which "
                "is read batch by batch"
            )
    return out


def bytes_of(batch: Batch) -> int:
    """Return how many bytes the tensors of a batch take."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.nbytes) or t, batch)  # type: ignore[func-returns-value]
    return sum(sizes)


def half_of_memory() -> int:
    """Return half of the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 << 30


class Store(Protocol):
    """Where samples are. `parts` says which samples may share a batch: those of one number."""

    parts: Tensor | None

    def get(self, index: list[int]) -> Batch:
        """Return some samples as one batch."""

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]:
        """Return the batches that lists of indices name."""

    def close(self) -> None:
        """End what the store keeps running."""


class _Order:
    """The batches of the next pass, which a loader asks for when the pass begins."""

    def __init__(self) -> None:
        self.now: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.now)


class Live:
    """The user's dataset behind their own loader's settings.

    Worker processes are started for the first pass and serve the next ones, until `close`.
    """

    parts: Tensor | None = None

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.user = loader
        self._order = _Order()
        self._lasting: DataLoader[Any] | None = None
        self._busy = False

    def get(self, index: list[int]) -> Batch:
        """Return some samples as one batch."""
        return next(iter(self.loader([index])))

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]:
        """Return the batches of this order, loaded with the user's settings; damaged files are named."""
        order = list(order)
        # Begun at once: a loader draws from the global generator to begin (`CleanSet.walk`).
        return self._told(iter(self._fresh(order)) if self.user.num_workers == 0 else self._by_workers(order), order)

    def _told(self, walk: Iterator[Batch], order: list[list[int]]) -> Iterator[Batch]:
        for number, places in enumerate(order, 1):
            try:
                batch = next(walk)
            except StopIteration:
                return
            except Exception as error:
                from fastfip.data.streams import reading_error

                clear = reading_error(error, self.user, number, places)
                if clear is None:
                    raise
                raise clear from error
            yield batch
        next(walk, None)  # so that workers know that the pass is over

    def close(self) -> None:
        """End the worker processes."""
        self._lasting = None  # the last reference: its iterator shuts them down

    def _by_workers(self, order: Iterable[list[int]]) -> Iterator[Batch]:
        if self._busy:  # a pass within a pass: the lasting loader has one set of workers, and they are at work
            yield from self._fresh(order)
            return
        if self._lasting is None:
            self._lasting = self._fresh(self._order, persistent_workers=True)
        self._busy, self._order.now = True, order
        try:
            yield from self._lasting
        finally:
            self._busy = False

    def _fresh(self, order: Iterable[list[int]], **more: Any) -> DataLoader[Any]:
        user = self.user
        if user.num_workers > 0:
            more["prefetch_factor"] = user.prefetch_factor
            more["multiprocessing_context"] = user.multiprocessing_context
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


class Memory:
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
        part, local = torch.zeros(2, total, dtype=torch.int64, device="cpu")
        for p, members in enumerate(groups.values()):
            offset = 0
            for i in members:
                part[starts[i] : starts[i + 1]] = p
                local[starts[i] : starts[i + 1]] = torch.arange(offset, offset + sizes[i], device="cpu")
                offset += sizes[i]
        self.parts = part if len(groups) > 1 else None
        self._part, self._local = part, local

    def get(self, index: list[int]) -> Batch:
        """Return some samples as one batch."""
        return _take(self._joined[int(self._part[index[0]])], self._local[index])

    def loader(self, order: Iterable[list[int]]) -> Iterable[Batch]:
        """Return the batches that lists of indices name."""
        return (self.get(index) for index in order)

    def close(self) -> None:
        """Nothing runs."""


class _Rows:
    """A field of a batch with one entry for each sample."""

    def __init__(self, values: Tensor | list[Any]) -> None:
        self.values = values


def _signature(batch: Batch, size: int) -> Any:
    """Return what two batches must share so that their samples can be joined."""
    places: list[Any] = []

    def add(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            row = value.dim() > 0 and value.shape[0] == size
            places.append((path, "rows", tuple(value.shape[1:]), value.dtype) if row else (path, "whole", id(value)))
        else:
            places.append((path, "list") if _is_list(value, size) else (path, "whole", repr(value)))

    map_batch(add, batch, is_leaf=lambda value: _is_list(value, size), path="")
    return tuple(places)


def _is_list(value: Any, size: int) -> bool:
    """Return whether a container has one plain value (text, say) for each sample."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == size
        and not any(isinstance(v, (Tensor, Mapping, tuple, list)) for v in value)
    )


def _join(batches: list[Batch], sizes: list[int]) -> Batch:
    """Join batches of one signature; what has a row for each sample becomes `_Rows`."""
    size = sizes[0]

    def joined(*values: Any) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            if first.dim() == 0 or first.shape[0] != size:
                return first
            return _Rows(torch.cat(values) if len(values) > 1 else first)
        return _Rows([item for value in values for item in value]) if _is_list(first, size) else first

    return map_batch(joined, *batches, is_leaf=lambda value: _is_list(value, size))


def _take(joined: Batch, index: Tensor) -> Batch:
    def rows(value: Any) -> Any:
        if not isinstance(value, _Rows):
            return value
        if isinstance(value.values, Tensor):
            return value.values[index.to(value.values.device)]
        return [value.values[i] for i in index.tolist()]

    return map_batch(rows, joined)


def live_loader(data: Any) -> tuple[DataLoader[Any], Tensor, int] | None:
    """(loader, indices, batch size) of what has a map-style dataset; None for everything else."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=DEFAULT_BATCH)
    # A subclass may yield something else than its dataset's items, so only the class itself is taken apart.
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return None
    plain = type(data.batch_sampler) is BatchSampler
    if plain and data.batch_size:
        if isinstance(data.sampler, (SequentialSampler, RandomSampler)):
            return data, torch.arange(len(data.dataset), device="cpu"), data.batch_size  # type: ignore[arg-type]
        seen = list(data.sampler)
        # Sorted, so that the seed alone decides the order, not what the user's sampler drew.
        return data, torch.tensor(sorted(set(map(int, seen))), dtype=torch.int64, device="cpu"), data.batch_size
    if data.batch_sampler is None:
        return None
    chunks = [list(map(int, chunk)) for chunk in data.batch_sampler]
    flat = sorted({i for chunk in chunks for i in chunk})
    return data, torch.tensor(flat, dtype=torch.int64, device="cpu"), max((len(chunk) for chunk in chunks), default=1)


def count_of(data: Any) -> int | None:
    """Return the number of samples of what a user passes as data, without reading it; None: only reading would tell."""
    if isinstance(data, Mapping):
        data = tuple(data.values())
    if isinstance(data, Tensor):
        return len(data) if data.dim() else None
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return len(data)  # type: ignore[arg-type]
    if type(data) is DataLoader and type(data.batch_sampler) is BatchSampler:
        return len(data.sampler) if isinstance(data.sampler, Sized) else None
    if not isinstance(data, (tuple, list)) or not data:
        return None
    if isinstance(data[0], Tensor):  # one batch
        return len(data[0]) if data[0].dim() else None
    counts = [count_of(batch) for batch in data]
    return None if None in counts else sum(count for count in counts if count is not None)


def first_of(data: Any, most: int) -> Batch:
    """Return a batch of some samples of data that `count_of` can count.

    Of a data set or loader they are at most `most` samples, spread evenly over those that the loader gives, and read as
    it reads them. Of a list of batches they are the first batches, until there are so many; of one batch it is all.
    """
    if isinstance(data, (Mapping, Tensor)) or (isinstance(data, (tuple, list)) and isinstance(data[0], Tensor)):
        return data
    if isinstance(data, (tuple, list)):
        few, have = [], 0
        for batch in data:
            few.append(batch)
            have += count_of(batch) or 0
            if have >= most:
                break
        return map_batch(lambda *values: torch.cat(values) if isinstance(values[0], Tensor) else values[0], *few)
    live = live_loader(data)
    if live is None:
        raise DataError(f"{type(data).__name__} is no data set and no loader of one")
    store = Live(live[0])
    try:
        return store.get([int(live[1][i]) for i in spread(len(live[1]), most)])
    finally:
        store.close()


def spread(n: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below n, at even distances."""
    return sorted({int(i) for i in torch.linspace(0, n - 1, min(n, most)).round()}) if n else []


def tensors_of(loader: DataLoader[Any]) -> Any | None:
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
