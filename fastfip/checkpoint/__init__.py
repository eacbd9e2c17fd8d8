"""Read and write checkpoints: nothing in a file is ever run, nothing is loaded before all of it has been verified."""

from fastfip.checkpoint.arch import load_arch
from fastfip.checkpoint.inspection import inspect_file
from fastfip.checkpoint.load import Checkpoint, load_checkpoint
from fastfip.checkpoint.save import check_suffix, save_checkpoint
from fastfip.reporting.files import replacing

__all__ = ["Checkpoint", "check_suffix", "inspect_file", "load_arch", "load_checkpoint", "replacing", "save_checkpoint"]
