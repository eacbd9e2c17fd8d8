"""Reading the autograd graph: which operations use which parameters, and how a parameter gets to where it is used.

A graph that torch has recorded names every use of every parameter: a Linear called twice, a weight used by a function
outside its module, a class token, the slices of a packed projection. Reading it needs no hook on the model, changes
nothing in it, and cannot overlook a use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

Edge = tuple[Node, int]  # an output of an operation


def is_leaf(node: Node) -> bool:
    """Whether the node stands for a leaf tensor."""
    return hasattr(node, "variable")


def variable_of(leaf: Node) -> Tensor:
    """The tensor that a leaf's node stands for."""
    return leaf.variable  # type: ignore[attr-defined]


def shape_of(edge: Edge) -> torch.Size:
    """Shape of the tensor that an edge stands for."""
    node, nr = edge
    if is_leaf(node):
        return variable_of(node).shape
    return torch.Size(node._input_metadata[nr].shape)


def gradient_edge(edge: Edge) -> GradientEdge:
    """The edge in the form that torch.autograd.grad takes."""
    return GradientEdge(*edge)


def inputs_of(node: Node) -> list[Edge | None]:
    """The differentiable inputs of a node; None for one that is not."""
    return [None if source is None else (source, nr) for source, nr in node.next_functions]


def topological(root: Node) -> list[Node]:
    """Every node below `root` and itself, inputs before what uses them; the same order for the same graph."""
    order: list[Node] = []
    state: dict[Node, bool] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node in state:
            stack.pop()
            if not state[node]:
                state[node] = True
                order.append(node)
            continue
        state[node] = False
        stack.extend(source for source, _ in node.next_functions if source is not None and source not in state)
    return order


def own_gradients(
    loss: Tensor, params: Mapping[str, Tensor], *, retain_graph: bool, create_graph: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of one sample's loss by a backward pass of its own, dense; without those that have none."""
    with torch.enable_grad():
        got = torch.autograd.grad(
            loss, list(params.values()), retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(params, got) if g is not None}


def as_real(t: Tensor) -> Tensor:
    """Return a complex tensor as real and imaginary parts, [..., 2], whose squares add up to |t|^2; others as is."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


# ---------------------------------------------------------------------------------- operations that only move numbers


def _signed(i: int) -> int:
    return i - (1 << 64) if i >= 1 << 63 else i  # torch hands out negative dimensions as unsigned numbers


def _split(node: Any, nr: int, t: Tensor) -> Tensor:
    sizes = getattr(node, "_saved_split_sizes", None) or node._saved_split_size
    return t.split(sizes if isinstance(sizes, int) else list(sizes), _signed(node._saved_dim))[nr]


def _squeeze(node: Any, nr: int, t: Tensor) -> Tensor:
    return t.view(node._input_metadata[0].shape)


def _expand(node: Any, nr: int, t: Tensor) -> Tensor | None:
    size = node._input_metadata[0].shape
    return t.expand(size) if math.prod(size) == t.numel() else None


#: name of the operation -> (node, output number, input) -> a view of the input with the elements of the output
REINDEX: Mapping[str, Callable[[Any, int, Tensor], Tensor | None]] = {
    "TBackward0": lambda node, nr, t: t.t(),
    "TransposeBackward0": lambda node, nr, t: t.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "PermuteBackward0": lambda node, nr, t: t.permute([_signed(d) for d in node._saved_dims]),
    "ViewBackward0": lambda node, nr, t: t.view(node._input_metadata[0].shape),
    "UnsafeViewBackward0": lambda node, nr, t: t.view(node._input_metadata[0].shape),
    "ReshapeAliasBackward0": lambda node, nr, t: t.view(node._input_metadata[0].shape),
    "UnsqueezeBackward0": lambda node, nr, t: t.unsqueeze(_signed(node._saved_dim)),
    "SqueezeBackward0": _squeeze,
    "SqueezeBackward1": _squeeze,
    "SqueezeBackward2": _squeeze,
    "SliceBackward0": lambda node, nr, t: t[
        (slice(None),) * _signed(node._saved_dim) + (slice(node._saved_start, node._saved_end, node._saved_step),)
    ],
    "SelectBackward0": lambda node, nr, t: t.select(_signed(node._saved_dim), _signed(node._saved_index)),
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
    "UnbindBackward0": lambda node, nr, t: t.unbind(_signed(node._saved_dim))[nr],
    "ExpandBackward0": _expand,
    "CloneBackward0": lambda node, nr, t: t,
    "AliasBackward0": lambda node, nr, t: t,
    "ToCopyBackward0": lambda node, nr, t: t,  # another dtype, the same elements
}


@dataclass(frozen=True)
class Chain:
    """The way of a parameter to its use through operations that only move its elements."""

    param: str
    leaf: Node
    steps: tuple[Edge, ...]  # from the parameter on

    def view(self, t: Tensor) -> Tensor:
        """The elements of `t` (of the parameter's shape) that the use sees, as a view in the use's shape."""
        for node, nr in self.steps:
            moved = REINDEX[node.name()](node, nr, t)
            assert moved is not None
            t = moved
        return t


def chain_to(edge: Edge, names: Mapping[int, str]) -> Chain | None:
    """The chain behind an edge, or None if there is anything but reindexing between it and one selected parameter."""
    steps: list[Edge] = []
    node, nr = edge
    while not is_leaf(node):
        sources = [source for source in inputs_of(node) if source is not None]
        if node.name() not in REINDEX or len(sources) != 1:
            return None
        steps.append((node, nr))
        node, nr = sources[0]
    leaf = variable_of(node)
    if id(leaf) not in names:
        return None
    chain = Chain(names[id(leaf)], node, tuple(reversed(steps)))
    try:  # a view that needs a copy, or an expand that repeats, is no reindexing
        end = chain.view(torch.empty(leaf.shape, device="meta"))
    except (RuntimeError, AssertionError):
        return None
    return chain if end.shape == shape_of(edge) else None


def elements(chain: Chain, shape: torch.Size) -> Tensor:
    """Which elements of the parameter a chain leads to, as flat indices."""
    return chain.view(torch.arange(math.prod(shape)).view(shape)).reshape(-1)


# ----------------------------------------------------------------------------------------------- uses of parameters


#: In place of a recipe: data is mixed in here, in a way that no rule was written for.
OPAQUE = object()


@dataclass
class Reading:
    """What the graph of the losses says about the selected parameters."""

    nodes: list[Node]
    position: dict[Node, int]
    below: dict[Node, frozenset[str]]  # of parameter-side nodes: the selected parameters that they are made of
    sites: list[Site] = field(default_factory=list)
    at_root: frozenset[str] = frozenset()  # parameters that reach the losses without meeting a separable operation


@dataclass
class Site:
    """An operation that brings parameters and data together, where the samples can be told apart."""

    node: Node
    position: int
    recipe: Any  # recipe.Recipe
    terminal: bool = False  # no other site lies below: its gradient is asked for, the others' pass through a hook

    @property
    def params(self) -> frozenset[str]:
        """The selected parameters used here."""
        return self.recipe.params


def read(
    root: Node,
    names: Mapping[int, str],
    recipe_for: Callable[[Node, dict[int, Edge], bool, Mapping[Node, frozenset[str]]], Any | None],
    shared: frozenset[int] = frozenset(),
) -> Reading:
    """Find the sites of the selected parameters in the graph below `root`.

    A node is on the parameter side when everything it is made of are parameters; the first node after that which mixes
    in data (or whose output differs between samples, as an embedding's) is a site, if `recipe_for` knows what to do
    there. `shared` are positions of nodes that look like sites but give every sample the same: parameter side.

    Args:
        root: the node of the losses.
        names: id of a leaf tensor -> name of the selected parameter.
        recipe_for: (node, parameter-side inputs by slot, has other inputs, parameters below) -> recipe or None.
        shared: positions in the topological order.
    """
    nodes = topological(root)
    reading = Reading(nodes, {node: i for i, node in enumerate(nodes)}, {})
    below, site_below = reading.below, set()
    for i, node in enumerate(nodes):
        if is_leaf(node):
            leaf = variable_of(node)
            if id(leaf) in names:
                below[node] = frozenset((names[id(leaf)],))
            elif isinstance(leaf, nn.Parameter):
                below[node] = frozenset()
            continue
        sources = inputs_of(node)
        ours = {slot: edge for slot, edge in enumerate(sources) if edge is not None and edge[0] in below}
        data = [edge for edge in sources if edge is not None and edge[0] not in below]
        made_of = frozenset().union(*(below[edge[0]] for edge in ours.values()))
        if any(edge[0] in site_below for edge in data):
            site_below.add(node)
        if not ours:
            continue
        wanted = {slot: edge for slot, edge in ours.items() if below[edge[0]]}
        recipe = None
        if wanted and i not in shared:
            recipe = recipe_for(node, wanted, bool(data), below)
        if recipe is OPAQUE:
            reading.at_root |= made_of
        elif recipe is not None:
            reading.sites.append(Site(node, i, recipe, terminal=node not in site_below))
            site_below.add(node)
        elif not data and (made_of or None not in sources):  # unselected parameters and an input without gradient: data
            below[node] = made_of
        elif made_of:  # data mixed in where the samples cannot be told apart: only the losses can
            reading.at_root |= made_of
    if root in below:
        reading.at_root |= below[root]
    return reading
