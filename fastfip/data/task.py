"""What a batch is, and how a model and a batch meet.

Everything in fastfip that takes a model and data takes the hooks `forward=` and `loss=` as well, makes a :class:`Task`
of them with :meth:`Task.of` and walks the data with :func:`iter_batches`; nothing else looks inside a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch, describe, dtype_name, float32_batch, move_to, take, to_tensors
from fastfip.errors import DataError
from fastfip.nets.state import uses_batch_statistics

__all__ = [
    "Task",
    "batches_of",
    "check_labels",
    "iter_batches",
    "read_batches",
]

Forward = Callable[[nn.Module, Batch], Tensor]
Loss = Callable[[Tensor, Batch], Tensor]

#: Fields of a dict batch that are given to the model by position ...
INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "jpg", "jpeg", "png", "webp")
#: ... and those that mean "Hugging Face style": every field but the labels is given by name.
NAMED_INPUT_KEYS = ("pixel_values", "input_ids", "inputs_embeds", "input_values", "input_features")
LABEL_KEYS = ("labels", "label", "y", "target", "targets", "cls")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DATASET_BATCH = 128
#: Samples after which data without a length is taken to have no end.
MOST_SAMPLES = 10_000_000


@dataclass(frozen=True)
class Task:
    """How a model and a batch meet. Build it with :meth:`Task.of`; without hooks it means: classify `(x, y)`.

    A batch is a tuple or list `(x, y, ...)` (items after the second are left alone) or a dict. N is the number of
    samples of a batch, C the number of classes.
    """

    forward_hook: Forward | None = None
    loss_hook: Loss | None = None
    #: Samples that a pass without gradients takes together, at most, BatchNorm in eval mode; None: the whole batch.
    most: int | None = None

    @classmethod
    def of(cls, forward: Forward | None = None, loss: Loss | None = None) -> Task:
        """Return the task with the user's hooks.

        Args:
            forward: `forward(model, batch) -> logits [N, C]`; None: `model(x)`, or `model(**fields)` for a Hugging
                Face dict.
            loss: `loss(logits, batch) -> Tensor [N]`, one loss for each sample, never their mean; None: cross-entropy.

        Raises:
            DataError: a hook is not callable.
        """
        for name, hook in (("forward", forward), ("loss", loss)):
            if hook is not None and not callable(hook):
                raise DataError(f"{name}= must be a function, not {type(hook).__name__}")
        return cls(forward, loss)

    def in_float32(self) -> Task:
        """Return the task for a model in float32 whose batches are of lower precision."""
        whole = replace(self, most=None)
        return Task(lambda model, batch: whole.forward(model, float32_batch(batch)), self.loss_hook, self.most)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [N, C] of a batch (of whatever shape `loss=` understands, if that is given).

        Raises:
            DataError: the batch has no input field, or the net returns something that holds no logits.
        """
        if self.most is not None and not torch.is_grad_enabled() and not uses_batch_statistics(model):
            n, whole = self.size(batch), replace(self, most=None)
            parts = torch.arange(n, device="cpu").tensor_split(max(1, -(-n // self.most)))
            return torch.cat([whole.forward(model, take(batch, part, n)) for part in parts])
        if self.forward_hook is not None:
            out = self.forward_hook(model, batch)
            if not isinstance(out, Tensor):
                raise DataError(f"forward= must return the logits as one tensor, not {describe(out)}")
            return out
        if isinstance(batch, Mapping) and not any(isinstance(batch.get(k), Tensor) for k in INPUT_KEYS):
            self.inputs(batch)
            return _logits_of(model(**{k: v for k, v in batch.items() if k not in LABEL_KEYS}))
        return _logits_of(model(self.inputs(batch)))

    def inputs(self, batch: Batch) -> Tensor:
        """Return the input x of a batch (of a Hugging Face dict its main field)."""
        if isinstance(batch, Mapping):
            for key in INPUT_KEYS + NAMED_INPUT_KEYS:
                if isinstance(batch.get(key), Tensor):
                    return batch[key]
            raise DataError(
                f"a dict batch with the keys {sorted(map(str, batch))} has no known input field: pass forward="
            )
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            return batch[0]
        raise DataError(f"a batch must be (x, y) or a dict, not {describe(batch)}: pass forward= (and loss=)")

    def replace_inputs(self, batch: Batch, x: Tensor) -> Batch:
        """Return the batch with its input replaced by `x`; the given batch is left as it is."""
        self.inputs(batch)
        if isinstance(batch, Mapping):
            key = next(k for k in INPUT_KEYS + NAMED_INPUT_KEYS if isinstance(batch.get(k), Tensor))
            return {**batch, key: x}
        return (x, *batch[1:])

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels of a batch as int64 [N] (as they are, if `loss=` is given and they are no class indices).

        Raises:
            DataError: there are none, or they are no class indices and there is no `loss=`.
        """
        y = None
        if isinstance(batch, Mapping):
            y = next((batch[k] for k in LABEL_KEYS if k in batch), None)
            where = (
                f"a dict batch with the keys {sorted(map(str, batch))} has no labels (one of {', '.join(LABEL_KEYS)})"
            )
        else:
            where = f"a batch must be (x, y) with labels y, not {describe(batch)}"
            if isinstance(batch, (tuple, list)) and len(batch) > 1:
                y = batch[1]
        if y is None:
            raise DataError(where)
        if isinstance(y, (int, float)) or (isinstance(y, Tensor) and y.dim() == 0):
            raise DataError(
                "the data's items are single samples (one label each), not batches: pass batches, or a Dataset"
            )
        if not isinstance(y, Tensor):
            raise DataError(f"labels must be a tensor, not {describe(y)}")
        if self.loss_hook is None:
            check_labels(y)
        return y.long() if y.dtype in _INTEGERS else y

    def relabel(self, batch: Batch, y: Tensor) -> Batch:
        """Return the batch with its labels replaced by `y`; the given batch is left as it is."""
        if isinstance(batch, Mapping):
            key = next((k for k in LABEL_KEYS if k in batch), None)
            if key is None:
                raise DataError(f"a dict batch with the keys {sorted(map(str, batch))} has no labels to replace")
            return {**batch, key: y}
        return (batch[0], y, *batch[2:])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, [N]; by default the cross-entropy, which is -log p(y|x).

        Raises:
            DataError: logits and labels do not fit each other, or `loss=` does not return one number for each sample.
        """
        if self.loss_hook is not None:
            out = self.loss_hook(logits, batch)
            if not isinstance(out, Tensor) or out.dim() != 1:
                raise DataError(f"loss= must return one loss for each sample, shape [N], not {describe(out)}")
            self.check_count(out, batch, times=True)
            return out
        y = self.labels(batch)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise DataError(
                f"cross-entropy needs logits [N, C] with C > 1, not {list(logits.shape)}: pass loss= (and forward=)"
            )
        if logits.shape[0] != y.shape[0]:
            raise DataError(
                f"{y.shape[0]} labels for {logits.shape[0]} rows of logits: pass a forward= that gives one "
                "row for each sample"
            )
        if y.device.type == "cpu":  # elsewhere this would wait for the device; iter_batches has checked before the move
            check_labels(y, logits.shape[1])
        return F.cross_entropy(logits, y, reduction="none")

    def check_count(self, losses: Tensor, batch: Batch, times: bool = False) -> None:
        """Refuse losses that are not one for each sample (`times`: as many for each as for the others, tokens say).

        Raises:
            DataError: there are more or fewer.
        """
        try:
            n = self.size(batch)
        except DataError:  # fields of a form of the user's own
            return
        count = losses.shape[0]
        if count != n and not (times and n and count >= n and count % n == 0):
            raise DataError(f"loss= returned {count} losses for {n} samples: return one for each, shape [N]")

    def rows(self, n: int) -> slice:
        """Return which of n samples this process runs: all of them."""
        return slice(None)

    def size(self, batch: Batch) -> int:
        """Return N, the number of samples of a batch."""
        for field in (self.labels, self.inputs):
            try:
                value = field(batch)
            except DataError:
                continue
            if value.dim() > 0:
                return value.shape[0]
        # With both hooks the fields may have any names; what they share is the first dimension.
        fields = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
        for value in fields:
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        raise DataError(f"cannot tell how many samples are in {describe(batch)}")


def check_labels(y: Tensor, classes: int | None = None) -> None:
    """Check that `y` are class indices: integer, [N], and within 0 .. classes-1 if `classes` is given.

    Raises:
        DataError: they are not, with the remedy.
    """
    if y.dtype not in _INTEGERS:
        how = "y.argmax(1)" if _one_hot(y) else "y.flatten().long()" if y.dim() == 2 and y.shape[1] == 1 else "y.long()"
        how = f"give class indices, e.g. {how}, or " if y.dim() == 1 or _one_hot(y) or y.shape[1:] == (1,) else ""
        raise DataError(f"labels are {dtype_name(y)} {list(y.shape)}: {how}pass loss=")
    if y.dim() != 1:
        shape = f"labels have the shape {list(y.shape)}, not [N]"
        if _one_hot(y) or y.shape[1:] == (1,):
            how = "y.flatten()" if y.shape[1:] == (1,) else "y.argmax(1)"
            raise DataError(f"{shape}: give class indices, e.g. {how}, or pass loss=")
        raise DataError(
            f"{shape}, one for each position (token, pixel): pass a loss= that returns one loss for each sample"
        )
    if y.numel() == 0:
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or (classes is not None and high >= classes):
        bound = f"0..{classes - 1}" if classes is not None else "0..C-1"
        raise DataError(
            f"labels run from {low} to {high}, outside {bound}: number the classes from 0, as the model does"
        )


def _one_hot(y: Tensor) -> bool:
    """Whether labels [N, C] are class probabilities, of the kind 0, 0, 1 or softer."""
    if y.dim() != 2 or y.shape[1] < 2 or y.numel() == 0:
        return False
    return bool((y >= 0).all()) and bool(((y.double().sum(1) - 1).abs() < 1e-3).all())


def iter_batches(
    data: Iterable[Batch],
    task: Task | None = None,
    device: torch.device | str | None = None,
    classes: int | None = None,
) -> Iterator[Batch]:
    """Walk `data` once: yield its batches, checked, on `device`.

    Args:
        data: any iterable of batches; a `torch.utils.data.Dataset`, or an iterable of samples, whose labels are single
            numbers (both read in order, 128 at a time); or one batch: a tuple of tensors `(x, y)` or a dict of tensors.
        task: what a batch means; None: `Task()`.
        device: where the tensors go; None: they stay.
        classes: C where it is known; labels are then checked against it.

    Yields:
        batches, lists and named tuples in them turned into plain tuples; a batch of no samples is passed over.

    Raises:
        DataError: no batches at all, labels that are no class indices or out of range, uint8 images, NaN or Inf in
            inputs, no end, fewer batches than a loader of a stream has by its length, files that cannot be read. From
            the second batch on the error gives the number of the batch.
    """
    task = Task() if task is None else task
    seen, endless = 0, not _has_length(data)
    for number, raw in enumerate(read_batches(data), 1):
        batch = to_tensors(raw)
        try:
            n = _check_batch(batch, task, classes)
        except DataError as error:
            raise error if number == 1 else DataError(f"batch {number} of the data: {error}") from None
        if n == 0:
            continue
        seen += n
        if endless and seen > MOST_SAMPLES:
            raise DataError(f"the data gave {seen:,} samples and no end: pass what ends, such as a list or a Dataset")
        yield move_to(batch, device)
    if not seen:
        raise DataError(
            "the data gave no samples: an empty loader, or a generator that is used up (pass a list or a DataLoader)"
        )


def read_batches(data: Any) -> Iterator[Batch]:
    """Yield the batches of the data, unchecked: samples are put together, and errors of files say which."""
    walk, number = iter(batches_of(data)), 0
    while True:
        try:
            raw = next(walk)
        except StopIteration:
            break
        except Exception as error:
            from fastfip.data.streams import reading_error

            clear = reading_error(error, data, number + 1)
            if clear is None:
                raise
            raise clear from error
        number += 1
        if number == 1 and is_sample(raw):
            from fastfip.data.streams import collated

            yield from collated(itertools.chain([raw], walk))
            return
        yield raw
    if _is_stream(data) and _has_length(data) and number < len(data):
        raise DataError(
            f"the data ended after {number} of {len(data)} batches: the stream was interrupted, or its length is wrong"
        )


def _is_stream(data: Any) -> bool:
    loader = torch.utils.data.DataLoader
    return isinstance(data, loader) and isinstance(data.dataset, torch.utils.data.IterableDataset)


def is_sample(item: Any) -> bool:
    """Return whether an item of the data is one sample, not a batch: its label is a single number."""
    if isinstance(item, Mapping):
        if isinstance(item.get("__key__"), str):  # webdataset's
            return True
        y = next((item[key] for key in LABEL_KEYS if key in item), None)
    else:
        y = item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
    return isinstance(y, (int, float)) or (hasattr(y, "__array__") and getattr(y, "ndim", 1) == 0)


def _has_length(data: object) -> bool:
    try:
        len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return False
    return True


def batches_of(data: Any) -> Iterable[Batch]:
    """Return what a user passes as data as an iterable of batches, unchecked; see :func:`iter_batches`."""
    if isinstance(data, Mapping) or (
        isinstance(data, (tuple, list)) and len(data) > 1 and all(isinstance(v, Tensor) for v in data)
    ):
        return [data]
    if isinstance(data, Tensor):
        raise DataError("data is a single tensor: labels are needed as well, pass (x, y) or a DataLoader")
    dataset = torch.utils.data.Dataset
    if isinstance(data, dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        return torch.utils.data.DataLoader(data, batch_size=_DATASET_BATCH)
    if not isinstance(data, Iterable):
        raise DataError(f"data must be an iterable of batches, not {describe(data)}")
    return data


def check_inputs(batch: Batch, task: Task) -> None:
    """Check the inputs of one batch, unless `forward=` knows what they mean.

    Raises:
        DataError: uint8 images, NaN or Inf.
    """
    if task.forward_hook is not None:
        return
    x = task.inputs(batch)
    if x.dtype == torch.uint8 and x.dim() > 2:
        how = "scale them as the model expects, e.g. x.float() / 255, or pass fastfip.data.scaled(data, '01')"
        raise DataError(f"images are uint8 {list(x.shape)}: {how}")
    if x.is_floating_point() and x.dim() and x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).reshape(len(x), -1).any(1).sum())
        raise DataError(f"{bad} of {len(x)} samples hold NaN or Inf: leave them out, or check their scaling")


def _check_batch(batch: Batch, task: Task, classes: int | None) -> int:
    """Check one batch; return its number of samples."""
    check_inputs(batch, task)
    if task.loss_hook is None:
        y = task.labels(batch)
        if y.device.type == "cpu":
            check_labels(y, classes)
        if task.forward_hook is None and task.inputs(batch).shape[:1] != y.shape:
            raise DataError(f"{y.shape[0]} labels for inputs of shape {list(task.inputs(batch).shape)}")
    return task.size(batch)


def _logits_of(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise DataError(f"the model returned {describe(out)}: pass forward=, e.g. lambda model, batch: model(batch[0])[0]")
