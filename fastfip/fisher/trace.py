"""The trace of the empirical Fisher, mean_n ||grad log p(y_n|x_n)||^2, with an exact gradient of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import ModelError
from fastfip.fisher.graph.forms import GradientForm
from fastfip.fisher.graph.plan import Plan, UseGroup, selected
from fastfip.fisher.graph.reading import as_real, own_gradients, topological
from fastfip.fisher.graph.verify import Cache, cache_of, plan_for
from fastfip.fisher.modes import check_modes, fit_for_fisher, naming_precision, readable
from fastfip.nets.process import checkpoints_kept, checkpoints_met
from fastfip.nets.shards import Shards, on_parts

#: Operations whose first derivative torch cannot differentiate. (Fused attention gives way to its mathematical form.)
_ONLY_FIRST = ("Cdist", "Pdist", "CtcLoss", "MultilabelMarginLoss", "MultiMarginLoss", "SegmentReduce", "Hardsigmoid",
               "EmbeddingBag", "ScaledDotProductFlash", "ScaledDotProductEfficient", "ScaledDotProductCudnn",
               "ScaledDotProductFused")  # fmt: skip
#: What torch puts in place of a derivative that is not there; it raises when a backward pass comes to it.
_ERRORS = ("torch::autograd::Error", "torch::autograd::NotImplemented")

Params = Iterable[str] | Mapping[str, Tensor] | None


class TraceOutput(NamedTuple):
    """What one forward pass gives."""

    trace: Tensor  # scalar
    losses: Tensor  # [N]
    logits: Tensor


def without_second_derivative(nodes: Iterable[Node]) -> str | None:
    """Return the name of an operation in a graph that torch cannot differentiate twice, if there is one."""
    for node in nodes:
        name = node.name()
        if name.startswith(_ONLY_FIRST):
            return name.rstrip("0123456789").removesuffix("Backward")
    return None


def written_for_one_derivative(nodes: Iterable[Node]) -> str | None:
    """Return the name of a function of the user's in a graph that is marked `@once_differentiable`, if there is one."""
    for node in nodes:
        own: Any = getattr(type(node), "_forward_cls", None)
        code = getattr(getattr(own, "backward", None), "__code__", None)
        if code is not None and code.co_filename == torch.autograd.function.__file__ and code.co_name == "wrapper":
            return str(own.__name__)
    return None


def _undifferentiable(norms: Tensor, nodes: Iterable[Node]) -> str | None:
    """What keeps norms from having a gradient: an operation in the graph of the losses, or what is in their own."""
    known = without_second_derivative(nodes)
    if known is not None or norms.grad_fn is None:
        return known
    if not any(node.name().startswith(_ERRORS) for node in topological(norms.grad_fn)):
        return None
    return written_for_one_derivative(nodes) or "an operation"


class _ValueOnly(torch.autograd.Function):
    """Norms whose backward pass says what is missing."""

    @staticmethod
    def forward(ctx: Any, norms: Tensor, operation: str) -> Tensor:
        ctx.operation = operation
        return norms.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise ModelError(
            f"the trace has no gradient here: the model uses {ctx.operation}, of which torch has no second derivative; "
            "where the model is smooth, take fastfip.FisherPenalty(model, way='perturb')"
        )


def squared_norms(
    losses: Tensor, params: Mapping[str, Tensor], *, cache: Cache | None = None, create_graph: bool = True
) -> Tensor:
    """Return || d losses[n] / d params ||^2 for every sample, [N], from the graph of `losses` [N].

    With `create_graph` the result can be differentiated, exactly (a double backward through ghost norms: no per-sample
    gradient is stored where a layer's rule applies). The graph of `losses` is kept in any case. For a second derivative
    the forward pass must not have used fused attention: see :func:`fastfip.fisher.modes.readable`.
    """
    with torch.enable_grad():
        plan = plan_for(losses, params, cache)
    if not create_graph:
        return _norms(plan)
    norms = _norms_with_graph(plan)
    operation = _undifferentiable(norms, plan.reading.nodes)
    return norms if operation is None else _ValueOnly.apply(norms, operation)


def _norms(plan: Plan) -> Tensor:
    """The values alone: one backward pass, forms dropped as soon as they are used."""
    total = torch.zeros(plan.samples, dtype=torch.float64, device=plan.losses.device)

    def take(group: UseGroup, form: GradientForm) -> None:
        total.add_(form.norms())

    with torch.no_grad():
        kept, _ = plan.forms(take, retain_graph=True)
        for n in range(plan.samples) if plan.pulled or plan.loop else ():
            for g in (*plan.pull(n, kept).values(), *_looped(plan, n, create_graph=False)):
                total[n] += as_real(g).double().square().sum()
    return total.to(plan.losses.dtype)


def _norms_with_graph(plan: Plan) -> Tensor:
    """The same as a differentiable function of everything that the losses depend on.

    Raises:
        ModelError: an operation of torch that has no second derivative.
    """
    for node in plan.reading.nodes if plan.pulled else ():
        if node.name().startswith("EmbeddingBag") and getattr(node, "_saved_sparse", False):
            raise ModelError("an EmbeddingBag with sparse=True has no second derivative: set sparse=False")
    with torch.enable_grad():
        gradients = plan.gradients()
        forms: dict[tuple[int, int], GradientForm] = {}

        def form(site: int, slot: int) -> GradientForm | None:
            g = gradients[site]
            if g is None:
                return None
            return forms.setdefault((site, slot), plan.form(site, slot, g))

        parts: list[Tensor] = []
        for groups in plan.groups.values():
            for group in groups:
                made = [one for use in group.uses if (one := form(use.site, use.slot)) is not None]
                if made:
                    parts.append(GradientForm.join(made).norms())
        if plan.pulled or plan.loop:
            kept = {use: one for use in plan.pulled_uses() if (one := form(*use)) is not None}
            each = []
            for n in range(plan.samples):
                mine = (*plan.pull(n, kept, create_graph=True).values(), *_looped(plan, n, create_graph=True))
                squares = [as_real(g).square().sum() for g in mine]
                each.append(torch.stack(squares).sum() if squares else plan.losses.new_zeros(()))
            parts.append(torch.stack(each))
        if not parts:
            return torch.zeros_like(plan.losses)
        return torch.stack([part.to(parts[0].dtype) for part in parts]).sum(0)


def _looped(plan: Plan, n: int, create_graph: bool) -> list[Tensor]:
    """Sample n's gradients of the parameters that only a backward pass of its own can give."""
    params = {name: p for name, p in plan.params.items() if name in plan.loop}
    if not params:
        return []
    with torch.enable_grad():
        loss = plan.losses[n]
    return list(own_gradients(loss, params, retain_graph=True, create_graph=create_graph).values())


def trace_and_logits(
    model: nn.Module, batch: Batch, task: Task | None = None, *, params: Params = None, create_graph: bool | None = None
) -> TraceOutput:
    """Return the trace with the losses [N] and logits of the same forward pass, for use inside a training loop.

    `losses.mean() + eta * trace` is the FIP objective of a batch in one forward pass. Arguments and errors as for
    :func:`fisher_trace`; labels are the batch's.
    """
    check_modes(model)
    task = Task() if task is None else task
    create_graph = torch.is_grad_enabled() if create_graph is None else create_graph
    chosen = selected(model, params)
    with naming_precision(chosen.values(), batch):
        task = fit_for_fisher(model, task, batch, task.loss_hook is None)
    with torch.enable_grad():
        met, kept = checkpoints_met(), checkpoints_kept()
        with readable(model, second_order=create_graph), naming_precision(chosen.values(), batch):
            logits = task.forward(model, batch)
        losses = task.loss(logits, batch)
        met, kept = checkpoints_met() - met, checkpoints_kept() - kept
        cache = cache_of(model, kept=kept > 0, once=met > kept)
        norms = squared_norms(losses, chosen, cache=cache, create_graph=create_graph)
        return TraceOutput(norms.mean(), losses, logits)


def fisher_trace(
    model: nn.Module,
    x: Batch,
    y: Tensor | None = None,
    *,
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
    forward: Callable[[nn.Module, Batch], Tensor] | None = None,
    params: Params = None,
    create_graph: bool | None = None,
    group: Any = None,
) -> Tensor:
    """Return Tr(F) of a batch, mean_n ||grad log p(y_n|x_n)||^2 over the parameters: a differentiable scalar.

    Its gradient with respect to the parameters (and x) is exact: a double backward through the norms of per-sample
    gradients, none of which is stored where a rule applies. It is not the norm of the mean gradient, which vanishes
    wherever the loss is stationary. Fused attention, which has no second derivative, is replaced by its mathematical
    form for the length of the call, and checkpointed blocks keep what they compute.

    Args:
        model: any module that classifies, in eval mode (or at least with BatchNorm and dropout in eval mode). Where it
            ends in a softmax, what goes into that is taken for the logits (without `forward=` and `loss=`).
        x: the inputs; with `y=None` a whole batch (a tuple or dict).
        y: labels [N]; to take the Fisher of the model's own distribution draw them with `fisher.draw_labels`.
        loss: `loss(logits, batch) -> [N]`; None: cross-entropy.
        forward: `forward(model, batch) -> logits`, with batch = (x, y).
        params: names of parameters (or name -> leaf tensor); None: all that require a gradient.
        create_graph: whether the result is to be differentiated; None: if gradients are enabled.
        group: processes that each give a batch of their own, of any length: a torch.distributed group, or "auto" for
            the default one. Every process gets the trace over all of these samples; the mean over the processes of the
            gradients that it has there, which DistributedDataParallel and FSDP take, is the gradient of that trace.
            None: this process alone. A model that is sharded over processes needs it; every rank then has to go through
            the backward pass, which gives each its part of that mean, and x no gradient.

    Raises:
        ModelError: BatchNorm in train mode (samples have no gradients of their own there), random outputs (dropout), a
            buffer that a forward pass changes, a frozen model, a checkpoint that hides its parameters; in
            the backward pass of the result: an operation of the model that torch cannot differentiate twice.
        DataError: the batch cannot be used.
        ConfigError: a sharded model without its group, or with tensors as `params`.

    Source: the trace term of FIP (arXiv 2409.00863); docs/trace.md for the three ways to its gradient.
    """
    batch = x if y is None else (x, y)
    task = Task.of(forward, loss)
    shards = Shards.of(model, group, params)
    model = model if shards is None else shards.twin
    if group is None:
        return trace_and_logits(model, batch, task, params=params, create_graph=create_graph).trace
    from fastfip.nets.ranks import Ranks

    with Ranks.of(group, model.parameters(), "fisher_trace") as ranks:
        if shards is not None and ranks is not None:
            from fastfip.fisher.sharded import compare_on_all

            compare_on_all(shards, ranks, task, batch)
        out = trace_and_logits(model, batch, task, params=params, create_graph=create_graph)
        trace = out.trace if ranks is None else ranks.mean_of(out.trace, len(out.losses))
    if shards is None:
        return trace
    return on_parts(trace, shards, selected(model, params))
