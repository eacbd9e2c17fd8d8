"""What a batch is, how a model meets it, and the clean samples."""

from __future__ import annotations

from fastfip.data.batch import Batch, move_to, pick, take, to_tensors
from fastfip.data.outputs import looks_like_probabilities
from fastfip.data.streams import reservoir, scaled
from fastfip.data.task import (
    Forward,
    Loss,
    Task,
    batches_of,
    check_labels,
    iter_batches,
)

__all__ = [
    "Batch",
    "Forward",
    "Loss",
    "Task",
    "batches_of",
    "check_labels",
    "iter_batches",
    "looks_like_probabilities",
    "move_to",
    "pick",
    "reservoir",
    "scaled",
    "take",
    "to_tensors",
]
