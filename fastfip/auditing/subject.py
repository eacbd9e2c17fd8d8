"""The nets that an audit looks at: copies that run in full precision, checked before the search."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastfip.data.batch import Batch, float32_batch
from fastfip.data.cleanset import CleanSet
from fastfip.data.outputs import first_outputs, logits_task
from fastfip.data.task import Task
from fastfip.errors import DataError, ModelError
from fastfip.nets.state import LOW_PRECISION, cast, copied, dtypes_of, to_float32

__all__ = ["Subject", "about", "subjects_of"]


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Name `purified=` in what is wrong with the purified net."""
    try:
        yield
    except (ModelError, DataError) as error:
        if name == "received":
            raise
        raise ModelError(f"purified=: {error}: give the same model after its purification") from error


@dataclass(frozen=True)
class Subject:
    """A copy of a net, in eval mode on the device; `task` gives its logits [N, C], `classes` is C.

    `wide`: weights and inputs of 16 bits are in float32. Changes and gradients are too small for 16 bits, and CPUs
    lack half of the operations.
    """

    name: str
    model: nn.Module
    task: Task
    classes: int
    wide: bool

    def given(self, batch: Batch) -> Batch:
        """Return a batch of the user's as this net takes it."""
        return float32_batch(batch) if self.wide else batch


def subjects_of(
    nets: Mapping[str, nn.Module], clean: CleanSet, task: Task, device: torch.device, notes: list[str]
) -> list[Subject]:
    """Copy the nets and run each once.

    Raises:
        ModelError: a net that cannot be copied, does not fit the data, or has not the classes of the other.
        DataError: no logits.
    """
    batch = next(iter(clean.batches(device=device)))
    tensors = [t for net in nets.values() for t in (*net.parameters(), *net.buffers())]
    low = any(t.dtype in LOW_PRECISION for t in tensors)
    subjects: list[Subject] = []
    for name, net in nets.items():
        with about(name):
            subjects.append(_subject(name, net, batch, task, device, low, notes))
    if len({one.classes for one in subjects}) > 1:
        counts = " and ".join(f"the {one.name} model has {one.classes} classes" for one in subjects)
        raise ModelError(f"{counts}: purified= must be the same model after its purification")
    return subjects


def _subject(
    name: str, net: nn.Module, batch: Batch, task: Task, device: torch.device, low: bool, notes: list[str]
) -> Subject:
    model = copied(net, "an audit works on a copy: keep its tensors as parameters or buffers")
    model.zero_grad(set_to_none=True)
    model = model.to(device).eval()
    wide = False
    if low:
        own = dtypes_of(model)
        to_float32(model)
        try:
            with torch.no_grad():
                task.in_float32().forward(model, batch)
            task, wide, said = task.in_float32(), True, "the weights have 16 bits: the audit works on copies in float32"
        except RuntimeError:
            cast(model, own)
            said = "the model itself computes in low precision: it is audited in its own dtype"
        notes += [said] if said not in notes else []
    out = first_outputs(model, task.forward, batch)
    if out.dim() != 2 or out.shape[1] < 2:
        raise DataError(f"an audit needs logits [N, C] with C > 1, not {list(out.shape)}: pass forward=")
    if out.shape[0] != task.size(batch):
        raise DataError(
            f"{task.size(batch)} samples give {out.shape[0]} rows of logits: pass a forward= that gives one row "
            "for each sample"
        )
    task, probabilities = logits_task(model, task, batch, out)
    if probabilities is not None and probabilities not in notes:
        notes.append(probabilities)
    return Subject(name, model, task, out.shape[1], wide)
