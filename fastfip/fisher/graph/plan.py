"""From the losses of a batch to the per-sample gradients of every parameter: one backward pass, no weight gradients.

    plan = plan_for(losses, params, cache)      # verify.py: reads the graph, verifies what is not yet known about it
    plan.stream(weights, handle)                # the gradient at every site, as soon as it is there

What cannot be separated by sample is named in `plan.loop`, and left to a slower, exact path of the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fastfip.errors import ModelError
from fastfip.fisher.graph import norm_rules, rules  # noqa: F401  (registers them)
from fastfip.fisher.graph.forms import JOINED, GradientForm
from fastfip.fisher.graph.layout import Layout
from fastfip.fisher.graph.reading import (
    Chain,
    Edge,
    Reading,
    Site,
    chain_to,
    elements,
    gradient_edge,
    inputs_of,
    is_leaf,
    read,
    variable_of,
)
from fastfip.fisher.graph.recipe import recipe_for, refuse_node
from fastfip.nets.checks import check_initialised
from fastfip.nets.state import LOW_PRECISION, refuse_parts


@dataclass(frozen=True)
class ParameterUse:
    """One parameter-side input of a site."""

    site: int  # index into plan.sites
    slot: int
    edge: Edge
    chain: Chain | None  # None: more than reindexing lies between the parameter and its use


@dataclass
class UseGroup:
    """Uses of the same elements of a parameter: their forms are joined and added to one view of it."""

    chain: Chain
    uses: list[ParameterUse]


@dataclass
class Plan:
    """How to get the per-sample gradients of `params` from the graph of `losses`."""

    losses: Tensor
    params: dict[str, Tensor]
    reading: Reading
    layouts: list[Layout]
    loop: frozenset[str]
    groups: dict[str, list[UseGroup]] = field(default_factory=dict)  # parameters that forms are made for
    pulled: dict[str, list[ParameterUse]] = field(default_factory=dict)  # those that need one sample after the other

    @property
    def samples(self) -> int:
        """N."""
        return self.losses.shape[0]

    @property
    def sites(self) -> list[Site]:
        """Where parameters meet data."""
        return self.reading.sites

    @property
    def coarse(self) -> frozenset[torch.dtype]:
        """Dtypes of 16 bits that something in the graph is computed in."""
        used = {meta.dtype for node in self.reading.nodes for meta in node._input_metadata}
        return frozenset(used.intersection(LOW_PRECISION))

    @property
    def rescaled(self) -> frozenset[str]:
        """Parameters whose gradient torch divides by counts over the batch (`scale_grad_by_freq`): no derivative."""
        tables = [edge[0] for node in self._rescaling() for edge in inputs_of(node) if edge is not None]
        return frozenset().union(*(self.reading.below.get(table, frozenset()) for table in tables))

    def refuse_rescaled(self) -> None:
        """Refuse gradients through an operation that rescales them.

        Raises:
            ModelError: such an operation is no site, or its table needs a backward pass for each sample.
        """
        sites = {site.node for site in self.sites}
        hidden = [node for node in self._rescaling() if node not in sites]
        if self.rescaled & self.loop or (hidden and self.rescaled):
            raise ModelError(
                "an Embedding has scale_grad_by_freq=True, which makes its gradients no derivatives, and its samples"
                " cannot be told apart: set it to False"
            )

    def _rescaling(self) -> list[Node]:
        named = (node for node in self.reading.nodes if node.name() == "EmbeddingBackward0")
        return [node for node in named if node._saved_scale_grad_by_freq]  # type: ignore[attr-defined]

    def routed(self) -> Plan:
        """Decide for every parameter how its uses are put together; returns the plan itself."""
        self.groups, self.pulled = {}, {}
        uses: dict[str, list[ParameterUse]] = {}
        names = {id(p): name for name, p in self.params.items()}
        for i, site in enumerate(self.sites):
            for slot, edge in site.recipe.edges.items():
                chain = None if site.recipe.without_rule else chain_to(edge, names)
                for name in self.reading.below[edge[0]]:
                    if name not in self.loop:
                        uses.setdefault(name, []).append(ParameterUse(i, slot, edge, chain))
        for name, mine in uses.items():
            groups = self._grouped(mine, self.params[name].shape)
            if groups is None:
                self.pulled[name] = mine
            else:
                self.groups[name] = groups
        return self

    def _grouped(self, uses: list[ParameterUse], shape: torch.Size) -> list[UseGroup] | None:
        if len(uses) == 1:
            return None if uses[0].chain is None else [UseGroup(uses[0].chain, uses)]
        groups: dict[Any, UseGroup] = {}
        for use in uses:
            if use.chain is None:
                return None
            groups.setdefault(_same_elements(use.chain), UseGroup(use.chain, [])).uses.append(use)
        for group in groups.values():
            makes = {self.sites[use.site].recipe.makes[use.slot] for use in group.uses}
            if len(group.uses) > 1 and (len(makes) > 1 or not makes <= set(JOINED)):
                return None
        if len(groups) > 1:  # slices of one parameter: each by itself, unless they overlap
            seen = torch.cat([elements(group.chain, shape) for group in groups.values()])
            if seen.unique().numel() != seen.numel():
                return None
        return list(groups.values())

    def stream(
        self,
        weights: Tensor,
        handle: Callable[[int, Tensor], None],
        retain_graph: bool = False,
        leaves: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Walk backward once and call `handle(site index, gradient)` at each site as soon as its gradient is there.

        `weights` [N] multiply the losses. Weight gradients are not computed, but for those of `leaves`, which are
        returned. Sites that nothing flows to are left out.
        """
        last = [i for i, site in enumerate(self.sites) if site.terminal]
        if not last and not leaves:
            return []
        hooks, done = [], set[int]()

        def pass_on(i: int, grads: Sequence[Tensor | None]) -> None:
            done.add(i)
            if grads[0] is not None:
                with torch.no_grad():
                    handle(i, _natural(self.sites[i], grads[0]))

        try:
            for i, site in enumerate(self.sites):
                if leaves or not site.terminal:  # with leaves below it a terminal site is passed through as well
                    hooks.append(site.node.register_prehook(functools.partial(pass_on, i)))
            wanted: list[Any] = [gradient_edge((self.sites[i].node, 0)) for i in last]
            with torch.enable_grad():  # a scalar: to check given gradients torch imports sympy, 50 MB and half a second
                total = (self.losses * weights.to(self.losses.dtype)).sum()
            gradients = torch.autograd.grad(total, [*wanted, *leaves], retain_graph=retain_graph, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        for i, g in zip(last, gradients):
            if i not in done:
                pass_on(i, (g,))
        return list(gradients[len(last) :])

    def forms(
        self,
        take: Callable[[UseGroup, GradientForm], None],
        weights: Tensor | None = None,
        retain_graph: bool = False,
        leaves: Sequence[Tensor] = (),
    ) -> tuple[dict[tuple[int, int], GradientForm], list[Tensor | None]]:
        """Walk backward once and call `take(group, form)` for every group, as soon as its form is complete.

        Returns the forms by (site, slot) that `pull` needs, and the ordinary gradients of `leaves`.
        """
        at: dict[int, list[tuple[int, int, UseGroup]]] = {}
        for groups in self.groups.values():
            for group in groups:
                for use in group.uses:
                    at.setdefault(use.site, []).append((use.slot, id(group), group))
        parts: dict[int, tuple[UseGroup, list[GradientForm]]] = {}
        pulled, kept = self.pulled_uses(), dict[tuple[int, int], GradientForm]()

        def handle(site: int, g: Tensor) -> None:
            for slot, key, group in at.get(site, ()):
                _, mine = parts.setdefault(key, (group, []))
                mine.append(self.form(site, slot, g))
                if len(mine) == len(group.uses):
                    del parts[key]
                    take(group, GradientForm.join(mine))
            for slot in self.sites[site].recipe.edges:
                if (site, slot) in pulled:
                    kept[site, slot] = self.form(site, slot, g)

        if not (at or pulled or leaves):
            return kept, []
        weights = torch.ones_like(self.losses) if weights is None else weights.detach()
        leaf_gradients = self.stream(weights, handle, retain_graph or self.needs_graph, leaves)
        for group, mine in parts.values():  # no gradient came to the rest of the uses
            take(group, GradientForm.join(mine))
        return kept, leaf_gradients

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of the summed losses at every site, with a graph of its own."""
        if not self.sites:
            return []
        edges = [gradient_edge((site.node, 0)) for site in self.sites]
        # A scalar: to check given gradients torch imports sympy, 50 MB and half a second.
        gradients = torch.autograd.grad(self.losses.sum(), edges, create_graph=True, allow_unused=True)
        return [None if g is None else _natural(site, g) for site, g in zip(self.sites, gradients)]

    def form(self, site: int, slot: int, g: Tensor) -> GradientForm:
        """Return the form of one use, given the gradient at its site."""
        return self.sites[site].recipe.builders[slot](g, self.layouts[site], self.samples)

    @property
    def needs_graph(self) -> bool:
        """Whether operations of the data side are run again after the pass."""
        return any(self.sites[use.site].recipe.without_rule for uses in self.pulled.values() for use in uses)

    @property
    def deep(self) -> frozenset[str]:
        """Pulled parameters that have more than reindexing between them and an operation without a rule.

        For each sample all of that is walked through for the whole batch.
        """
        names = {id(p): name for name, p in self.params.items()}
        return frozenset(
            name
            for name, uses in self.pulled.items()
            for use in uses
            if self.sites[use.site].recipe.without_rule and chain_to(use.edge, names) is None
        )

    def pulled_uses(self) -> set[tuple[int, int]]:
        """(site, slot) of every use whose form `pull` needs."""
        return {(use.site, use.slot) for uses in self.pulled.values() for use in uses}

    def pull(
        self, n: int, forms: Mapping[tuple[int, int], GradientForm], create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return sample n's gradient of every `pulled` parameter, through whatever lies between it and its uses."""
        ends: dict[Edge, Tensor] = {}
        for site, slot in sorted(self.pulled_uses() & set(forms)):
            edge, value = self.sites[site].recipe.edges[slot], forms[site, slot].one(n)
            ends[edge] = ends[edge] + value if edge in ends else value
        out: dict[str, Tensor] = {}
        for name in self.pulled:
            for edge, value in ends.items():
                if is_leaf(edge[0]) and variable_of(edge[0]) is self.params[name]:
                    out[name] = value
        deep = {edge: _like_edge(value, edge) for edge, value in ends.items() if not is_leaf(edge[0])}
        if deep:
            got = torch.autograd.grad(
                [gradient_edge(edge) for edge in deep],
                [self.params[name] for name in self.pulled],
                list(deep.values()),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            for name, g in zip(self.pulled, got):
                if g is not None:
                    out[name] = out[name] + g if name in out else g
        return out

    def coverage(self, name: str) -> str:
        """How the per-sample gradients of a parameter are found, in words."""
        if name in self.loop:
            return "per-sample loop"
        if name in self.pulled:
            kinds = sorted({self.sites[use.site].recipe.kind for use in self.pulled[name]})
            return f"one sample at a time ({', '.join(kinds)})"
        if name in self.groups:
            uses = [use for group in self.groups[name] for use in group.uses]
            kinds = sorted({self.sites[use.site].recipe.kind for use in uses})
            return ", ".join(kinds) + (f" ({len(uses)} uses)" if len(uses) > 1 else "")
        return "no gradient"


def read_graph(losses: Tensor, params: Mapping[str, Tensor], shared: frozenset[int] = frozenset()) -> Reading:
    """Find the sites of `params` in the graph of the losses.

    Raises:
        ModelError: a BatchNorm used the statistics of the batch, dropout was active, or a block hides its parameters.
    """
    samples = losses.shape[0]

    def recipe(node: Node, slots: dict[int, Edge], data: bool, below: Mapping[Node, frozenset[str]]) -> Any:
        return recipe_for(node, slots, data, below, samples)

    assert losses.grad_fn is not None
    reading = read(losses.grad_fn, {id(p): name for name, p in params.items()}, recipe, shared)
    for node in reading.nodes:
        refuse_node(node)
    norm_rules.mend_transposed(reading.nodes)
    return reading


def _natural(site: Site, g: Tensor) -> Tensor:
    return g if site.recipe.natural is None else site.recipe.natural(g)


def _like_edge(value: Tensor, edge: Edge) -> Tensor:
    meta = edge[0]._input_metadata[edge[1]]
    return value.to(meta.dtype).reshape(meta.shape)


def _same_elements(chain: Chain) -> tuple[Any, ...]:
    """Equal for two chains that take the same steps, whichever nodes took them."""
    return tuple(
        (node.name(), nr, tuple(node._input_metadata[nr].shape))
        + tuple(getattr(node, a) for a in dir(node) if a.startswith("_saved_"))
        for node, nr in chain.steps
    )


def selected(
    model: nn.Module, params: Iterable[str] | Mapping[str, Tensor] | None, parts: bool = False
) -> dict[str, Tensor]:
    """Return the parameters to look at, by name: all trainable ones, or those asked for.

    A parameter that has several names (tied weights) is listed once, under its first name.

    Raises:
        ModelError: there are none, one is unknown, one does not require a gradient, one is sharded over processes
            (unless the caller can do with `parts`), or a lazy one has no values yet.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    if not parts:
        refuse_parts(every.values(), map(type, model.modules()))
    chosen: dict[str, Tensor]
    if isinstance(params, Mapping):
        chosen = dict(params)
    elif params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise ModelError(
                "no parameter of the model requires a gradient: call requires_grad_(True), or pass params="
            )
    else:
        names = [params] if isinstance(params, str) else list(params)
        for name in names:
            if not isinstance(name, str):
                raise ModelError(
                    f"params= takes names, not a {type(name).__name__}: e.g. params=[name for name, _ in"
                    " model.named_parameters() if name.startswith('fc.')]"
                )
            if name not in every:
                raise ModelError(f"the model has no parameter {name!r}")
        chosen = {name: every[name] for name in names}
    once: dict[int, str] = {}
    check_initialised(chosen.values())
    for name, p in chosen.items():
        once.setdefault(id(p), name)
        if not p.requires_grad or not p.is_leaf:
            raise ModelError(f"parameter {name!r} is frozen, or no leaf: call requires_grad_(True) on it first")
    if not once:
        raise ModelError("no parameters selected")
    return {name: chosen[name] for name in once.values()}
