"""The received model beside the one that is tuned: a copy that is kept, or the received values in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fastfip.methods.run import Run
from fastfip.nets.parts import exchanged
from fastfip.nets.state import eval_mode, frozen_copy

__all__ = ["giving", "kept_received"]


def kept_received(run: Run, known: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return what `giving` needs to give the model as it is now, before anything is tuned.

    It is a copy in eval mode. Of a model of which each process has a part torch makes no copy; it is the model itself.

    Args:
        run: its received values are not copied.
        known: more received values by name, which somebody keeps.
    """
    return run.model if run.shards is not None else frozen_copy(run.model, {**run.received, **(known or {})})


def giving(run: Run, kept: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    """Give the received model for a block, in eval mode, for passes without gradients.

    Args:
        run: the run.
        kept: what `kept_received` returned.
    """
    return contextlib.nullcontext(kept) if run.shards is None else _in_its_place(run)


@contextlib.contextmanager
def _in_its_place(run: Run) -> Iterator[nn.Module]:
    """Exchange the tuned values with the received ones for a block: `run.received` holds the tuned ones meanwhile."""
    assert run.shards is not None
    run.shards.reshard()
    now = [*run.model.named_parameters(), *run.model.named_buffers()]
    with exchanged([(t, run.received[name]) for name, t in now]), eval_mode(run.model):
        yield run.model
