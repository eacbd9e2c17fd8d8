"""What a rule returns, the table of rules, and what is done where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfip.errors import ModelError
from fastfip.fisher.graph.forms import BackwardForm, GradientForm
from fastfip.fisher.graph.layout import Layout, candidates
from fastfip.fisher.graph.reading import OPAQUE, Edge, inputs_of, shape_of

Slots = dict[int, Edge]
Builder = Callable[[Tensor, Layout, int], GradientForm]  # (natural gradient, layout, N)


@dataclass(frozen=True)
class Recipe:
    """How to make forms of one node's gradient."""

    kind: str  # for the coverage: "linear", "convolution" ...
    shape: torch.Size  # of the natural gradient
    layouts: tuple[Layout, ...]
    edges: Slots  # the parameter-side inputs; the forms are gradients of them
    builders: Mapping[int, Builder]
    makes: Mapping[int, type[GradientForm]]  # which form each builder returns
    params: frozenset[str] = frozenset()
    natural: Callable[[Tensor], Tensor] | None = None  # from the gradient of output 0 to the one the layouts speak of
    without_rule: bool = False


Rule = Callable[[Any, Slots, int], "Recipe | None"]
RULES: dict[str, Rule] = {}
#: Operations whose output differs between samples although no input that is differentiated does (they read indices, or
#: repeat a parameter for every sample): asked even where nothing but parameters comes in.
ALONE = frozenset({"EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0", "ExpandBackward0"})


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for autograd nodes of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def recipe_for(node: Any, slots: Slots, data: bool, below: Mapping[Any, frozenset[str]], samples: int) -> Any:
    """Return the recipe for a node whose inputs in `slots` are made of selected parameters.

    `data` says whether other differentiable inputs come in. None: nothing can be separated here; OPAQUE: not even what
    is data.
    """
    name = node.name()
    bare = any(edge is None for edge in inputs_of(node))  # an input without gradient: data, or a constant
    if not (data or bare or name in ALONE):
        return None
    if any(meta.dtype.is_complex for meta in node._input_metadata):
        return OPAQUE
    recipe = RULES[name](node, slots, samples) if name in RULES else None
    if recipe is not None and not recipe.layouts:
        recipe = None
    if recipe is None and (data or name not in RULES):
        recipe = _backward_recipe(node, slots, data, samples)
    if recipe is None or not recipe.layouts:
        return None
    params = frozenset().union(*(below[edge[0]] for edge in recipe.edges.values()))
    return Recipe(**{**recipe.__dict__, "params": params})


def refuse_node(node: Any) -> None:
    """Refuse what leaves no per-sample gradients below it, or none of all parameters.

    That is an operation that normalises samples together (instance norm, [1, N*C, ...] to torch, is no such case),
    active dropout, and a block that torch computes again with autograd's own hand.

    Raises:
        ModelError: it is one of these.
    """
    name = node.name()
    if "BatchNormBackward" in name and getattr(node, "_saved_training", True) and output_shape(node)[0] != 1:
        raise ModelError(
            "a BatchNorm used the statistics of the batch: its samples are coupled and have no gradients of their own;"
            " call model.eval() before the forward pass"
        )
    if name.startswith("NativeDropout") or float(getattr(node, "_saved_dropout_p", 0.0) or 0.0) > 0:
        raise ModelError(
            "dropout was active in the forward pass: the Fisher of a random subnet is not the model's; call"
            " model.eval() before it"
        )
    if name.startswith("EmbeddingBag") and getattr(node, "_saved_scale_grad_by_freq", False):
        raise ModelError(
            "an EmbeddingBag has scale_grad_by_freq=True, which makes its gradients no derivatives: set it to False"
        )
    if name == "CheckpointFunctionBackward":
        raise ModelError(
            "a block runs under checkpoint(use_reentrant=True), which hides its parameters from the graph: pass"
            " use_reentrant=False"
        )


def output_shape(node: Any) -> torch.Size:
    """Shape of the first output of an operation."""
    return torch.Size(node._input_metadata[0].shape)


def _backward_recipe(node: Any, slots: Slots, data: bool, samples: int) -> Recipe | None:
    """An operation with one output that no rule knows: its own backward, once for each sample."""
    if len(node._input_metadata) != 1 or not (callable(node) or hasattr(node, "apply")):
        return None
    z = output_shape(node)
    dims = range(len(z)) if data else range(min(2, len(z)))

    def builder(slot: int) -> Builder:
        def build(g: Tensor, layout: Layout, samples: int) -> GradientForm:
            owner = layout.owner(g.shape, samples, torch.arange(g.numel(), device=g.device)).view(g.shape)
            return BackwardForm(node, slot, g, owner, shape_of(slots[slot]))

        return build

    builders = {slot: builder(slot) for slot in slots}
    return Recipe(
        f"{node.name()} once for each sample",
        z,
        candidates(dims, z, samples),
        slots,
        builders,
        dict.fromkeys(slots, BackwardForm),
        without_rule=True,
    )
