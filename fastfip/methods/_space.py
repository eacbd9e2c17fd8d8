"""What a method moves in: the weights themselves, or their spectral shifts.

Both give a method the same things: tensors that are tuned, their Fisher diagonal, and the Fisher trace of a batch.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.errors import ConfigError
from fastfip.fisher import FisherPenalty, draw_labels, fisher_diagonal, squared_norms
from fastfip.fisher.labels import Kind
from fastfip.fisher.modes import readable
from fastfip.methods._received import giving, kept_received
from fastfip.methods.base import Groups, Method, Run
from fastfip.nets.process import keeping_activations
from fastfip.nets.state import requires_grad
from fastfip.spectral import Rank, SpectralShifts
from fastfip.spectral.fisher import delta_gradients, gradients_of_one, recording
from fastfip.spectral.places import may_be_map, seen_as_maps

__all__ = ["Space", "SpaceMethod", "Spectral", "Weights"]

#: Clean samples that the Fisher diagonal of the received net is taken over; more change it by less than its own spread.
FISHER_SAMPLES = 512
#: A sample whose gradients are read from the graph takes up to so many times the memory of one that is learned from:
#: the gradient at each layer's output is kept, and attention is not fused.
FISHER_SHARE = 3


class Space(ABC):
    """The coordinates in which a method moves. `tensors` are the leaves that are tuned."""

    tensors: list[Tensor]

    @abstractmethod
    def groups(self, run: Run) -> Groups:
        """Return the optimiser's parameter groups."""

    def begin(self) -> None:  # noqa: B027
        """Do what comes before the forward passes of a step."""

    def end(self) -> None:  # noqa: B027
        """Do what comes after the backward passes of a step."""

    @abstractmethod
    def diagonal(self, run: Run, kind: Kind) -> list[Tensor]:
        """Return the Fisher diagonal of the clean set for each of `tensors`, BatchNorm in eval mode."""

    @abstractmethod
    def trace(self, run: Run, batch: Batch) -> Tensor:
        """Return Tr(F) of a batch, differentiable with respect to `tensors`; BatchNorm in eval mode."""

    def inputs_only(self) -> contextlib.AbstractContextManager[None]:
        """Say that the backward passes of a block are for gradients of inputs."""
        return contextlib.nullcontext()

    def as_function(self) -> contextlib.AbstractContextManager[None]:
        """Make the model's outputs differentiable functions of `tensors`, more than once, for a block."""
        return contextlib.nullcontext()

    @abstractmethod
    def keep_received(self, run: Run) -> None:
        """Keep what `received` needs; nothing was tuned yet."""

    @abstractmethod
    def received(self, run: Run) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the model as it was received for a block, in eval mode, for passes without gradients."""

    def leave(self, fold: bool) -> None:  # noqa: B027
        """Give the model its own weights back: the tuned ones (`fold`) or those from before."""


class Weights(Space):
    """Every parameter."""

    def __init__(self, run: Run) -> None:
        tuned = {n: p for n, p in run.model.named_parameters() if p.is_floating_point() and id(p) not in run.frozen}
        self.names, self.tensors = list(tuned), list(tuned.values())
        self.penalty: FisherPenalty | None = None
        self.twin: nn.Module | None = None
        self.signs: Tensor | None = None  # state of the penalty's generator, where a broken run goes on

    def keep_received(self, run: Run) -> None:
        """Keep the model as it is now; the received weights are not copied where somebody has them."""
        self.twin = kept_received(run)

    def received(self, run: Run) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the model that was kept."""
        assert self.twin is not None
        return giving(run, self.twin)

    def groups(self, run: Run) -> Groups:
        """All of them at the same step size."""
        return [{"params": self.tensors}]

    def diagonal(self, run: Run, kind: Kind) -> list[Tensor]:
        """Return the diagonal of the Fisher of the weights."""
        diagonal = _diagonal(run, kind, self.names)
        return [diagonal[name] for name in self.names]

    def trace(self, run: Run, batch: Batch) -> Tensor:
        """Return the trace over all weights, its gradient by the way of the settings (`FisherPenalty`)."""
        if self.penalty is None:
            way: Any = getattr(run.config, "trace_way", "auto")
            if run.ranks is not None:  # the other ways draw for a batch as a whole
                if way not in ("auto", "exact"):
                    raise ConfigError(f"trace_way={way!r} works in one process: take 'exact', or group=None")
                way = "exact"
            task = run.task
            self.penalty = FisherPenalty(
                run.model, way, self.names, forward=task.forward_hook, loss=task.loss_hook, seed=run.seed
            )
            if self.signs is not None:
                self.penalty._generator.set_state(self.signs.cpu())
        mine, weight = _mine(run, batch)
        with run.eval_mode():
            trace = run.total(self.penalty(mine) * weight)
        run.note(f"gradient of the Fisher trace: {self.penalty.way}, {self.penalty.reason}")
        return trace


class Spectral(Space):
    """The spectral shift of every Linear and convolution weight; with `affine` also biases and norm layers' affine.

    All of them have one step size; `trust` shortens the steps of the coordinates that the clean Fisher needs.
    """

    def __init__(self, run: Run, affine: bool, rank: Rank = None, cache: str | None = None) -> None:
        unknown = may_be_map(run.model, run.frozen)
        seen: dict[int, bool] = {}
        if unknown:
            with run.eval_mode(), torch.no_grad(), seen_as_maps(unknown) as seen:
                run.forward(next(iter(run.clean.batches(2, device=run.device))))
        with run.timed("svd"):
            self.shifts = SpectralShifts.of(run.model, rank, run.frozen, seen, cache)
        self.shifts.frugal = run.micro_batch is not None
        self.old: list[tuple[Tensor, Tensor]] = []
        shifted = {id(w) for w in self.shifts.weights}
        named = dict(run.model.named_parameters())
        self.affine = [
            name
            for name, p in named.items()
            if affine
            and p.is_floating_point()
            and _is_affine(name, p)
            and id(p) not in shifted
            and id(p) not in run.frozen
        ]
        self.affine_tensors: list[Tensor] = [named[name] for name in self.affine]
        self.tensors = [*self.shifts.deltas, *self.affine_tensors]
        for shift in self.shifts.shifts:
            if not bool(shift.sigma.any()):
                run.left[shift.names[0]] = "it is zero, and so are its singular values: take wfip or fine_tune"
        for name, p in named.items():
            if id(p) not in shifted and name not in self.affine:
                run.left[name] = "biases and the affine of norm layers only with affine=True"
                if not _is_affine(name, p):
                    run.left[name] = "no linear map was seen in its use, so it has no singular directions that mean one"

    def groups(self, run: Run) -> Groups:
        """All of them at the same step size; `trust` shortens it where the Fisher is large."""
        return [{"params": self.tensors}]

    def begin(self) -> None:
        """Put W(delta) in place."""
        self.shifts.refresh()

    def end(self) -> None:
        """Turn the gradients of W(delta) into those of delta; leave W(delta) of the old delta for nobody to see."""
        self.shifts.collect()
        self.shifts.remove()

    def keep_received(self, run: Run) -> None:
        """Keep the affine part and the buffers: the weights themselves do not move before the end."""
        buffers = [b for b in run.model.buffers() if b.is_floating_point()]
        self.old = [(t, t.detach().clone()) for t in (*self.affine_tensors, *buffers)]

    @contextlib.contextmanager
    def received(self, run: Run) -> Iterator[nn.Module]:
        """Take the shifts out for a block, and put the old affine part and buffers in."""
        with self.shifts.aside(), run.eval_mode():
            self._swap()
            try:
                yield run.model
            finally:
                self._swap()

    def _swap(self) -> None:
        for place, (t, other) in enumerate(self.old):
            self.old[place] = t, t.data
            t.data = other

    def inputs_only(self) -> contextlib.AbstractContextManager[None]:
        """Say that the backward passes of a block are for gradients of inputs."""
        return self.shifts.inputs_only()

    def as_function(self) -> contextlib.AbstractContextManager[None]:
        """Put W(delta) in place as a function of delta."""
        return self.shifts.differentiable()

    def diagonal(self, run: Run, kind: Kind) -> list[Tensor]:
        """Return the mean square of the per-sample gradients of the shifts, and the affine part's Fisher diagonal."""
        sums = [torch.zeros_like(delta) for delta in self.shifts.deltas]
        count = 0
        self.shifts.refresh()
        batches, labels = _samples(run, kind, run.generator)
        with run.eval_mode(), requires_grad(run.model.parameters(), True):
            for batch in batches:
                if run.checkpointed:
                    count += self._one_by_one(run, batch, sums)
                    continue
                batch, counts = _labelled(run, batch, labels, run.generator)
                # A checkpointed block that is computed again would be so without the record.
                with recording(self.shifts) as record, readable(run.model), keeping_activations():
                    logits = run.alone.forward(run.model, batch)
                    if labels == "mc" and run.ranks is None:
                        batch = run.task.relabel(batch, draw_labels(logits, run.generator))
                    losses = run.task.loss(logits, batch)
                for total, each in zip(sums, delta_gradients(self.shifts, record, losses)):
                    total += each.detach().pow(2).sum(0).to(total.dtype) * counts
                count += len(losses) * counts
                del record, logits, losses, each  # with the graph, before the next batch
        self.shifts.remove()
        count = run.sum_over_ranks(sums, count)
        squares = [total / count for total in sums]
        if self.affine:
            diagonal = _diagonal(run, kind, self.affine)
            squares += [diagonal[name] for name in self.affine]
        return squares

    def _one_by_one(self, run: Run, batch: Batch, sums: list[Tensor]) -> int:
        """Add the squares of the gradient of each sample's loss by a backward pass of its own; return how many.

        What is computed again in it is computed without the record that the others need.
        """
        losses = run.task.loss(run.task.forward(run.model, batch), batch)
        for k, loss in enumerate(losses):
            for total, each in zip(sums, gradients_of_one(self.shifts, loss, retain_graph=k + 1 < len(losses))):
                total += each.pow(2)
        return len(losses)

    def trace(self, run: Run, batch: Batch) -> Tensor:
        """Return the trace of the Fisher of the shifts: N x R numbers, no gradient of a whole weight is formed.

        Between `begin` and `end`, as its backward pass has to be.
        """
        mine, weight = _mine(run, batch)
        with run.eval_mode(), recording(self.shifts) as record:
            with readable(run.model, second_order=True):
                losses = run.task.loss(run.alone.forward(run.model, mine), mine)
            each = delta_gradients(self.shifts, record, losses, create_graph=True)
            total = sum((d.pow(2).flatten(1).sum(1) for d in each), start=torch.zeros_like(losses))
            if self.affine_tensors:
                total = total + squared_norms(losses, dict(zip(self.affine, self.affine_tensors)))
        return run.total(total.mean() * weight)

    def leave(self, fold: bool) -> None:
        """Fold W(delta) into the weights, or only take it out."""
        if fold:
            self.shifts.fold_apart()
        else:
            self.shifts.remove()


def _is_affine(name: str, p: Tensor) -> bool:
    """Whether a parameter is a bias, the affine of a norm layer, or the length of each row under weight_norm."""
    return p.dim() <= 1 or (name.endswith((".weight_g", ".original0")) and p.numel() == max(p.shape))


def _first(run: Run) -> Iterator[Batch]:
    count = 0
    for batch in run.clean.batches(shuffle=True, generator=torch.Generator().manual_seed(run.seed), device=run.device):
        yield batch
        count += run.task.size(batch)
        if count >= FISHER_SAMPLES:
            return


def _samples(run: Run, kind: Kind, generator: torch.Generator) -> tuple[Iterable[Batch], Kind]:
    """Return the samples of the Fisher diagonal, and where their labels are from.

    Batches that go through the model in parts have their labels drawn as a whole before, so that they are the same.
    """
    if run.micro_batch is None and not run.checkpointed:
        return _first(run), kind
    return _in_parts(run, kind == "mc", generator), "empirical" if kind == "mc" else kind


def _in_parts(run: Run, draw: bool, generator: torch.Generator) -> Iterator[Batch]:
    for batch in _first(run):
        if draw:
            with torch.no_grad():
                batch = run.task.relabel(batch, draw_labels(run.task.forward(run.model, batch), generator))
        n = run.task.size(batch)
        few = 1 if run.checkpointed else max(1, (run.micro_batch or n) // FISHER_SHARE) * run.world
        for place in torch.arange(n, device="cpu").tensor_split(-(-n // few)):
            yield take(batch, place, n)


def _diagonal(run: Run, kind: Kind, names: list[str]) -> dict[str, Tensor]:
    data, kind = _samples(run, kind, torch.Generator().manual_seed(run.seed))  # the seed of `fisher_diagonal`'s own
    with run.eval_mode(), requires_grad(run.model.parameters(), True):
        if run.ranks is not None:
            return _diagonal_over_ranks(run, data, kind, names)
        return fisher_diagonal(
            run.model,
            data,
            kind=kind,
            forward=run.task.forward_hook,
            loss=run.task.loss_hook,
            params=names,
            seed=run.seed,
        )


def _diagonal_over_ranks(run: Run, data: Iterable[Batch], kind: Kind, names: list[str]) -> dict[str, Tensor]:
    task, generator = run.task, torch.Generator(device="cpu").manual_seed(run.seed)
    labelled = [_labelled(run, batch, kind, generator) for batch in data]
    own = [batch for batch, counts in labelled if counts]
    if run.shards is not None:
        return fisher_diagonal(
            run.model, own, forward=task.forward_hook, loss=task.loss_hook, params=names, group=run.shards.group
        )
    count = sum(task.size(batch) for batch in own)
    params = dict(run.model.named_parameters())
    out = {name: torch.zeros_like(params[name]) for name in names}
    if own:
        mean = fisher_diagonal(run.model, own, forward=task.forward_hook, loss=task.loss_hook, params=names)
        out = {name: mean[name] * count for name in names}
    total = run.sum_over_ranks(list(out.values()), count)
    return {name: value.div_(total) for name, value in out.items()}


def _labelled(run: Run, batch: Batch, kind: Kind, generator: torch.Generator) -> tuple[Batch, int]:
    """Return this rank's rows of a batch, and whether they count; one process alone has the batch as it is.

    For "mc" labels are drawn for the whole batch, of which each rank takes its own, so that all draw alike. A batch of
    fewer samples than there are ranks is rank 0's.
    """
    ranks = run.ranks
    if ranks is None:
        return batch, 1
    if kind == "mc":
        with torch.no_grad():
            batch = run.task.relabel(batch, draw_labels(run.task.forward(run.model, batch), generator))
    whole = ranks.rows(run.task.size(batch)) is None
    return run.mine(batch), int(ranks.first or not whole)


def _mine(run: Run, batch: Batch) -> tuple[Batch, float]:
    """Return this rank's rows of a batch, and their share of it: the shares of all ranks add up to one."""
    if run.ranks is None:
        return batch, 1.0
    mine, n = run.mine(batch), run.task.size(batch)
    return mine, 1 / run.ranks.world if run.ranks.rows(n) is None else run.task.size(mine) / n


class SpaceMethod(Method):
    """A method that moves in a space; every parameter, unless `make_space` says otherwise."""

    space: Space

    def setup(self, run: Run) -> None:
        """Make the space."""
        self.space = self.make_space(run)

    def reenter(self, run: Run) -> None:
        """Make the space anew."""
        self.space = self.make_space(run)

    def make_space(self, run: Run) -> Space:
        """Return what is tuned."""
        return Weights(run)

    def parameter_groups(self, run: Run) -> Groups:
        """Return the coordinates of the space."""
        return self.space.groups(run)

    @torch.no_grad()
    def score(self, run: Run) -> dict[str, float]:
        """Score with the tuned weights in place."""
        self.space.begin()
        try:
            return super().score(run)
        finally:
            self.space.leave(fold=False)

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Give the model plain weights again."""
        if hasattr(self, "space"):
            self.space.leave(fold=True)
