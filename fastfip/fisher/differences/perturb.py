"""The gradient of the Fisher trace without second derivatives: every sample's weights shifted along its own gradient.

    d Tr F / dW = (2 / N) sum_n H_n g_n,       H_n g_n = (grad l_n at W + h g_n  -  grad l_n at W) / h  +  O(h)

One forward and backward pass gives every sample's gradient (graph/plan.py; the ordinary weight gradients are their sums
where they are formed). In the next pass sample n runs with W + h G_n, and an ordinary backward pass sums the gradients
at the shifted weights. So fused attention stays fused.

The shifted pass runs the model's own code; a torch function mode replaces the operations that the graph of the first
pass has named. What it cannot shift is an error that names the parameters, never a parameter left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import ModelError
from fastfip.fisher.differences.shifted import ShiftedForward, ShiftTarget, flipped, target_of
from fastfip.fisher.differences.shifts import shift_of
from fastfip.fisher.graph.forms import DenseForm, GradientForm
from fastfip.fisher.graph.norm_rules import mend_transposed
from fastfip.fisher.graph.plan import Plan, UseGroup
from fastfip.fisher.graph.reading import topological
from fastfip.fisher.graph.verify import Cache, plan_for
from fastfip.fisher.modes import readable

#: The largest shift of a parameter, relative to its size, by (dtype, "forward" or "central"): where the error of the
#: difference quotient and that of rounding meet, measured (docs/trace.md).
STEPS = {
    (torch.float64, "forward"): 1e-8,
    (torch.float64, "central"): 3e-7,
    (torch.float32, "forward"): 3e-5,
    (torch.float32, "central"): 1e-4,
    (torch.bfloat16, "forward"): 1e-3,
    (torch.bfloat16, "central"): 2e-3,
    (torch.float16, "forward"): 3e-4,
    (torch.float16, "central"): 1e-3,
}
#: By default the shift may also change no loss by more than this share of min(loss, 1), to first order: nets with large
#: gradients bend sooner than the size of their weights says. Float64 steps are far from that; in 16 bits noise rules.
CHANGES = {(torch.float32, "forward"): 3e-2, (torch.float32, "central"): 1e-1}


class Uncovered(ModelError):
    """Parameters that the asked-for way cannot do."""


class TraceWithGradient(NamedTuple):
    """A trace with its gradient, computed."""

    trace: Tensor  # scalar
    gradient: dict[str, Tensor]  # of the trace, by parameter name; parameters without any are left out
    losses: Tensor  # [N]
    logits: Tensor
    mean_gradient: dict[str, Tensor] | None  # of the mean loss, where it came along


def default_step(dtype: torch.dtype, difference: str) -> float:
    """Return the relative step for parameters and arithmetic of this dtype."""
    return STEPS.get((dtype, difference), STEPS[torch.float32, difference])


def working_dtype(params: Mapping[str, Tensor]) -> torch.dtype:
    """The coarsest dtype that takes part: autocast's, or the parameters'."""
    first = next(iter(params.values()))
    if torch.is_autocast_enabled(first.device.type):
        return torch.get_autocast_dtype(first.device.type)
    return max((p.dtype for p in params.values()), key=lambda d: torch.finfo(d).eps)


def perturbed(
    model: nn.Module,
    batch: Batch,
    task: Task,
    params: Mapping[str, Tensor],
    *,
    cache: Cache | None = None,
    difference: str = "forward",
    step: float | None = None,
    loss_scale: float = 1.0,
) -> TraceWithGradient:
    """Return the trace of a batch and its gradient by per-sample shifts of the weights.

    Args:
        model: in the modes in which Fisher terms are taken.
        batch: N samples.
        task: how the model and the batch meet.
        params: name -> leaf.
        cache: what is known about the model's graphs.
        difference: "forward" (two passes, error O(h)) or "central" (three, O(h^2)).
        step: the largest shift of a parameter relative to its size; None: by dtype.
        loss_scale: multiplies the losses inside (float16).

    Raises:
        Uncovered: parameters used in a way that cannot be shifted; their names.
    """
    dtype = working_dtype(params)
    change = CHANGES.get((dtype, difference)) if step is None else None
    step = default_step(dtype, difference) if step is None else step
    exact = dtype in (torch.float32, torch.float64)
    with torch.enable_grad():
        with readable(model):
            logits = task.forward(model, batch)
        losses = task.loss(logits, batch)
        plan = plan_for(losses, params, cache)
    refuse(plan)
    targets = {id(group): target_of(plan, group) for groups in plan.groups.values() for group in groups}
    central = difference == "central"
    mean, samples = _first_pass(plan, targets, None if central else params, loss_scale)
    h, norms = _step_size(plan, targets, params, step)
    losses, logits = losses.detach(), logits.detach()
    if change is not None:
        room = float(torch.where(norms > 0, losses.clamp(max=1) / norms, torch.inf).min())
        h = min(h, change * room) if room > 0 else h
    del plan
    ends = [_shifted_pass(model, batch, task, params, list(targets.values()), h * sign, loss_scale, samples, exact)
            for sign in ((1.0, -1.0) if central else (1.0,))]  # fmt: skip
    # The kept gradients are those of scaled losses, so h G_n is a shift by (h loss_scale) g_n.
    scale = 2 / (samples * h * loss_scale * loss_scale)
    gradient = {}
    for name in params:
        high, low = ends[0].get(name), (ends[1] if central else mean or {}).get(name)
        if high is not None and low is not None:
            gradient[name] = (high - low).mul_(scale / 2 if central else scale)
    if mean is not None:
        mean = {name: g.div(samples * loss_scale) for name, g in mean.items()}
    return TraceWithGradient((norms / loss_scale**2).mean().to(losses.dtype), gradient, losses, logits, mean)


def refuse(plan: Plan) -> None:
    """Refuse parameters whose per-sample gradients do not come in a form that can be kept.

    Raises:
        Uncovered: there are such.
    """
    names = sorted([*(name for name in plan.params if name in plan.loop), *plan.pulled])
    if names:
        raise uncovered(names)


def uncovered(names: list[str]) -> Uncovered:
    """The error that names them."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Uncovered(
        f"way='perturb' cannot shift {', '.join(map(repr, names[:3]))}{rest} sample by sample (used by an operation"
        " without a rule): take way='exact', way='signs', or leave them out with params="
    )


def _first_pass(
    plan: Plan, targets: Mapping[int, ShiftTarget], params: Mapping[str, Tensor] | None, loss_scale: float
) -> tuple[dict[str, Tensor] | None, int]:
    """Give the targets their shifts; with `params` return the sums of gradients that came along or were asked for."""
    lost: list[str] = []
    # The ordinary gradient of a parameter is a sum of per-sample ones where those are formed; which, the shapes tell.
    leaves = {} if params is None else {name: p for name, p in params.items() if not _formed(plan, targets, name)}

    def take(group: UseGroup, form: GradientForm) -> None:
        target = targets[id(group)]
        if isinstance(form, DenseForm):
            target.flip = flipped(plan, group)
            if target.flip and not form.flip:  # joined forms are those of the parameter [I, O]
                form = DenseForm(form.a, form.g)
        shift = shift_of(form)
        if shift is None:
            lost.append(target.name)
        target.shift = shift

    with torch.no_grad():
        weights = torch.full_like(plan.losses, loss_scale)
        _, leaf_gradients = plan.forms(take, weights, leaves=list(leaves.values()))
    if lost:
        raise uncovered(sorted(set(lost)))
    if params is None:
        return None, plan.samples
    mean = {name: g.to_dense() if g.is_sparse else g for name, g in zip(leaves, leaf_gradients) if g is not None}
    for name in params:
        if name not in leaves and name in plan.groups:
            mean[name] = _summed(plan, targets, name, params[name])
    return mean, plan.samples


def _formed(plan: Plan, targets: Mapping[int, ShiftTarget], name: str) -> bool:
    """Whether all uses of a parameter give their sum over the samples for nothing."""
    return bool(plan.groups.get(name)) and all(targets[id(group)].summed for group in plan.groups[name])


def _summed(plan: Plan, targets: Mapping[int, ShiftTarget], name: str, param: Tensor) -> Tensor:
    out = torch.zeros_like(param)
    for group in plan.groups[name]:
        shift = targets[id(group)].shift
        total = None if shift is None else shift.total()
        if total is not None:
            view = group.chain.view(out)
            view.add_((total.mT if targets[id(group)].flip else total).reshape(view.shape).to(out.dtype))
    return out


def _step_size(
    plan: Plan, targets: Mapping[int, ShiftTarget], params: Mapping[str, Tensor], step: float
) -> tuple[float, Tensor]:
    """Return h and the squared norm of each sample's (scaled) gradient, [N]."""
    acc = torch.promote_types(plan.losses.dtype, torch.float32)
    norms = torch.zeros(plan.samples, dtype=acc, device=plan.losses.device)
    for target in targets.values():
        if target.shift is not None:
            norms += target.shift.norms().detach().to(norms)
    size = torch.stack([torch.linalg.vector_norm(p.detach(), dtype=acc) for p in params.values()]).norm()
    largest = float(norms.max().sqrt())
    # No gradient at all: any step will do. One that overflowed: what comes out is not finite either.
    return (step * float(size) / largest if 0 < largest < float("inf") else step), norms


def _shifted_pass(
    model: nn.Module,
    batch: Batch,
    task: Task,
    params: Mapping[str, Tensor],
    targets: list[ShiftTarget],
    h: float,
    loss_scale: float,
    samples: int,
    exact: bool,
) -> dict[str, Tensor]:
    """Return the gradient of the (scaled) sum of the losses where sample n has the weights W + h G_n."""
    mode = ShiftedForward(targets, h, samples, exact)
    with torch.enable_grad():
        with readable(model), mode:
            logits = task.forward(model, batch)
        missed = mode.missed()
        if missed:
            raise uncovered(missed)
        losses = task.loss(logits, batch)
        if losses.grad_fn is not None:
            mend_transposed(topological(losses.grad_fn))
        gradients = torch.autograd.grad(losses.sum() * loss_scale, list(params.values()), allow_unused=True)
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(params, gradients) if g is not None}


@contextlib.contextmanager
def swapped(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
    """Give parameters other memory for a block: whoever saved the old for a backward pass keeps it as it was."""
    before = {name: p.data for name, p in params.items()}
    try:
        for name, value in values.items():
            params[name].data = value
        yield
    finally:
        for name, data in before.items():
            params[name].data = data
