"""Read and write checkpoints: nothing in a file is ever run, nothing is loaded before all of it has been verified."""

from .arch import load_arch
from .load import Checkpoint, load_checkpoint
from .save import check_suffix, replacing, save_checkpoint

__all__ = ["Checkpoint", "check_suffix", "load_arch", "load_checkpoint", "replacing", "save_checkpoint"]
