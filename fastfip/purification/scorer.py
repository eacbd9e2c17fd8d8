"""What is measured before and after a purification."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fastfip.data.batch import Batch
from fastfip.data.cleanset import class_indices
from fastfip.data.stores import kept
from fastfip.data.task import Task, iter_batches
from fastfip.errors import FastFIPError, reason
from fastfip.methods.run import Run
from fastfip.metrics.evaluation import Evaluation, evaluate
from fastfip.nets.state import requires_grad
from fastfip.purification.workcopy import WorkCopy

__all__ = ["MEASURES", "Scorer"]

#: What `measure=` may name.
MEASURES = ("acc", "asr", "fisher_trace")
#: Clean samples on which the Fisher trace before and after is taken, at most.
TRACE_SAMPLES = 256


class Scorer:
    """Measures before and after on the same data."""

    def __init__(
        self,
        run: Run,
        work: WorkCopy,
        test_loader: Iterable[Batch] | None,
        asr_loader: Iterable[Batch] | None,
        measure: tuple[str, ...],
    ) -> None:
        self.run, self.work, self.task, self.measured = run, work, run.task, measure
        self.test, self.asr = _walked_again(test_loader), _walked_again(asr_loader)
        if run.clean.binary and self.test is not None:
            self.test = [class_indices(batch) for batch in iter_batches(self.test, Task(loss_hook=run.task.loss))]
        self.on = "test_loader"
        if self.test is None and "acc" in measure:
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
        self.sample: list[Batch] = []
        if "fisher_trace" in measure:
            order = itertools.islice(run.clean.batches(TRACE_SAMPLES // 4, device=run.device), 4)
            self.sample = list(order)  # kept, so that augmentation does not change it between before and after

    def measure(self) -> Evaluation:
        """Return the figures of the model as it is now; its time counts as evaluation."""
        run = self.run
        with run.timed("evaluation"):
            measured = evaluate(
                run.model,
                None if "acc" not in self.measured else self.clean.batches() if self.test is None else self.test,
                self.asr if "asr" in self.measured else None,
                forward=self.task.forward,
                loss=self.task.loss_hook,
            )
            return replace(measured, on=self.on, fisher_trace=self.trace() if self.sample else None)

    def trace(self) -> float | None:
        """Tr(F) of the empirical Fisher of all parameters, in eval mode; None and a note where it cannot be taken."""
        from fastfip.fisher import trace_and_logits

        task = self.task
        if self.work.is_low_precision:  # squares of small gradients would underflow
            self.work.to_float32()
            task = task.in_float32()
        try:
            with self.run.eval_mode(), requires_grad(self.run.model.parameters(), True):
                parts = [
                    (float(trace_and_logits(self.run.model, batch, task, create_graph=False).trace), task.size(batch))
                    for batch in self.sample
                ]
            return sum(trace * n for trace, n in parts) / sum(n for _, n in parts)
        except (FastFIPError, RuntimeError, NotImplementedError) as error:
            self.run.note(f"Fisher trace not measured: {reason(error)}")
            return None
        finally:
            if self.work.is_low_precision:
                self.work.to_own_dtype()


def _walked_again(data: Any) -> Any:
    """A generator is kept, so that it can be walked before and after."""
    return kept(data) if isinstance(data, Iterator) else data
