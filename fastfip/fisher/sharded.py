"""The Fisher diagonal of an FSDP2 model in its own passes: no rank ever has all weights, or all of the diagonal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfip.data.batch import Batch, move_to
from fastfip.data.task import Task
from fastfip.errors import ModelError
from fastfip.fisher.graph.forms import GradientForm, Workspace
from fastfip.fisher.graph.plan import Plan, UseGroup, read_graph, selected
from fastfip.fisher.graph.verify import Cache, known_plan, plan_for
from fastfip.fisher.labels import LabelledPass, Labels
from fastfip.fisher.modes import fit_for_fisher, naming_precision, readable
from fastfip.fisher.result import FisherDiagonal
from fastfip.nets.ranks import Ranks
from fastfip.nets.shards import Shards
from fastfip.ops.memory import accumulation_dtype

__all__ = ["compare_on_all", "in_units"]

_TRIES = 4  # of a verification that saw too little


def shown_to_all(batch: Batch | None, ranks: Ranks, device: Any) -> Batch | None:
    """Return the batch of the first rank that gives one, on every rank; None: nobody does."""
    given = ranks.objects(None if batch is None else move_to(batch, "cpu"))
    found = next((one for one in given if one is not None), None)
    return None if found is None else move_to(found, device)


def compare_on_all(shards: Shards, ranks: Ranks, task: Task, batch: Batch) -> None:
    """See whether whole weights compute what the parts do, on the batch of rank 0; see `Shards.compare`."""
    if shards.rewritten:
        shards.compare(task.forward, shown_to_all(batch, ranks, ranks.device))


def in_step(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """Yield a rank's batches, and whether they count: a rank that has no more gives its last until all are done.

    FSDP gathers weights in every pass, and so all ranks have to make as many.
    """
    walk, last = iter(batches), None
    while True:
        batch = next(walk, None)
        if not ranks.any(batch is not None):
            return
        last = last if batch is None else batch
        yield last, batch is not None


class PartSums:
    """Sums over the ranks of squared per-sample gradients: of each parameter a rank keeps its part.

    One parameter at a time is whole on a rank, in the walk backward.
    """

    def __init__(self, shards: Shards, ranks: Ranks, params: Mapping[str, Tensor], backend: str) -> None:
        self.shards, self.ranks, self.workspace = shards, ranks, Workspace(backend=backend)
        self.shapes = {name: (p.shape, accumulation_dtype(p.dtype), p.device) for name, p in params.items()}
        self.out: dict[str, Any] = {}
        self.coverage: dict[str, str] = {}
        for name in params:
            self._keep(name, self._nothing(name))

    def add(self, plan: Plan, weights: Tensor) -> None:
        """Add a batch, every sample's loss multiplied by its weight first; all ranks have graphs of one kind."""
        left = {name: len(groups) for name, groups in plan.groups.items()}
        open_: dict[str, Tensor] = {}

        def take(group: UseGroup, form: GradientForm) -> None:
            name = group.chain.param
            if name not in open_:
                open_[name] = self._nothing(name)
            form.add_squares(group.chain.view(open_[name]), None, self.workspace)
            left[name] -= 1
            if not left[name]:
                self._share(name, open_.pop(name))

        with torch.no_grad():
            plan.forms(take, weights)
            for name in sorted(name for name, uses in left.items() if uses):  # a use without a gradient
                self._share(name, open_.pop(name, None))
        self.coverage.update({name: plan.coverage(name) for name in self.shapes})

    def _nothing(self, name: str) -> Tensor:
        shape, dtype, device = self.shapes[name]
        return torch.zeros(shape, dtype=dtype, device=device)

    def _share(self, name: str, mine: Tensor | None) -> None:
        mine = self._nothing(name) if mine is None else mine
        self.ranks.sum_([mine], "fisher")
        self._keep(name, mine)

    def _keep(self, name: str, total: Tensor) -> None:
        part: Any = self.shards.part(name, total)
        if name in self.out:
            self.out[name].add_(part)
        else:
            self.out[name] = part


class InUnits:
    """Makes plans of a sharded model's graphs, about which all ranks know the same.

    A verification takes more passes than a known graph, and how many depends on the batch: all ranks verify on one
    batch, and never on different ones.
    """

    def __init__(self, shards: Shards, ranks: Ranks, names: Iterable[str], temperature: float) -> None:
        units = shards.unsharded()
        every = {name: p for unit in units for name, p in unit.items()}
        self.params = {name: every[name] for name in names}
        self.pieces = [[name for name in unit if name in self.params] for unit in units]
        self.model, self.ranks, self.temperature = shards.model, ranks, temperature
        self.device = next(iter(self.params.values())).device
        self.cache: Cache = {}

    def forward(self, task: Task, batch: Batch) -> Tensor:
        """Return the outputs of a batch, with their graph."""
        with naming_precision(self.params.values(), batch), torch.enable_grad(), readable(self.model):
            outputs = task.forward(self.model, batch)
            return outputs if self.temperature == 1 else outputs / self.temperature

    def verify(self, one: LabelledPass) -> bool:
        """Verify on a batch that all ranks have; return whether that gave a plan with rules for all parameters."""
        with torch.enable_grad():
            losses = one.task.loss(self.forward(one.task, one.batch), one.batch)
            reading = read_graph(losses, self.params)
            first = [site.recipe.layouts[0] for site in reading.sites]
            plan = Plan(losses, self.params, reading, first, reading.at_root).routed()
            if plan.pulled or plan.loop:  # looking closer takes weights that have no memory outside of their units
                return False
            for _ in range(_TRIES):
                plan = plan_for(losses, self.params, self.cache, [piece for piece in self.pieces if piece])
                if known_plan(losses, self.params, self.cache) is not None:
                    return not plan.pulled and not plan.loop
        return False

    def plan(self, one: LabelledPass, outputs: Tensor) -> Plan:
        """Return the plan of a rank's own batch, given its outputs.

        Raises:
            ModelError: the batch of some rank makes a graph that rules do not serve, other than the first batch's.
        """
        with torch.enable_grad():
            losses = one.task.loss(outputs, one.batch)
            found = known_plan(losses, self.params, self.cache)
            unknown = self.ranks.objects(found is None)
            if found is not None and not any(unknown):
                return found
            del losses, outputs, found  # with the graph, before the passes of others
            for rank, odd in enumerate(unknown):
                shown = shown_to_all(one.batch if odd and rank == self.ranks.rank else None, self.ranks, self.device)
                if shown is not None and not self.verify(one._replace(batch=shown)):
                    break
            losses = one.task.loss(self.forward(one.task, one.batch), one.batch)
            found = known_plan(losses, self.params, self.cache)
        if self.ranks.any(found is None or bool(found.pulled or found.loop)):
            raise ModelError(
                "the model's passes differ from batch to batch, and some cannot be taken apart in a sharded model: "
                "give batches of one size, or take the model as it was before fully_shard"
            )
        assert found is not None
        return found


def in_units(
    shards: Shards,
    batches: Iterable[Batch],
    task: Task,
    labels: Labels,
    *,
    takes_logits: bool,
    temperature: float,
    params: Iterable[str] | None,
    backend: str,
    group: Any,
    seed: int,
) -> tuple[FisherDiagonal | None, Iterable[Batch]]:
    """Return the diagonal, None where rules do not serve all parameters, and the batches that are left to read then."""
    model, walk = shards.model, iter(batches)
    names = list(selected(model, params, parts=True))
    with Ranks.of(group, shards.parts.values(), "fisher_diagonal") as ranks:
        assert ranks is not None
        units = InUnits(shards, ranks, names, temperature)
        first = next(walk, None)
        shown = shown_to_all(first, ranks, units.device)
        task = fit_for_fisher(model, task, shown, takes_logits)
        outputs = units.forward(task, shown).detach()
        one = next(labels.passes(task, shown, outputs, torch.Generator().manual_seed(seed)))
        walk = itertools.chain([] if first is None else [first], walk)
        if not units.verify(one):
            shards.reshard()
            return None, walk
        generator = torch.Generator().manual_seed(seed + ranks.rank * 1_000_003)
        total, count = PartSums(shards, ranks, units.params, backend), 0
        for batch, counts in in_step(walk, ranks):
            outputs = units.forward(task, batch)
            one = next(labels.passes(task, batch, outputs, generator))
            plan = units.plan(one, outputs)
            total.add(plan, torch.full_like(plan.losses.detach(), float(counts)))
            count += plan.samples if counts else 0
            del outputs, one, plan  # with the graph, before the next batch
        count = round(ranks.number(count))
    shards.reshard()
    for value in total.out.values():
        value.div_(count)
    return FisherDiagonal(total.out, total.coverage, count, labels.kind), walk
