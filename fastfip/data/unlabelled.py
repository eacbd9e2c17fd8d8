"""Clean samples without labels: the model's own answers serve as labels, since on clean samples it is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, move_to, to_tensors
from fastfip.data.stores import DEFAULT_BATCH, Live, live_loader
from fastfip.data.task import LABEL_KEYS, Task
from fastfip.errors import DataError
from fastfip.nets.state import eval_mode

__all__ = ["with_answers"]


def with_answers(model: nn.Module, data: Any, task: Task, device: torch.device) -> tuple[Any, bool]:
    """Return the data with the model's answers as labels, if it has none, and whether it had none.

    Args:
        model: answers in eval mode.
        data: what a user passes as clean data; without labels it may be a tensor of inputs [N, ...] as well, or batches
            that are such a tensor, a tuple of one, or a dict without a field of labels. It is read into memory then.
        task: how the model takes a batch; with `loss=` nothing is done, because labels may be of any form.
        device: where the model is.

    Raises:
        DataError: outputs that no class can be read off.
    """
    if task.loss_hook is not None or data is None:
        return data, False
    batches, known = _batches(data)
    if known or batches is None:
        return data if batches is None else batches, False
    return list(_answered(model, batches, task, device)), True


def _batches(data: Any) -> tuple[Iterable[Batch] | None, bool]:
    """Return the batches of the data (None: as it was given) and whether they have labels."""
    if isinstance(data, Tensor):
        return (data.split(DEFAULT_BATCH) if data.dim() > 1 else None), data.dim() <= 1
    if isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and data and isinstance(data[0], Tensor)):
        return [data], not _lacks_labels(data)
    live = live_loader(data)
    if live is not None:
        loader, index, size = live
        store = Live(loader)
        if len(index) == 0 or not _lacks_labels(store.get(index[:1].tolist())):
            return None, True
        return store.loader(chunk.tolist() for chunk in index.split(size)), False
    if not isinstance(data, Iterable):
        return None, True
    if isinstance(data, (list, tuple)):
        return data, not (data and _lacks_labels(data[0]))
    walk = iter(data)
    first = list(itertools.islice(walk, 1))
    # A loader gives its batches anew; what is used up by reading goes on from the one that was taken.
    whole = data if iter(data) is not walk else itertools.chain(first, walk)
    return whole, not (first and _lacks_labels(first[0]))


def _lacks_labels(batch: Batch) -> bool:
    batch = to_tensors(batch)
    if isinstance(batch, Mapping):
        numbers = any(isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point() for v in batch.values())
        return not numbers and not any(key in batch for key in LABEL_KEYS)  # numbers: labels by a name of their own
    if isinstance(batch, tuple):
        return len(batch) == 1 and isinstance(batch[0], Tensor) and batch[0].dim() > 1
    return isinstance(batch, Tensor) and batch.dim() > 1


@torch.no_grad()
def _answered(model: nn.Module, batches: Iterable[Batch], task: Task, device: torch.device) -> Iterator[Batch]:
    with eval_mode(model):
        for raw in batches:
            batch = to_tensors(raw)
            batch = (batch,) if isinstance(batch, Tensor) else batch
            out = task.forward(model, move_to(batch, device))
            if out.dim() == 2 and out.shape[1] > 1:
                y = out.argmax(1)
            elif out.dim() == 1 or (out.dim() == 2 and out.shape[1] == 1):
                y = (out.reshape(-1) > 0).long()
            else:
                raise DataError(
                    f"the clean data has no labels, and none can be read off outputs of shape {list(out.shape)}: pass "
                    "(x, y)"
                )
            y = y.cpu()
            yield {**batch, LABEL_KEYS[0]: y} if isinstance(batch, Mapping) else (*batch, y)
