"""What is measured before and after a purification."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastfip.data.task import Batch, Task
from fastfip.errors import FastFIPError
from fastfip.methods.run import Run
from fastfip.metrics.evaluation import Evaluation, evaluate
from fastfip.purification.workcopy import WorkCopy

__all__ = ["Scorer", "float32_batch", "in_float32"]

#: Clean samples on which the Fisher trace before and after is taken, at most.
TRACE_SAMPLES = 256


class Scorer:
    """Measures before and after on the same data."""

    def __init__(self, run: Run, work: WorkCopy, test_loader: Iterable[Batch] | None, asr_loader: Any) -> None:
        self.run, self.work, self.task = run, work, run.task
        self.test, self.asr = _twice(test_loader), _twice(asr_loader)
        self.on = "test_loader"
        if self.test is None:
            own = run.clean if run.heldout is None else run.heldout
            what = "clean samples tuned on" if run.heldout is None else "held-out clean samples"
            self.clean = own.in_memory()
            self.on = f"{own.n} {what}"
            run.note(f"no test_loader: ACC and loss are of the {self.on}")
        given = [name for name, data in (("test_loader", test_loader), ("asr_loader", asr_loader)) if data is not None]
        if given:
            run.note(
                f"{' and '.join(given)} only scored: nothing was selected by {'it' if len(given) == 1 else 'them'}"
            )
        order = itertools.islice(run.clean.batches(TRACE_SAMPLES // 4, device=run.device), 4)
        self.sample = list(order)  # kept, so that augmentation does not change it between before and after

    def measure(self) -> Evaluation:
        """Return the figures of the model as it is now; its time counts as evaluation."""
        run = self.run
        with run.timed("evaluation"):
            found = evaluate(
                run.model,
                self.clean.batches() if self.test is None else self.test,
                self.asr,
                forward=self.task.forward,
                loss=self.task.loss_hook,
            )
            return replace(found, on=self.on, fisher_trace=self.trace())

    def trace(self) -> float | None:
        """Tr(F) of the empirical Fisher of all parameters, in eval mode; None and a note where it cannot be taken."""
        from fastfip.fisher import trace_and_logits

        task = self.task
        flags = [(p, p.requires_grad) for p in self.run.model.parameters()]
        if self.work.is_low_precision:  # squares of small gradients would underflow
            self.work.to_float32()
            task = in_float32(task)
        try:
            for p, _ in flags:
                p.requires_grad_(p.is_floating_point())
            with self.run.eval_mode():
                found = [
                    (float(trace_and_logits(self.run.model, batch, task, create_graph=False).trace), task.size(batch))
                    for batch in self.sample
                ]
            return sum(trace * n for trace, n in found) / sum(n for _, n in found)
        except (FastFIPError, RuntimeError, NotImplementedError) as error:
            self.run.note(f"Fisher trace not measured: {' '.join(str(error).split())[:200]}")
            return None
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
            if self.work.is_low_precision:
                self.work.to_own_dtype()


def _twice(data: Any) -> Any:
    """A generator is kept, so that it can be walked before and after."""
    return list(data) if isinstance(data, Iterator) else data


def in_float32(task: Task) -> Task:
    """Return the task for a net in float32 whose batches are of lower precision."""
    return Task.of(lambda model, batch: task.forward(model, float32_batch(batch)), task.loss_hook)


def float32_batch(batch: Batch) -> Batch:
    """Return a (nested) batch with its float16 and bfloat16 tensors in float32; all else stays as it is."""
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype in (torch.float16, torch.bfloat16) else batch
    if isinstance(batch, Mapping):
        return {k: float32_batch(v) for k, v in batch.items()}
    return tuple(float32_batch(v) for v in batch) if isinstance(batch, (tuple, list)) else batch
