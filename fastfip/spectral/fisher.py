"""Per-sample gradients with respect to delta: the Fisher information of Fast FIP, in N x R numbers.

For a sample n with input a [T, I] and output gradient g [T, O] of a layer,

    d l_n / d delta_r = 1[sigma_r + delta_r > 0] * sum_t (g U)[t, r] (a V)[t, r]

so no O x I gradient of a sample is formed, and the forward pass knows a V already (`fastfip.ops.spectral`). Uses of a
weight that are no layer of their own (packed attention projections, tied weights) are read from the autograd graph, and
their per-sample gradients are projected one at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from fastfip.fisher import per_sample_gradients
from fastfip.ops.spectral.grad import prefers_kernel, spectral_grad
from fastfip.ops.spectral.op import project
from fastfip.spectral.shift import SpectralShifts, is_transposed
from fastfip.spectral.site import ForwardRecord, LayerUse
from fastfip.spectral.weight import SpectralShift

__all__ = ["delta_gradients", "gradients_of_one", "recording"]

#: Relative difference of one sample's gradient from its own backward pass above which a layer goes the slow way.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}


@contextlib.contextmanager
def recording(shifts: SpectralShifts) -> Iterator[ForwardRecord]:
    """Record what the layers whose weights are shifted compute, for `delta_gradients`; W(delta) must be in place."""
    if not shifts.installed:
        raise RuntimeError("refresh() the shifts first: there is nothing to record on the model's own weights")
    shifts.recorder.current = record = ForwardRecord()
    try:
        yield record
    finally:
        shifts.recorder.current = None


def delta_gradients(
    shifts: SpectralShifts, record: ForwardRecord, losses: Tensor, create_graph: bool = False
) -> list[Tensor]:
    """Return for each shift the gradients of every sample's own loss with respect to delta, [N, G, R].

    Args:
        shifts: the shifts, with W(delta) in place.
        record: of the forward pass that `losses` came from.
        losses: [N], one loss for each sample (never their mean).
        create_graph: keep the graph, so that functions of the result can be differentiated (Tr F).
    """
    uses = [(k, use) for k, entries in record.uses.items() for use in entries]
    values = {k: shift.value for k, shift in enumerate(shifts.shifts) if shift.value is not None}
    outputs = [use.output for _, use in uses]
    gradients = torch.autograd.grad(
        losses.sum(),
        [*outputs, *values.values()],
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )
    n = losses.shape[0]
    out: list[Tensor | None] = [None] * len(shifts)
    alone: set[int] = set()  # shifts whose uses are not one sample after the other
    for (k, use), g in zip(uses, gradients):
        if g is None:
            continue
        if use.output.shape[0] % n or use.known.dim() < 2:
            alone.add(k)
            continue
        each = _products(use, shifts.shifts[k], g, n)
        out[k] = each if out[k] is None else out[k] + each  # type: ignore[operator]
    alone |= _refuted(shifts, record, losses, out, alone)
    if alone:
        for k, each in _looped(shifts, sorted(alone), losses, create_graph).items():
            out[k] = each
    elsewhere = {k: values[k] for k, g in zip(values, gradients[len(outputs) :]) if g is not None}
    if elsewhere:
        for k, each in _pulled(shifts, elsewhere, losses, create_graph).items():
            out[k] = each if out[k] is None else out[k] + each  # type: ignore[operator]
    result = []
    for shift, value in zip(shifts.shifts, out):
        if value is None:
            value = losses.new_zeros(n, *shift.sigma.shape)
        result.append(value * (shift.sigma + shift.delta.detach() > 0))
    return result


def gradients_of_one(shifts: SpectralShifts, loss: Tensor, retain_graph: bool = False) -> list[Tensor]:
    """Return the gradient of a loss with respect to each delta, [G, R], by an ordinary backward pass.

    No layer is recorded for it, so that blocks which are computed again can be gone through.

    Args:
        shifts: the shifts, with W(delta) in place.
        loss: a scalar.
        retain_graph: keep the graph for another one.
    """
    elsewhere = [(k, shift.value) for k, shift in enumerate(shifts.shifts) if shift.value is not None]
    leaves = [*shifts.deltas, *(value for _, value in elsewhere)]
    own, pulled = [], torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)
    for delta, g in zip(shifts.deltas, pulled):
        own.append(torch.zeros_like(delta) if g is None else g)
    for (k, _), g in zip(elsewhere, pulled[len(own) :]):
        if g is not None:
            own[k] = own[k] + shifts.shifts[k].pull(g)
    return own


def _refuted(
    shifts: SpectralShifts, record: ForwardRecord, losses: Tensor, out: list[Tensor | None], alone: set[int]
) -> set[int]:
    """Find the shifts for which one sample's gradient is not that of its own backward pass.

    The products take the samples to lie one after the other along the first axis, which a net with its sequence first
    does not do. Once for each kind of forward pass.
    """
    kind = (len(losses), *((k, *(tuple(use.output.shape) for use in uses)) for k, uses in record.uses.items()))
    if kind not in shifts.verified:
        m = int(losses.detach().nan_to_num().argmax())
        checked = [k for k, each in enumerate(out) if each is not None and k in record.uses and k not in alone]
        wrong = set()
        if checked:
            deltas = [shifts.shifts[k].delta for k in checked]
            own = torch.autograd.grad(losses[m], deltas, retain_graph=True, allow_unused=True)
            for k, right in zip(checked, own):
                shift, each = shifts.shifts[k], out[k]
                assert each is not None
                # W(delta)'s other uses come later, one sample at a time.
                right = torch.zeros_like(shift.sigma) if right is None else right
                mine = each[m].detach() * (shift.sigma + shift.delta.detach() > 0)
                scale = max(float(right.norm()), float(mine.norm()))
                if float((mine - right).norm()) > TOLERANCE.get(shift.weight.dtype, 0.2) * scale:
                    wrong.add(k)
        shifts.verified[kind] = frozenset(wrong)
    return set(shifts.verified[kind])


def _looped(shifts: SpectralShifts, which: list[int], losses: Tensor, create_graph: bool) -> dict[int, Tensor]:
    """The gradients of the layers' own uses by one backward pass for each sample: exact however samples lie."""
    deltas = [shifts.shifts[k].delta for k in which]
    rows = [
        torch.autograd.grad(loss, deltas, retain_graph=True, create_graph=create_graph, allow_unused=True)
        for loss in losses
    ]
    return {
        k: torch.stack([torch.zeros_like(delta) if row[i] is None else row[i] for row in rows])
        for i, (k, delta) in enumerate(zip(which, deltas))
    }


def _products(use: LayerUse, shift: SpectralShift, g: Tensor, n: int) -> Tensor:
    """sum_t (g U)(a V) of one use, [N, G, R]."""
    module = use.module
    conv, transposed = isinstance(module, _ConvNd), is_transposed(module)
    known, groups, rank = use.known, *shift.sigma.shape
    left, right = (t if conv else t.reshape(n, -1, t.shape[-1]) for t in ((known, g) if transposed else (g, known)))
    operands = left, right, None if transposed else shift.u, shift.v if transposed else None, use.shape
    if prefers_kernel(*operands):  # q is not stored, and multiplied out again by the backward pass of the trace
        return spectral_grad(*operands, per_sample=True).reshape(n, -1, groups, rank).sum(1)
    other = project(g, shift.u, shift.v, use.shape, right=transposed)
    if conv:
        return (known * other).flatten(2).sum(-1).reshape(n, -1, groups, rank).sum(1)
    return (known * other).reshape(n, -1, rank).sum(1).unsqueeze(1)


def _pulled(shifts: SpectralShifts, values: dict[int, Tensor], losses: Tensor, create_graph: bool) -> dict[int, Tensor]:
    """The same for uses of W(delta) itself, one sample after the other."""
    rows: dict[int, list[Tensor]] = {k: [] for k in values}
    names = {str(k): value for k, value in values.items()}
    for gradients in per_sample_gradients(losses, names, create_graph=create_graph):
        for k, mine in rows.items():
            shift = shifts.shifts[k]
            g = gradients.get(str(k))
            mine.append(torch.zeros_like(shift.sigma) if g is None else shift.pull(g))
    return {k: torch.stack(mine) for k, mine in rows.items()}
