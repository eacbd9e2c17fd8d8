"""Data that come one after the other: samples without batches, uint8 images, parts of streams, damaged files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, default_collate

from fastfip.data.batch import Batch, pick, to_tensors
from fastfip.data.scaling import Pixels, statistics
from fastfip.data.task import INPUT_KEYS, NAMED_INPUT_KEYS, Task, is_sample, iter_batches
from fastfip.errors import ConfigError, DataError, printable, reason

__all__ = ["collated", "reading_error", "reservoir", "scaled"]

#: Samples a batch where a stream has none.
_BATCH = 128
#: What readers of files raise where a file is damaged; errors of other kinds are the user's own.
_UNREADABLE = (OSError, SyntaxError, EOFError)


def collated(samples: Iterable[Any]) -> Iterator[Batch]:
    """Yield batches of 128 of the samples of a stream.

    Raises:
        DataError: images that are not decoded, or samples that do not fit into one batch.
    """
    walk = iter(samples)
    while part := list(itertools.islice(walk, _BATCH)):
        yield _collate(part)


def _collate(part: list[Any]) -> Batch:
    value = _input(part[0])[1]
    if isinstance(value, (bytes, bytearray)) or hasattr(value, "getexif"):
        kind = "bytes" if isinstance(value, (bytes, bytearray)) else "pictures of pillow"
        raise DataError(
            f"images are {kind}: decode them into tensors, e.g. webdataset's .decode('torchrgb'), or pass "
            "fastfip.data.scaled(data, '01')"
        )
    try:
        return default_collate([to_tensors(sample) for sample in part])
    except (TypeError, RuntimeError, KeyError) as error:
        raise DataError(f"samples do not fit into one batch: {reason(error)}: pass batches") from None


def _input(sample: Any) -> tuple[Any, Any]:
    """Return the key or place of a sample's input, and the input; (None, None): there is none."""
    if isinstance(sample, Mapping):
        key = next((key for key in INPUT_KEYS + NAMED_INPUT_KEYS if key in sample), None)
        return key, None if key is None else sample[key]
    if isinstance(sample, (tuple, list)) and sample:
        return 0, sample[0]
    return None, None


# -------------------------------------------------------------------------------------------------- part of a stream


def reservoir(
    data: Iterable[Batch],
    limit: int,
    *,
    seed: int = 0,
    forward: Callable[..., Tensor] | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> list[Batch]:
    """Return a random part of a stream of any length, which is read once and of which no more is ever in memory.

    Each sample has the same chance to be in it (Vitter's algorithm R).

    Args:
        data: batches or samples, in all forms that `purify` takes; it must end.
        limit: samples that are kept, at most.
        seed: of the choice.
        forward: as for `purify`, where batches are of a form of their own.
        loss: the same.

    Returns:
        batches of at most 128 samples, which `purify`, `evaluate` and the others take.

    Raises:
        DataError: data that cannot be used. ConfigError: a limit below 1.
    """
    if limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1")
    task, generator = Task.of(forward, loss), torch.Generator().manual_seed(seed)
    kept: list[Batch] = []
    seen = 0
    for batch in iter_batches(data, task):
        size = task.size(batch)
        counts = torch.arange(seen + 1, seen + size + 1)  # each sample replaces one of these at random
        places = (torch.rand(size, generator=generator, dtype=torch.float64) * counts).long()
        for n, place in enumerate(places.tolist()):
            if len(kept) < limit:
                kept.append(_own(pick(batch, n, size)))
            elif place < limit:
                kept[place] = _own(pick(batch, n, size))
        seen += size
    return _rebatched(kept, task)


def _own(sample: Batch) -> Batch:
    """Return a copy: a part of a batch would hold all of it in memory."""
    from fastfip.data.batch import map_tensors

    return map_tensors(lambda t: t.clone(), sample)


def _rebatched(samples: list[Batch], task: Task) -> list[Batch]:
    from fastfip.data.cleanset import CleanSet
    from fastfip.data.stores import Memory

    store = Memory(samples, [1] * len(samples))
    return list(CleanSet(store, torch.arange(len(samples)), None, _BATCH, task).batches())


# ------------------------------------------------------------------------------------------------------------- uint8


def scaled(
    data: Any,
    scale: str = "01",
    mean: float | Sequence[float] | str = (),
    std: float | Sequence[float] | str = (),
) -> Any:
    """Return data of uint8 images as data of floats, as a model takes them: only the user knows how these are scaled.

    Images may be [N, C, H, W] or [N, H, W, C], of samples [C, H, W] or [H, W, C], or pictures of pillow. They are
    scaled as they are read; workers of a DataLoader do it, and all else of it stays as it is.

    Args:
        data: what `purify` takes: a DataLoader, a Dataset (also of Hugging Face), an iterable of batches or samples,
            or one batch.
        scale: "01" (x / 255), "-11" (x / 127.5 - 1) or "255" (0 to 255 as they are, as floats).
        mean: subtracted then: a number, one for each channel, or a name, e.g. "imagenet", which stands for both.
        std: what is divided by.

    Returns:
        a DataLoader for a DataLoader or Dataset, a batch for a batch, else an iterable.

    Raises:
        ConfigError: a scale or a name that is not known.
        DataError: when it is read: images that are no whole numbers from 0 to 255.
    """
    change = _Scaling(_pixels(scale, mean, std))
    several = isinstance(data, (tuple, list))
    if isinstance(data, Mapping) or (several and data and all(hasattr(v, "__array__") for v in data)):
        return change(data)
    stream = isinstance(data, (IterableDataset, Iterator))
    if type(data) is DataLoader and (data.batch_sampler is not None or isinstance(data.dataset, IterableDataset)):
        return _loader(data, change)
    if not several and not stream and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DataLoader(data, batch_size=_BATCH, collate_fn=_Collated(change, _collate))
    return map(change, data) if isinstance(data, Iterator) else _Scaled(data, change)


def _pixels(scale: str, mean: Any, std: Any) -> Pixels:
    name = next((value for value in (mean, std) if isinstance(value, str)), None)
    known = ((), ()) if name is None else statistics(name)
    values = []
    for value, default in zip((mean, std), known):
        number = (float(value),) if isinstance(value, (int, float)) else value
        values.append(default if isinstance(number, str) or not number else tuple(number))
    return Pixels(values[0], values[1], scale=scale)


class _Scaling:
    """Makes floats of the uint8 images of a batch or a sample."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    def __call__(self, batch: Batch) -> Batch:
        key, x = _input(batch)
        if key is None:
            raise DataError("a batch must be (x, y) or a dict with a known input field")
        single = is_sample(batch) or hasattr(x, "getexif")
        x = self._floats(x, single)
        if isinstance(batch, Mapping):
            return {**batch, key: x}
        return (x, *list(batch)[1:])

    def _floats(self, x: Any, single: bool) -> Tensor:
        if hasattr(x, "getexif"):
            from fastfip.data.pictures import tensor_of

            return self.pixels.normalise(tensor_of(x)[None])[0]
        x = to_tensors(x)
        if not isinstance(x, Tensor) or not _bytes(x):
            kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise DataError(f"images are {kind}, not uint8: they are already scaled, or not yet decoded")
        x = x[None] if single else x
        if x.dim() == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
            x = x.permute(0, 3, 1, 2)
        x = self.pixels.normalise(x.float() / 255)
        return x[0] if single else x


def _bytes(x: Tensor) -> bool:
    """Whether these are numbers from 0 to 255: other whole ones than uint8 too, as datasets makes of them."""
    if x.dtype == torch.uint8:
        return True
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    return whole and (x.numel() == 0 or (int(x.min()) >= 0 and int(x.max()) <= 255))


class _Collated:
    """A function for a DataLoader: samples, each scaled, as one batch."""

    def __init__(self, each: Callable[[Any], Any], collate: Callable[[list[Any]], Batch]) -> None:
        self.each, self.collate = each, collate

    def __call__(self, samples: list[Any]) -> Batch:
        return self.collate([self.each(sample) for sample in samples])


class _After:
    """The user's own function for a DataLoader, and what is done to its batches."""

    def __init__(self, collate: Callable[[Any], Batch], each: Callable[[Any], Any]) -> None:
        self.collate, self.each = collate, each

    def __call__(self, samples: Any) -> Batch:
        return self.each(self.collate(samples))


def _loader(data: DataLoader[Any], change: _Scaling) -> DataLoader[Any]:
    options: dict[str, Any] = {
        name: getattr(data, name)
        for name in "num_workers pin_memory timeout worker_init_fn persistent_workers generator".split()
    }
    if data.num_workers > 0:
        options |= {"prefetch_factor": data.prefetch_factor, "multiprocessing_context": data.multiprocessing_context}
    if isinstance(data.dataset, IterableDataset):
        options |= {"batch_size": data.batch_size, "drop_last": data.drop_last}
    elif data.batch_size is not None:
        options |= {"batch_size": data.batch_size, "sampler": data.sampler, "drop_last": data.drop_last}
    else:
        options["batch_sampler"] = data.batch_sampler
    return DataLoader(data.dataset, collate_fn=_After(data.collate_fn, change), **options)


class _Scaled:
    """An iterable of batches or samples, scaled as they come; it is walked as often as the given one can be."""

    def __init__(self, data: Iterable[Any], change: _Scaling) -> None:
        self.data, self.change = data, change

    def __iter__(self) -> Iterator[Any]:
        return (self.change(batch) for batch in self.data)


# -------------------------------------------------------------------------------------------- what cannot be read


def reading_error(error: Exception, data: Any, number: int, places: Sequence[int] | None = None) -> DataError | None:
    """Return one clear error for one that came while data was read; None: it is the user's own, and stays as it is.

    Args:
        error: it.
        data: what was read: a loader, or anything.
        number: of the batch that it came for, from 1.
        places: of its samples in the dataset, where they are known.
    """
    if isinstance(error, DataError) and not str(error).startswith("Caught "):
        return None
    if not isinstance(error, (DataError, *_UNREADABLE)):
        return None
    words = _last_words(error)
    if isinstance(error, DataError):
        return DataError(words)
    return DataError(f"batch {number} of the data cannot be read{_blamed(data, number, places)}: {words}")


def _last_words(error: Exception) -> str:
    """Return what an error says; of one that a worker sent with its traceback, what the worker's own said."""
    text = str(error)
    if text.startswith("Caught "):
        lines = [line for line in text.splitlines() if line.strip()]
        text = lines[-1]
        return reason(ValueError(text.partition(": ")[2] if isinstance(error, DataError) else text))
    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
    return f"{kind}{reason(error)}"


def _blamed(data: Any, number: int, places: Sequence[int] | None) -> str:
    """Return which sample of a batch cannot be read, with the name of its file where the dataset tells it."""
    dataset = getattr(data, "dataset", None)
    if places is None and isinstance(getattr(data, "sampler", None), SequentialSampler) and data.batch_size:
        first = (number - 1) * data.batch_size
        places = range(first, min(first + data.batch_size, len(dataset)))  # type: ignore[arg-type]
    for place in places or ():
        try:
            dataset[place]  # type: ignore[index]
        except Exception:  # the one that cannot be read, or another that cannot either
            return f", sample {place}{_file_of(dataset, place)}"
    return ""


def _file_of(dataset: Any, place: int) -> str:
    for name in ("samples", "imgs", "paths", "files"):  # as torchvision's folders, and many others, call them
        entries = getattr(dataset, name, None)
        if isinstance(entries, (list, tuple)) and place < len(entries):
            entry = entries[place]
            return f" ({printable(entry[0] if isinstance(entry, (tuple, list)) else entry)})"
    return ""
