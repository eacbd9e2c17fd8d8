"""What a method found on its way, kept small for the report: the worst-case changes, the samples left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastfip.data.batch import Batch
from fastfip.errors import DataError
from fastfip.methods.run import Run
from fastfip.reporting.pictures import of_change, of_input
from fastfip.worst_case.goals import TowardsClass

if TYPE_CHECKING:
    from fastfip.worst_case.universal import Perturbations

__all__ = ["MOST_CLASSES", "MOST_SAMPLES", "Thumbnails", "keep_changes"]

#: Classes whose change is kept, those first that it reaches best: at most 150 KB.
MOST_CLASSES = 12
#: Samples that are kept as pictures, and the pixels of their longer side: at most 170 KB.
MOST_SAMPLES, SAMPLE_PIXELS = 24, 48


@torch.no_grad()
def keep_changes(run: Run, worst: Perturbations) -> None:
    """Keep the changes of the classes that are reached best, as they were found on the received model.

    Nothing is kept where there are no classes, nor of vectors of tokens, which cannot be shown.
    """
    if run.classes is None or worst.of_tokens:
        return
    first = worst.success.argsort(descending=True, stable=True)[:MOST_CLASSES]
    rows = worst.store.rows(first).float().cpu().numpy()
    shown = [of_change(row) for row in rows]
    run.found["changes"] = {
        "classes": (worst.goal.class_of(first) if isinstance(worst.goal, TowardsClass) else first).tolist(),
        "success": worst.success[first].tolist(),
        "size": worst.relative_radius,
        "bound": [bound for _, bound in shown],
        "pictures": np.stack([picture for picture, _ in shown]),
    }


class Thumbnails:
    """Pictures of samples, taken while batches with them are walked for another reason: nothing is read for them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs: list[np.ndarray] = []
        self.labels: list[int] = []

    def add(self, batch: Batch, which: torch.Tensor) -> None:
        """Take the samples `which` [N] (bool) of a batch, until there are enough of them; only images are taken."""
        try:
            x, y = self.run.task.inputs(batch), self.run.task.labels(batch)
        except DataError:
            return
        room = MOST_SAMPLES - len(self.inputs)
        if not x.is_floating_point() or x.dim() not in (3, 4) or room <= 0:
            return
        places = torch.nonzero(which).flatten()[:room]
        self.inputs += list(x[places.to(x.device)].float().cpu().numpy())
        self.labels += y[places.to(y.device)].tolist()

    def keep(self) -> None:
        """Hand them to the result."""
        if len({x.shape for x in self.inputs}) != 1:
            return
        stack = np.stack(self.inputs)
        axes: Any = (0, *range(2, stack.ndim)) if stack.ndim == 4 else None
        low, high = (f(axis=axes, keepdims=True) for f in (stack.min, stack.max))
        low, high = (v[0] if stack.ndim == 4 else v for v in (low, high))
        pictures = [of_input(x, low, high, SAMPLE_PIXELS) for x in stack]
        self.run.found["left_out"] = {"labels": self.labels, "pictures": np.stack(pictures)}
