"""Verification of a plan, on the first batch of a graph: a wrong guess must not pass silently.

Two backward passes, one with weighted losses, show which elements belong to which sample at every site (layout.py). A
third, of a single sample's loss through the whole graph, is compared with that sample's gradients by the plan, on the
way of the second. Only where sites turn out to be none are there more.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastfip.errors import DataError, ModelError
from fastfip.fisher.graph.forms import GradientForm
from fastfip.fisher.graph.layout import Layout, Probe, weights_for
from fastfip.fisher.graph.plan import Plan, read_graph
from fastfip.fisher.graph.reading import Chain, Reading, Site, inputs_of, own_gradients
from fastfip.nets.state import is_part

_ROUNDS = 8  # of moving a cut further up before a parameter is given to the slow path
_TRIES = 4  # batches in which a site may have no gradient at all before it counts as settled
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Known:
    """What a verification found out about a graph; good for every later batch with the same graph."""

    shared: frozenset[int]  # positions of nodes that look like sites and give every sample the same
    layouts: tuple[tuple[Layout, ...], ...]
    stuck: frozenset[str]  # parameters for the slow path
    settled: bool  # False: there was too little to see, look again at the next batch
    tries: int


Cache = MutableMapping[Any, Known]
_CACHES: weakref.WeakKeyDictionary[nn.Module, Cache] = weakref.WeakKeyDictionary()
_KEPT: weakref.WeakKeyDictionary[nn.Module, Cache] = weakref.WeakKeyDictionary()
_ONCE: weakref.WeakKeyDictionary[nn.Module, Cache] = weakref.WeakKeyDictionary()


def cache_of(model: nn.Module, kept: bool = False, once: bool = False) -> Cache:
    """What is known about the graphs of this model.

    Args:
        model: the same in every call.
        kept: the graphs have checkpointed parts, all of which can be read.
        once: they have such parts that are computed again when they are read.
    """
    return (_ONCE if once else _KEPT if kept else _CACHES).setdefault(model, {})


def plan_for(
    losses: Tensor,
    params: Mapping[str, Tensor],
    cache: Cache | None = None,
    pieces: Sequence[Collection[str]] | None = None,
) -> Plan:
    """Read the graph of `losses` [N]; verify what is not yet known about it.

    Args:
        losses: one for each sample.
        params: name -> leaf of their graph.
        cache: what is known about the graphs of a model.
        pieces: names of parameters whose gradients are verified together, each piece in passes of its own, so that no
            more of them are held at once; None: all together.

    Raises:
        DataError: `losses` is not one number for each sample.
        ModelError: no graph, BatchNorm statistics of the batch, or parameters that are sharded over processes.
    """
    if losses.dim() != 1 or losses.shape[0] == 0:
        raise DataError(f"losses must have the shape [N], one number for each sample, not {list(losses.shape)}")
    if losses.grad_fn is None:
        raise ModelError("the losses have no graph: a frozen model, or a forward pass under no_grad")
    if any(map(is_part, params.values())):
        raise ModelError("the parameters are sharded over processes: take fisher_diagonal or fisher_trace with group=")
    cache, params = {} if cache is None else cache, dict(params)
    reading = read_graph(losses, params)
    key = _key(losses, params, reading)
    plan, known = _from_cache(losses, params, reading, cache.get(key)), cache.get(key)
    if plan is not None:
        return plan
    try:
        plan, now = _verified(losses, params, reading, 0 if known is None else known.tries, pieces)
        cache[key] = now if known is None else _both(known, now)
    except CheckpointError:  # what it keeps can be read once, and torch reads it itself
        first = [site.recipe.layouts for site in reading.sites]
        plan = Plan(losses, params, reading, [layouts[0] for layouts in first], frozenset(params))
        cache[key] = Known(frozenset(), tuple(layouts[:1] for layouts in first), frozenset(params), True, 1)
    return plan


def known_plan(losses: Tensor, params: Mapping[str, Tensor], cache: Cache) -> Plan | None:
    """Return the plan for a graph about which enough is known, without any pass; None for any other."""
    params = dict(params)
    reading = read_graph(losses, params)
    return _from_cache(losses, params, reading, cache.get(_key(losses, params, reading)))


def _key(losses: Tensor, params: dict[str, Tensor], reading: Reading) -> Any:
    signatures = tuple(_signature(site) for site in reading.sites)
    return losses.shape[0] == 1, tuple(params), _shape_of_graph(reading), signatures


def _from_cache(losses: Tensor, params: dict[str, Tensor], reading: Reading, known: Known | None) -> Plan | None:
    if known is None or not known.settled:
        return None
    if known.shared:
        reading = read_graph(losses, params, known.shared)
    resolved = _resolved(known, reading, losses.shape[0])
    return None if resolved is None else Plan(losses, params, reading, resolved, known.stuck | reading.at_root).routed()


def _shape_of_graph(reading: Reading) -> int:
    """Tell graphs apart by their operations and the axes that these go along: the same net may be used in another way.

    A sum over the first axis instead of the second, say, where a flag of the forward pass says which one time is.
    """
    axes = ((getattr(node, "_saved_dim", None), getattr(node, "_saved_dims", None)) for node in reading.nodes)
    turns = ((getattr(node, "_saved_dim0", None), getattr(node, "_saved_dim1", None)) for node in reading.nodes)
    return hash((tuple(node.name() for node in reading.nodes), tuple(map(str, axes)), tuple(turns)))


def _signature(site: Site) -> tuple[Any, ...]:
    return site.node.name(), site.position, tuple(sorted(site.recipe.edges)), tuple(sorted(site.params))


def _both(known: Known, now: Known) -> Known:
    """What two batches agree on: one of another size often tells layouts apart that the first could not."""
    if known.shared != now.shared or len(known.layouts) != len(now.layouts):
        return now
    common = (tuple(one for one in b if one in a) or b for a, b in zip(known.layouts, now.layouts))
    return dataclasses.replace(now, layouts=tuple(common))


def _resolved(known: Known, reading: Reading, samples: int) -> list[Layout] | None:
    """The layouts for this batch, or None if what is known leaves more than one possibility.

    Where some batches' gradients fit two layouts alike, the first is taken in the end: looking again would cost three
    passes each step.
    """
    if len(known.layouts) != len(reading.sites):
        return None
    resolved = []
    for site, layouts in zip(reading.sites, known.layouts):
        fits = [one for one in layouts if one.fits(site.recipe.shape, samples)]
        if not fits:
            return None
        if known.tries < _TRIES and any(not fits[0].same(one, site.recipe.shape, samples) for one in fits[1:]):
            return None
        resolved.append(fits[0])
    return resolved


def _verified(
    losses: Tensor,
    params: dict[str, Tensor],
    reading: Reading,
    tries: int,
    pieces: Sequence[Collection[str]] | None = None,
) -> tuple[Plan, Known]:
    """Return the verified plan for the graph of `losses` [N], and what to remember of it."""
    moved: dict[int, frozenset[str]] = {}  # positions of sites that were none, and their parameters
    stuck, at_first = frozenset[str](), reading.at_root
    for rounds in itertools.count():
        plan = Plan(losses, params, reading, [site.recipe.layouts[0] for site in reading.sites], reading.at_root)
        plan.routed()
        comparison = _Comparison(plan) if rounds == 0 and pieces is None else None
        agreeing, evidence = _sample_axes(plan, comparison)
        wrong = [i for i, layouts in enumerate(agreeing) if not layouts and not plan.sites[i].params <= stuck]
        # No layout, and nothing but parameters goes in: the same for all samples, so the cut lies further up.
        up = [] if rounds == _ROUNDS else [i for i in wrong if not _has_data(plan, i)]
        stuck |= frozenset().union(*(plan.sites[i].params for i in wrong if i not in up))
        if not up:
            break
        moved.update({plan.sites[i].position: plan.sites[i].params for i in up})
        reading = read_graph(losses, params, frozenset(moved))
        lost = [i for i, theirs in moved.items() if theirs & (reading.at_root - at_first)]
        if lost:  # data after all (samples that see each other): what lies above must not go the slow way with it
            stuck |= frozenset().union(*(moved.pop(i) for i in lost))
            reading = read_graph(losses, params, frozenset(moved))
    layouts = _settled_layouts(plan, [good or site.recipe.layouts for good, site in zip(agreeing, plan.sites)])
    plan = Plan(losses, params, reading, [good[0] for good in layouts], stuck | reading.at_root).routed()
    if pieces is None and comparison is not None and not stuck:
        refuted, seen = comparison.verdict()
    else:
        refuted, seen = _compared(plan, pieces or [list(params)])
    plan.refuse_rescaled()
    if refuted:
        stuck |= refuted
        plan = Plan(losses, params, reading, plan.layouts, stuck | reading.at_root).routed()
    settled = seen and (evidence or tries + 1 >= _TRIES)
    return plan, Known(frozenset(moved), layouts, stuck, settled, tries + 1)


def _sample_axes(plan: Plan, comparison: _Comparison | None) -> tuple[list[tuple[Layout, ...]], bool]:
    """Return the layouts that each site's gradient agrees with, and whether every site had a gradient to judge by.

    The comparison sees what has a layout; it is done if all sites have.
    """
    ones = torch.ones_like(plan.losses)
    if plan.samples == 1:  # everything belongs to the one sample
        if comparison is not None:
            plan.stream(ones, comparison.take, retain_graph=True)
        return [site.recipe.layouts for site in plan.sites], True
    probes: dict[int, Probe] = {}
    verdicts: dict[int, tuple[tuple[Layout, ...], bool]] = {}
    weights = weights_for(plan.samples, plan.losses, seed=plan.samples, coarse=plan.coarse)
    plan.stream(weights, lambda i, g: probes.update({i: Probe.of(g, plan.samples)}), retain_graph=True)

    def judge(i: int, g: Tensor) -> None:
        verdicts[i] = probes[i].verdict(g, weights, plan.sites[i].recipe.layouts)
        if comparison is not None and verdicts[i][0]:
            plan.layouts[i] = verdicts[i][0][0]
            comparison.take(i, g)

    plan.stream(ones, judge, retain_graph=True)
    nothing = [(site.recipe.layouts, False) for site in plan.sites]
    results = [verdicts.get(i, nothing[i]) for i in range(len(plan.sites))]
    return [layouts for layouts, _ in results], all(evidence for _, evidence in results)


def _settled_layouts(plan: Plan, agreeing: list[tuple[Layout, ...]]) -> tuple[tuple[Layout, ...], ...]:
    """Decide between frames that follow each other and frames that alternate, where this batch fits both.

    Class tokens at rows 0, T, 2T ... belong to samples 0, 1, 2 ... in either order if T = 1 modulo N. Other sites of as
    many rows tell, where all positions have a gradient. Where there are none the first order it is: rows of alternating
    frames that one position of each sample leads to lie together, and fit both orders for N = 2 alone.
    """
    orders: dict[int, set[bool]] = {}
    for site, layouts in zip(plan.sites, agreeing):
        if len(layouts) == 1:
            orders.setdefault(site.recipe.shape[layouts[0].dim], set()).add(layouts[0].major)
    settled = []
    for site, layouts in zip(plan.sites, agreeing):
        if len(layouts) > 1 and len({one.dim for one in layouts}) == 1:
            known = orders.get(site.recipe.shape[layouts[0].dim], set())
            told = tuple(one for one in layouts if known == {one.major})
            layouts = told or (layouts[:1] if plan.samples > 2 else layouts)
        settled.append(layouts)
    return tuple(settled)


def _has_data(plan: Plan, i: int) -> bool:
    return any(edge is not None and edge[0] not in plan.reading.below for edge in inputs_of(plan.sites[i].node))


def _compared(plan: Plan, pieces: Sequence[Collection[str]]) -> tuple[frozenset[str], bool]:
    """Compare a plan in passes of their own; see `_Comparison.verdict`."""
    refuted, seen = frozenset[str](), False
    for names in pieces:
        comparison = _Comparison(plan, names)
        plan.stream(torch.ones_like(plan.losses), comparison.take, retain_graph=True)
        wrong, some = comparison.verdict()
        refuted, seen = refuted | wrong, seen or some
    return refuted, seen


class _Comparison:
    """The gradients of the sample with the largest loss by a plan, against its own backward pass through the graph."""

    def __init__(self, plan: Plan, only: Collection[str] | None = None) -> None:
        others = () if only is None else (name for name in plan.params if name not in only)
        self.plan, self.left_out = plan, plan.rescaled.union(others)
        names = [name for name in plan.params if name not in plan.loop and name not in self.left_out]
        self.m = int(plan.losses.detach().nan_to_num().argmax())
        # What the plan finds is taken away from it: one buffer, not two.
        self.rest = _own_gradient(plan, self.m, names) if names else {}
        self.sizes = {name: _norm(value) for name, value in self.rest.items()}
        self.scale: dict[str, float] = {}
        self.forms: dict[tuple[int, int], GradientForm] = {}
        self.pulled, self.any = plan.pulled_uses(), bool(names)
        self.direct: dict[int, list[tuple[int, str, Chain]]] = {}
        for name, groups in plan.groups.items():
            for group in groups:
                for use in group.uses:
                    self.direct.setdefault(use.site, []).append((use.slot, name, use.chain or group.chain))

    def take(self, i: int, g: Tensor) -> None:
        """Take away what the gradient at a site says of the sample."""
        plan, rest = self.plan, self.rest
        for slot, name, chain in self.direct.get(i, ()):
            if name in self.left_out:
                continue
            form = plan.form(i, slot, g)
            value = form.one(self.m)
            if name not in rest:
                rest[name] = value.new_zeros(plan.params[name].shape)
            chain.view(rest[name]).sub_(value)
            self.scale[name] = self.scale.get(name, 0.0) + float(form.scale(self.m))
        for slot in plan.sites[i].recipe.edges:
            if (i, slot) in self.pulled:
                self.forms[i, slot] = plan.form(i, slot, g)

    def verdict(self) -> tuple[frozenset[str], bool]:
        """Return the parameters for which they differ, and whether the sample had any gradient to compare."""
        plan, rest = self.plan, self.rest
        for name, value in plan.pull(self.m, self.forms).items() if plan.pulled else ():
            if name in self.left_out:
                continue
            rest[name] = rest[name] - value.detach() if name in rest else -value.detach()
        wrong = set()
        for name, value in rest.items():
            dtype = plan.params[name].dtype
            noise = 1e3 * torch.finfo(dtype).eps * self.scale.get(name, 0.0)
            if not _norm(value) <= _TOLERANCE.get(dtype, 1e-2) * self.sizes.get(name, 0.0) + noise:
                wrong.add(name)
        return frozenset(wrong), any(self.sizes.values()) or not self.any


def _own_gradient(plan: Plan, m: int, names: list[str]) -> dict[str, Tensor]:
    """The gradient of sample m's loss by an ordinary backward pass, in memory that may be written to."""
    gradients = own_gradients(plan.losses[m], {name: plan.params[name] for name in names}, retain_graph=True)
    out: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name in names:
        g = gradients.pop(name, None)
        if g is None:
            continue
        if not g.is_contiguous() or g.data_ptr() in taken:  # expanded, or one tensor for two parameters
            g = g.clone(memory_format=torch.contiguous_format)
        taken.add(g.data_ptr())
        out[name] = g
    return out


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))
