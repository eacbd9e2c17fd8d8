"""How much of a batch goes through the model together, and what that is checked for."""

from __future__ import annotations

from fastfip.errors import ConfigError
from fastfip.methods import Method
from fastfip.methods.run import Run

__all__ = ["check_micro_batch", "note_statistics", "takes_parts"]


def takes_parts(recipe: type[Method]) -> bool:
    """Return whether a method can take a step's batch in parts: with the base's `backward`, or one that says so."""
    return recipe.takes_parts or recipe.backward is Method.backward


def check_micro_batch(micro_batch: int | None, recipe: type[Method]) -> None:
    """Refuse a micro_batch that is none, or that the method has no use for.

    Raises:
        ConfigError: with the remedy.
    """
    if micro_batch is None:
        return
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch!r}: give a number of samples, 1 or more, or None")
    if not takes_parts(recipe):
        raise ConfigError(
            f"micro_batch={micro_batch}: a step of {recipe.name} is no sum over samples that could go through the model "
            "in parts: leave it out and take a smaller batch_size, or take fisher_steps, fast_wfip or fine_tune"
        )


def note_statistics(run: Run) -> None:
    """Say where parts are not the same as the whole batch."""
    if run.micro_batch is not None and run.config.bn_mode == "train" and run.batchnorms:
        run.note(
            f"micro_batch={run.micro_batch}: BatchNorm is in train mode and takes its statistics from each part of a "
            "batch, so steps are not those of whole batches (bn_mode='eval' makes them so)"
        )
