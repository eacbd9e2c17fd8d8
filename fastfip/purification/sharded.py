"""A sharded model that is purified as it is: each process tunes its parts, and FSDP's passes gather unit after unit.

What cannot be done so is done on whole weights, which each process gathers (`Shards.twin`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastfip.data.batch import Batch, move_to
from fastfip.data.task import Task, iter_batches
from fastfip.errors import DataError, reason
from fastfip.fisher.sharded import in_step
from fastfip.methods.base import Method
from fastfip.methods.run import autocast_dtype
from fastfip.nets.ranks import LostRank, Ranks
from fastfip.nets.shards import Shards
from fastfip.nets.state import LOW_PRECISION, empty_caches, is_compiled, own_part
from fastfip.purification.workcopy import WorkCopy, check_tunable

__all__ = ["FromFirst", "PartsCopy", "own_passes", "walked_by_all", "why_whole"]

#: What gloo says, in its RuntimeError, of a process that is gone or that hangs.
_GONE = ("gloo", "Connection", "imed out", "ECONN", "peer")


def why_whole(
    shards: Shards,
    recipe: type[Method],
    device: torch.device | None,
    amp: bool | str,
    resume: bool,
    measure: Iterable[str],
    drawn: bool,
    budget: bool,
) -> str | None:
    """Return why a sharded model has to be purified as a whole; None: it is purified in its parts.

    Args:
        shards: the parts.
        recipe: the method.
        device: where to compute, None: where the model is.
        amp: as `purify` was given it.
        resume: whether a file to go on from was given.
        measure: what is measured.
        drawn: whether no samples were given.
        budget: whether a budget of memory was given.
    """
    own = [p.device for p in shards.parts.values()]
    everyone = sorted(dist.get_process_group_ranks(shards.group))
    meshes = {tuple(sorted(p.device_mesh.mesh.flatten().tolist())) for p in shards.parts.values()}  # type: ignore[attr-defined]
    if drawn:
        return "samples are drawn by its statistics"
    if not recipe.over_shards:
        return f"{recipe.name} needs whole weights"
    if shards.world < 2:
        return "one process has all parts"
    if shards.rewritten or meshes != {tuple(everyone)}:
        return "not all parts are those of FSDP2 over all processes"
    if any(p.dtype in LOW_PRECISION for p in shards.model.parameters()):
        return "weights of 16 bits are tuned in float32"
    if shards.has_policy:
        return "FSDP's policy has another precision or place than that of the parts, or a hook for its sums"
    if device is not None and any(device.type != d.type or device.index not in (None, d.index) for d in own):
        return "it is computed on another device than that of the parts"
    if is_compiled(shards.model):
        return "the model is compiled"
    if own[0].type == "cuda" and autocast_dtype(amp, own[0]) == torch.float16:
        return "gradients of float16 are scaled"
    if resume:
        return "a file to go on from holds whole weights"
    if budget:
        return "memory= counts whole weights (micro_batch= does not)"
    return "the Fisher trace is measured on whole weights" if "fisher_trace" in measure else None


class PartsCopy(WorkCopy):
    """A sharded net that is worked on itself, in place; values are kept, and brought back, in parts.

    Args:
        shards: its parts.
    """

    def __init__(self, shards: Shards) -> None:
        check_tunable(shards.model)
        self.shards, self.inplace, self.twin_of = shards, True, None
        self.given = self.whole = self.model = shards.model
        self._record(set())

    def moved(self) -> set[str]:
        """Return the names of parameters and buffers whose values are not those received, on any rank."""
        assert self.shards is not None
        self.shards.reshard()
        now = [*self.model.named_parameters(), *self.model.named_buffers()]
        odd = [not torch.equal(own_part(t), own_part(self.saved[name])) for name, t in now]
        counts = torch.tensor(odd, dtype=torch.int32, device=self.device)
        dist.all_reduce(counts, group=self.shards.group)
        return {name for (name, _), count in zip(now, counts.tolist()) if count}

    def finish(self, who: str) -> nn.Module:
        """Return the net with everything but the values as it was; see `WorkCopy.finish`."""
        assert self.shards is not None
        self.shards.reshard()
        return super().finish(who)

    def undo(self) -> None:
        """Bring everything back as it was, values too: each rank its parts, without the others."""
        assert self.shards is not None
        self.shards.reshard()
        super().undo()

    def _flags_and_homes(self) -> None:
        for name, module in self.model.named_modules():
            module.training = self.flags.get(name, module.training)
        for name, p in self.parameters.items():
            p.requires_grad_(self.requires_grad[name])
            p.grad = self.grads[name]
        empty_caches(self.model.modules())


@contextlib.contextmanager
def own_passes(shards: Shards, ranks: Ranks) -> Iterator[None]:
    """Let the passes of a sharded model in a block be what a purification needs of them.

    - FSDP takes the mean of the gradients over all ranks in every backward pass, whatever the user's own accumulation
      of gradients has set: weights of accumulated steps would stay whole, which costs what sharding saves.
    - After a pass without gradients no weights stay whole (`Shards.hook_passes`).
    - Before each pass the ranks meet: one that failed has left, which the others must not learn within FSDP's own
      collectives, where they would wait for the timeout of the group.

    Raises:
        BackendError: a process of the group is gone.
    """

    def meet(module: nn.Module, *_: object) -> None:
        if module is shards.model:  # a plain copy has the hook as well, and its passes are no matter of all ranks
            ranks.any(False)

    hooks = [shards.model.register_forward_pre_hook(meet, prepend=True), *shards.hook_passes()]
    try:
        with shards.plain_reductions():
            yield
    except LostRank:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _GONE):
            raise ranks.lost(error) from error
        raise
    finally:
        for hook in hooks:
            hook.remove()


def walked_by_all(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """Yield a rank's batches, and whether they count, for as many passes as the rank with the most batches makes.

    Raises:
        DataError: a rank has none.
    """
    for batch, counts in in_step(batches, ranks):
        if batch is None:
            raise DataError(f"rank {ranks.rank} was given no clean samples")
        yield batch, counts


class FromFirst:
    """Batches of rank 0, for all ranks: the passes that measure a sharded model are a matter of all of them."""

    def __init__(self, data: Any, ranks: Ranks, task: Task) -> None:
        self.data, self.ranks, self.task = data, ranks, task

    @classmethod
    def of(cls, data: Any, ranks: Ranks, task: Task) -> FromFirst | None:
        """Return the batches, None where rank 0 has none."""
        return cls(data, ranks, task) if ranks.from_first(data is not None) else None

    def __iter__(self) -> Iterator[Batch]:
        walk = iter(iter_batches(self.data, self.task)) if self.ranks.first else iter(())
        while True:
            sent: tuple[str, Any] = ("end", None)
            try:
                for batch in walk:
                    sent = ("batch", move_to(batch, "cpu"))
                    break
            except (DataError, OSError) as error:
                sent = ("error", reason(error))
            kind, value = self.ranks.from_first(sent)
            if kind == "error":
                raise DataError(value)
            if kind == "end":
                return
            yield value
