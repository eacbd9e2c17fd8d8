"""The clean samples: counted, split and batched in an order that only the seed decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfip.data.batch import Batch, move_to, to_tensors
from fastfip.data.lengths import Padding, alike
from fastfip.data.outputs import binary_labels
from fastfip.data.stores import (
    DEFAULT_BATCH,
    Live,
    Memory,
    Store,
    bytes_of,
    half_of_memory,
    kept,
    live_loader,
    tensors_of,
)
from fastfip.data.task import Task, check_labels, iter_batches
from fastfip.errors import DataError

__all__ = ["CleanSet", "class_indices"]


class CleanSet:
    """Clean samples that can be split and shuffled.

    A `DataLoader` over a map-style dataset stays live: its dataset (with transforms, augmentation), `collate_fn` and
    workers are used, and only the order is ours. Anything else is read once into memory and re-batched.

    Attributes:
        n: the number of samples. labels: their labels [n] int64, None where `loss=` takes something else.
        batch_size: the user's (of an iterable: its first batch's). notes: what the user should know.
        forms: the first batch, with its number, of each further shape and dtype that inputs have: a model that takes
            the first batch may fail on them.
    """

    def __init__(self, store: Store, index: Tensor, labels: Tensor | None, batch_size: int, task: Task) -> None:
        self._store = store
        self._index = index
        self.labels = labels
        self.batch_size = batch_size
        self.task = task
        self.binary = False
        self.padding: Padding | None = None
        self.lengths: Tensor | None = None  # by the store's numbers
        self.notes: list[str] = []
        self.forms: list[tuple[int, Batch]] = []

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
        live, forms = live_loader(data), _Forms(task)
        if live is None:
            batches = kept(forms.watched(iter_batches(data, task)))
            single = isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and isinstance(data[0], Tensor))
            store: Store = Memory(batches, [task.size(batch) for batch in batches])
            size = DEFAULT_BATCH if single else task.size(batches[0])
            index = torch.arange(sum(task.size(batch) for batch in batches), device="cpu")
            clean = cls(store, index, _labels(batches, task), size, task)
            clean.forms = forms.found[1:]
            return clean
        loader, index, size = live
        if len(index) == 0:
            raise DataError("the data gave no samples: the clean loader is empty")
        tensors = tensors_of(loader)
        if tensors is not None:
            batches = list(iter_batches([tensors], task))
            store = Memory(batches, [task.size(batch) for batch in batches])
            labels = [_labels(batches, task)]
        else:
            store = Live(loader)
            order = [index[i : i + size].tolist() for i in range(0, len(index), size)]
            labels = [_labels([batch], task) for batch in forms.watched(iter_batches(store.loader(order), task))]
        if labels[0] is not None and tensors is not None:
            labels = [labels[0][index]]
        known = [y for y in labels if y is not None]
        clean = cls(store, index, torch.cat(known) if len(known) == len(labels) else None, size, task)
        clean.forms = forms.found[1:]
        return clean

    def __len__(self) -> int:
        return len(self._index)

    @property
    def n(self) -> int:
        """Return the number of samples."""
        return len(self._index)

    @property
    def live(self) -> bool:
        """Return whether samples are read anew in each pass, by the user's dataset, which may augment them."""
        return not isinstance(self._store, Memory)

    def check(self, classes: int | None) -> None:
        """Check the labels against the model's C outputs and note what is thin about the set.

        Raises:
            DataError: a label is out of range.
        """
        if self.labels is None or classes is None:
            return
        try:
            check_labels(self.labels, classes)
        except DataError as error:
            first = int(((self.labels < 0) | (self.labels >= classes)).nonzero()[0])
            where = f"first in batch {first // self.batch_size + 1}, at sample {first % self.batch_size + 1}"
            raise DataError(f"{error} ({where})") from None
        missing = sorted(set(range(classes)) - set(self.labels.unique().tolist()))
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            self.notes.append(f"{len(missing)} of {classes} classes have no clean sample: {shown}")

    def subset(self, index: Tensor) -> CleanSet:
        """Return some of the samples, by their place in this set."""
        labels = None if self.labels is None else self.labels[index]
        out = CleanSet(self._store, self._index[index], labels, self.batch_size, self.task)
        out.binary, out.padding, out.lengths = self.binary, self.padding, self.lengths
        return out

    def grouped_by_length(self, padding: Padding) -> CleanSet:
        """Return the set with texts of like lengths in a batch wherever samples are shuffled (see `lengths.alike`).

        Samples are read once for it. Subsets do the same. Where inputs are no token ids it is the set as it was.

        Args:
            padding: what fills the rows; where it may be cut, batches come without columns of padding alone.
        """
        found = [padding.lengths(self.task, batch) for batch in self.batches()]
        known = [lengths for lengths in found if lengths is not None]
        out = self.subset(torch.arange(self.n, device="cpu"))
        if len(known) == len(found):
            out.lengths = torch.zeros(int(self._index.max()) + 1, dtype=torch.int64, device="cpu")
            out.lengths[self._index[self.places()]] = torch.cat(known)
            out.padding = padding
        return out

    @property
    def index(self) -> Tensor:
        """Return which of the samples that were given these are, [n]."""
        return self._index

    def chosen(self, index: Tensor) -> CleanSet:
        """Return the subset whose `index` is this one.

        Raises:
            DataError: a sample is not in this set.
        """
        places = {number: place for place, number in enumerate(self._index.tolist())}
        if not set(index.tolist()) <= set(places):
            raise DataError("the clean samples differ from those of the run that is to be continued")
        return self.subset(torch.tensor([places[number] for number in index.tolist()], dtype=torch.int64, device="cpu"))

    def of_two_classes(self) -> CleanSet:
        """Return the set with labels 0 and 1 of whatever dtype, [N] or [N, 1], as class indices.

        Raises:
            DataError: a label is neither 0 nor 1.
        """
        out = CleanSet(self._store, self._index, self.labels, self.batch_size, Task())
        out.binary, out.notes = True, self.notes
        if out.labels is None:
            labels = torch.empty(self.n, dtype=torch.int64, device="cpu")
            labels[self.places()] = torch.cat([out.task.labels(batch).cpu() for batch in out.batches()])
            out.labels = labels
        return out

    def _given(self, batch: Batch) -> Batch:
        batch = to_tensors(batch)
        return class_indices(batch) if self.binary else batch

    def close(self) -> None:
        """End the worker processes of the user's dataset, if there are some; the next pass would start others."""
        self._store.close()

    def places(self) -> Tensor:
        """Return the places [n] in this set of the samples, in the order in which an unshuffled walk meets them."""
        parts = self._store.parts
        return torch.arange(self.n, device="cpu") if parts is None else parts[self._index].argsort(stable=True)

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
        labels = self._index * 0 if self.labels is None else self.labels
        members = [torch.nonzero(labels == c).flatten() for c in labels.unique().tolist()]
        members = [m[_permutation(len(m), generator)] for m in members]
        wanted = min(max(1, round(holdout * self.n)), sum(len(m) - 1 for m in members))
        take = [min(int(holdout * len(m)), len(m) - 1) for m in members]
        # What rounding down left over goes to the classes with the largest remainders, ties by chance.
        order = _permutation(len(members), generator).tolist()
        order.sort(key=lambda c: take[c] - holdout * len(members[c]))
        while sum(take) < wanted:
            for c in order:
                if sum(take) < wanted and take[c] < len(members[c]) - 1:
                    take[c] += 1
        held = torch.cat([m[:k] for m, k in zip(members, take)])
        if len(held) == 0:
            self.notes.append(
                "one clean sample for each class: none is held out, and the score is measured on the samples "
                "that are tuned on"
            )
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
            smallest: samples that a batch has at least, if there are so many: a last batch of fewer is joined to the
                one before it (BatchNorm in train mode needs 2).
        """
        yield from self.walk(self.order(batch_size, shuffle=shuffle, generator=generator, smallest=smallest), device)

    def walk(self, order: list[list[int]], device: torch.device | str | None = None) -> Iterator[Batch]:
        """Return the batches that an order names, which `order` made; what a loader draws to begin is drawn at once."""
        return self._walked(iter(self._store.loader(order)), device)

    def _walked(self, batches: Iterator[Batch], device: torch.device | str | None) -> Iterator[Batch]:
        for given in batches:
            batch = self._given(given)
            yield move_to(batch if self.padding is None else self.padding.cut(self.task, batch), device)

    def order(
        self,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        smallest: int = 1,
    ) -> list[list[int]]:
        """Return the batches of one pass, as indices of the store; see :meth:`batches`."""
        size = max(smallest, self.batch_size if batch_size is None else batch_size)
        index = self._index
        if shuffle:
            index = index[_permutation(len(index), generator)]
        parts = self._store.parts
        groups = [index] if parts is None else [index[parts[index] == p] for p in parts[index].unique().tolist()]
        chunks: list[list[int]] = []
        for group in groups:
            if shuffle and self.lengths is not None:
                group = alike(group, self.lengths, size, generator)
            mine = [group[i : i + size].tolist() for i in range(0, len(group), size)]
            if len(mine) > 1 and len(mine[-1]) < smallest:
                last = mine.pop()
                mine[-1] += last
            chunks += mine
        if shuffle and len(groups) > 1:
            chunks = [chunks[i] for i in _permutation(len(chunks), generator).tolist()]
        return chunks

    def in_memory(self) -> CleanSet:
        """Return the set with its samples drawn once and kept: augmentation no longer changes them.

        Of samples that would fill an eighth of the machine's memory it is a part that does not, spread evenly.
        """
        if isinstance(self._store, Memory):
            return self
        batches: list[Batch] = []
        for batch in self._store.loader(self.order()):
            batches.append(self._given(batch))
            if len(batches) == 1 and self.n > 1:
                most = int(half_of_memory() / 4 / max(1, bytes_of(batch) / self.task.size(batches[0])))
                if most < self.n:
                    spread = torch.linspace(0, self.n - 1, max(1, most), dtype=torch.float64, device="cpu").long()
                    return self.subset(spread).in_memory()
        store = Memory(batches, [self.task.size(batch) for batch in batches])
        out = CleanSet(store, torch.arange(self.n, device="cpu"), self.labels, self.batch_size, self.task)
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
        return self._given(self._store.get(self._index.tolist()))


def class_indices(batch: Batch) -> Batch:
    """Return a batch with its labels 0 and 1, of whatever dtype, [N] or [N, 1], as int64 [N].

    Raises:
        DataError: a label is neither 0 nor 1.
    """
    task = Task(loss_hook=_any_labels)
    y = binary_labels(task.labels(batch), task.size(batch))
    if y is None:
        raise DataError("one logit is for two classes: labels must be 0 or 1, one for each sample")
    return task.relabel(batch, y)


def _any_labels(logits: Tensor, batch: Batch) -> Tensor:
    raise NotImplementedError


class _Forms:
    """Keeps the first batch of each shape and dtype of the inputs, up to `most` of them."""

    most = 8

    def __init__(self, task: Task) -> None:
        self.task, self.seen = task, set[Any]()
        self.found: list[tuple[int, Batch]] = []

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches, 1):
            form = self._of(batch)
            if form not in self.seen and len(self.found) < self.most:
                self.seen.add(form)
                self.found.append((number, batch))
            yield batch

    def _of(self, batch: Batch) -> Any:
        try:
            x = self.task.inputs(batch)
        except DataError:
            return None
        # Token ids are as long as the longest text of a batch: no other form.
        return (x.dtype, tuple(x.shape[1:])) if x.is_floating_point() else x.dim()


def _permutation(n: int, generator: torch.Generator | None) -> Tensor:
    # The device is named because a default device of the user's would ask for a generator there.
    return torch.randperm(n, generator=generator, device="cpu")


def _labels(batches: list[Batch], task: Task) -> Tensor | None:
    """Labels of batches [n], None where they are no class indices (`loss=` knows what to do with them)."""
    try:
        found = [task.labels(batch) for batch in batches]
        for y in found:
            check_labels(y)
    except DataError:
        return None
    return torch.cat(found).cpu()
