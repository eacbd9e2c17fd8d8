"""A backward pass that leaves the Fisher diagonal of its batch beside the gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fastfip.errors import ConfigError, ModelError
from fastfip.fisher.graph.plan import selected
from fastfip.fisher.graph.reading import inputs_of, is_leaf, own_gradients, variable_of
from fastfip.fisher.graph.verify import cache_of, plan_for
from fastfip.fisher.modes import check_modes, naming_checkpoints
from fastfip.fisher.result import FisherDiagonal
from fastfip.fisher.squared_sum import SquaredSum
from fastfip.fisher.trace import Params


@naming_checkpoints()
def backward_with_fisher(
    losses: Tensor,  # [N]
    model: nn.Module,
    *,
    params: Params = None,
    reduction: str = "mean",
    retain_graph: bool = False,
    backend: str = "auto",
) -> FisherDiagonal:
    """Do what `losses.mean().backward()` does, and return the Fisher diagonal of the batch from the same pass.

        losses = F.cross_entropy(model(x), y, reduction="none")
        fisher = fastfip.backward_with_fisher(losses, model)
        optimizer.step()

    The gradients are sums of the same products whose squares are the diagonal, so the pass costs about what a backward
    pass costs. Gradients are added to `.grad`, of every leaf that the losses depend on. Hooks that a wrapper hangs on
    the accumulation of gradients (DistributedDataParallel) do not run: reduce the gradients yourself.

    Args:
        losses: one loss for each sample, with its graph; BatchNorm and dropout in eval mode.
        model: whose parameters they are.
        params: names of the parameters to return the diagonal of; None: all that require a gradient.
        reduction: "mean" or "sum", of the losses, for the gradients; the diagonal is always a mean over samples.
        retain_graph: keep the graph for another pass.
        backend: of the products (`fastfip.ops`): "auto", or the name of one.

    Raises:
        ModelError: BatchNorm in train mode (samples have no gradients of their own there), active dropout, a frozen
            model, losses without a graph, or those of a cross-entropy behind a softmax; a checkpoint whose graph can be
            read once only.
        DataError: `losses` is not of the shape [N].
        ConfigError: an unknown reduction.
        BackendError: the backend asked for cannot run here.
    """
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    check_modes(model)
    _refuse_second_softmax(losses)
    chosen = selected(model, params)
    plan = plan_for(losses, chosen, cache_of(model))
    total = SquaredSum(chosen, with_grad=True, backend=backend)
    assert total.grad is not None
    slow = {name: p for name, p in chosen.items() if name in plan.loop}
    for loss in losses if slow else ():
        total.add_one(own_gradients(loss, slow, retain_graph=True))
    ours, rescaled = {id(p) for p in chosen.values()}, {id(chosen[name]) for name in plan.rescaled}
    leaves = [variable_of(node) for node in plan.reading.nodes if is_leaf(node)]
    rest = [leaf for leaf in leaves if id(leaf) not in ours or id(leaf) in rescaled]  # as torch makes them
    leaf_gradients = total.add(plan, retain_graph=retain_graph, leaves=rest)
    sparse = _with_sparse_gradients(plan.reading.nodes)
    share = 1 / losses.shape[0]
    with torch.no_grad():
        reached = {id(leaf) for leaf in leaves}
        pairs = [(p, total.grad[name]) for name, p in chosen.items() if id(p) in reached - rescaled]
        for leaf, g in [*pairs, *((leaf, g) for leaf, g in zip(rest, leaf_gradients) if g is not None)]:
            g = (g.mul_(share) if reduction == "mean" else g).to(leaf.dtype)
            g = g.to_sparse(1) if id(leaf) in sparse and not g.is_sparse else g
            leaf.grad = g if leaf.grad is None else leaf.grad.add_(g)
        for value in total.out.values():
            value.mul_(share)
    return FisherDiagonal(total.out, total.coverage, losses.shape[0], "empirical")


def _refuse_second_softmax(losses: Tensor) -> None:
    """Refuse a cross-entropy of probabilities, where the graph shows it: a log-softmax of a softmax.

    Raises:
        ModelError: it is one.
    """
    node, names = losses.grad_fn, list[str]()
    while node is not None and len(names) < 8 and node.next_functions:
        names.append(node.name())
        node = node.next_functions[0][0]
    for outer, inner in zip(names, names[1:]):
        if outer.startswith("LogSoftmax") and inner.startswith("Softmax"):
            raise ModelError(
                "the losses are a cross-entropy of probabilities (a softmax inside the model): take"
                " F.nll_loss(model(x).log(), y, reduction='none'), or leave out the model's softmax"
            )


def _with_sparse_gradients(nodes: list[Node]) -> set[int]:
    """Return the ids of the leaves whose gradient torch gives as a sparse tensor: embeddings with sparse=True alone.

    Optimisers for such gradients take no others.
    """
    found: dict[bool, set[int]] = {True: set(), False: set()}
    if not any(node.name().startswith("Embedding") and getattr(node, "_saved_sparse", False) for node in nodes):
        return found[True]
    for node in nodes:
        for edge in inputs_of(node):
            if edge is not None and is_leaf(edge[0]):
                found[bool(getattr(node, "_saved_sparse", False))].add(id(variable_of(edge[0])))
    return found[True] - found[False]
