"""Weights that move along their singular directions only.

    W(delta) = U diag(relu(sigma + delta)) V^T,    delta [R], zero at the start      (FIP, arXiv 2409.00863, Fast FIP)

It is computed as W + U diag(relu(sigma + delta) - sigma) V^T, which is the same matrix with the rounding of the SVD
left out: delta = 0 gives back W bit by bit, a weight of low precision is added to, not rebuilt, and U and V may hold
the largest directions only (`rank`), the others staying as they are. relu has no gradient at and below zero, so a
direction whose sigma + delta has reached zero stays gone, and one with sigma = 0 never moves.

A Linear weight is its matrix [O, I]. A convolution's is [O, I * kernel], one matrix for each group [G, O/G, I/G *
kernel]; a transposed convolution's is [I, O * kernel] likewise; a recurrent layer's is one for each gate [4, H, I], and
a stack of experts' one for each. Tied weights (one tensor in several places) share one
delta.

Index letters: `o` output, `i` input (unfolded), `r` singular direction, R = min(O, I) of each group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fastfip.errors import ModelError
from fastfip.nets.state import refuse_sharded
from fastfip.ops.memory import Scratch
from fastfip.spectral.cache import check_cache, decompose_once
from fastfip.spectral.decompose import Rank, check_rank
from fastfip.spectral.layers import replaced_forward
from fastfip.spectral.norms import FrozenNorms
from fastfip.spectral.places import MapPlace, places_of
from fastfip.spectral.site import Recorder, WeightSite
from fastfip.spectral.weight import SpectralShift

__all__ = ["SpectralShift", "SpectralShifts"]


class SpectralShifts:
    """The spectral shifts of a model's weights that are linear maps (`fastfip.spectral.places`).

    While `installed`, the model computes with W(delta): `refresh` puts it in the weights' places before a step, and the
    gradients of the deltas arrive in their `.grad` without a gradient of a whole weight, through the op of
    `fastfip.ops.spectral`, where a layer computes by its own class's forward; `collect` adds those of all other uses.
    W(delta) as a whole exists only for those, made when it is read.
    BatchNorm that is frozen altogether computes as a scale and an offset meanwhile.
    Several forward and backward passes may lie between the two. `fold` writes W(delta) into the weights, `remove` only
    takes the tensors out again.
    """

    def __init__(self, shifts: list[SpectralShift], modules: Iterable[nn.Module] = ()) -> None:
        self.shifts = shifts
        self.norms = FrozenNorms(modules)
        self.recorder = Recorder()
        self.verified: dict[object, frozenset[int]] = {}
        self.frugal = False
        self.installed = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rank: Rank = None,
        frozen: Container[int] = (),
        seen: Mapping[int, bool] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> SpectralShifts:
        """Decompose every weight, in float32 at least; `rank` says which directions move (see `decompose.Rank`).

        Weights whose id is in `frozen` stay as they are; `seen` are further ones, see `places.seen_as_maps`. With
        `cache` the decompositions are read from that file, where it is of these weights, or else written to it.

        Raises:
            ModelError: the model has no such weight, one is not finite, or it is sharded over processes (`purify`
                decomposes a whole copy then).
            ConfigError: the rank is none, or the cache has a name that is for no cache.
            CheckpointError: the cache cannot be written.
        """
        check_rank(rank)
        check_cache(cache)
        refuse_sharded(model)
        held: dict[int, tuple[nn.Parameter, list[MapPlace]]] = {}
        for place in places_of(model, frozen, {} if seen is None else seen):
            weight = place.module._parameters[place.attribute]
            assert weight is not None
            held.setdefault(id(weight), (weight, []))[1].append(place)
        # A tied weight moves wherever it is held: in an embedding, as a bare parameter.
        known = {(id(place.module), place.attribute) for _, places in held.values() for place in places}
        for name, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                if id(parameter) in held and (id(module), attribute) not in known:
                    places = held[id(parameter)][1]
                    full = f"{name}.{attribute}" if name else attribute
                    places.append(places[0]._replace(name=full, module=module, attribute=attribute))
        if not held:
            raise ModelError("the model has no Linear or convolution weight of its own: there is nothing to shift")
        return cls(_shifts(list(held.values()), rank, cache), model.modules())

    def __len__(self) -> int:
        """Return how many weights are shifted."""
        return len(self.shifts)

    @property
    def deltas(self) -> list[Tensor]:
        """The tensors that are tuned, one [G, R] for each weight."""
        return [shift.delta for shift in self.shifts]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights themselves; they stay as they are until `fold`."""
        return [shift.weight for shift in self.shifts]

    @torch.no_grad()
    def refresh(self) -> None:
        """Put W(delta) of the present deltas in the weights' places."""
        for shift in self.shifts:
            shift.frugal = self.frugal
            shift.refresh()
        self._put()

    def _put(self) -> None:
        self.installed = True  # first: what an interruption leaves half done is then taken out again
        for number, shift in enumerate(self.shifts):
            for site in shift.sites:
                if replaced_forward(number, shift, site, self.recorder):
                    site.put_made(shift.read)
                else:
                    site.put(shift.leaf())
        self.norms.put()

    def collect(self) -> None:
        """Add the gradients that arrived at W(delta) itself since `refresh` to those of the deltas."""
        for shift in self.shifts:
            if shift.value is None or shift.value.grad is None:
                continue
            gradient = shift.pull(shift.value.grad)
            shift.value.grad = None
            shift.delta.grad = gradient if shift.delta.grad is None else shift.delta.grad + gradient

    @contextlib.contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Leave the deltas out of the passes of a block: calls of `torch.autograd.grad` for gradients of inputs."""
        for shift in self.shifts:
            shift.wanted.deltas = False
        try:
            yield
        finally:
            for shift in self.shifts:
                shift.wanted.deltas = True

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let the model compute with its own weights for a block; what was made of W(delta) is kept meanwhile."""
        before = self.installed
        self.remove()
        try:
            yield
        finally:
            if before:
                self._put()

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Put W(delta) in place as a function of delta for a block, so that autograd itself goes through it.

        The slow form, for what must be a function of delta however the model uses the weight.
        """
        self.remove()
        self.installed = True
        try:
            for shift in self.shifts:
                value = shift.recompose()
                for site in shift.sites:
                    site.put(value)
            yield
        finally:
            self.remove()

    def remove(self) -> None:
        """Take W(delta) out again: the model computes with its own weights."""
        if not self.installed:
            return
        for shift in reversed(self.shifts):  # as they were taken: each knows the order of those that were left
            for site in reversed(shift.sites):
                site.restore(shift.weight)
        self.norms.remove()
        self.installed = False

    @torch.no_grad()
    def fold(self) -> None:
        """Write W(delta) into the weights (same tensors, shapes, dtypes)."""
        self.remove()
        for shift in self.shifts:
            shift.weight.copy_(shift.recompose())
            shift.forget()

    @torch.no_grad()
    def fold_apart(self) -> None:
        """Give the weights W(delta) in memory of their own: whoever holds their old memory finds the old values there.

        The directions are given back weight by weight, so that this takes no more memory than was held before; nothing
        else can be done with these shifts.
        """
        self.remove()
        while self.shifts:
            shift = self.shifts[-1]
            shift.forget()
            shift.weight.data = torch.empty_like(shift.weight).copy_(shift.recompose())
            self.shifts.pop()


def _shifts(
    held: list[tuple[nn.Parameter, list[MapPlace]]], rank: Rank, cache: str | os.PathLike[str] | None
) -> list[SpectralShift]:
    for weight, places in held:
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{places[0].name} holds NaN or Inf: it has no singular values")

    def matrices() -> Iterator[Tensor]:  # one at a time: that of a weight in another memory format is a copy
        for weight, places in held:
            yield weight.detach().reshape(places[0].groups, places[0].rows, -1)

    scratch = Scratch()
    out = []
    for (weight, places), (u, sigma, v) in zip(held, decompose_once(matrices, rank, cache)):
        sites = [WeightSite(place.module, place.attribute) for place in places]
        delta = torch.zeros_like(sigma).requires_grad_(True)
        out.append(SpectralShift([p.name for p in places], sites, weight, u, sigma, v, delta, scratch))
    return out


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module's weight is stored input first."""
    return isinstance(module, _ConvTransposeNd)
