"""Which classes keep their label when an image is mirrored: the received model tells, on clean samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.data.augment import mirrored
from fastfip.methods.base import Run

__all__ = ["symmetric_classes"]

#: A class is mirrored if the received model is right on so many times as many of its mirror images as of its images.
SYMMETRIC = 0.9
#: Clean inputs that are looked at, in bytes.
MOST_BYTES = 128 << 20


@torch.no_grad()
def symmetric_classes(run: Run, classes: int) -> Tensor | None:
    """Return which classes [classes] (bool) may be mirrored; None: none.

    Those whose mirror images the received model answers as labelled, nearly as often as the images themselves: photos
    of things, not digits or signs to the left. Only clean samples and the received model's answers decide.
    """
    right = torch.zeros(2, classes, device="cpu", dtype=torch.float32)
    bytes_seen = 0
    with run.eval_mode():
        for batch in run.clean.batches(device=run.device):
            y = run.task.labels(batch).cpu()
            other = mirrored(run.task, batch, torch.ones(len(y), dtype=torch.bool, device="cpu"))
            if other is None:
                return None
            for row, of in zip(right, (batch, other)):
                row.index_add_(0, y, (run.forward(of).argmax(1).cpu() == y).float())
            bytes_seen += run.task.inputs(batch).nbytes
            if bytes_seen >= MOST_BYTES:
                break
    out = (right[1] > 0) & (right[1] >= SYMMETRIC * right[0])
    return out if bool(out.any()) else None
