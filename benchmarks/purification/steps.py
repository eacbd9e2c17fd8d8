"""A step of the optimiser in each of the ways that are compared: of a batch, with the trace or without, to its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.fisher import trace_and_logits
from fastfip.fisher.modes import readable
from fastfip.spectral import SpectralShifts
from fastfip.spectral.fisher import delta_gradients, recording

ETA = 1e-3  # of the exact Fisher trace
Step = Callable[[Tensor, Tensor, bool], Tensor]
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def weights(model: nn.Module, make: Optimizer, *, compiled: bool = False) -> Step:
    """Every weight moves."""
    optimizer = make(list(model.parameters()))
    call = torch.compile(model, fullgraph=True) if compiled else model

    def step(x: Tensor, y: Tensor, trace: bool) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        if trace:
            found = trace_and_logits(model, (x, y), Task())
            loss = found.losses.mean()
            (loss + ETA * found.trace).backward()
        else:
            loss = F.cross_entropy(call(x), y)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def singular_values(
    model: nn.Module,
    make: Optimizer,
    rank: int | None = None,
    *,
    affine: bool = False,
    compiled: bool = False,
    rebuilt: Callable[[SpectralShifts], AbstractContextManager[object]] | None = None,
) -> Step:
    """Singular values move, with `affine` biases and norms too; `rebuilt` puts weights in place for a pass."""
    model.requires_grad_(False)
    shifts = SpectralShifts.of(model, rank)
    small = [p.requires_grad_(True) for p in model.parameters() if affine and p.dim() <= 1]
    optimizer = make([*shifts.deltas, *small])
    call = torch.compile(model, fullgraph=True) if compiled else model

    def through_shifts(x: Tensor, y: Tensor, trace: bool) -> Tensor:
        shifts.refresh()
        if trace:
            with recording(shifts) as record:
                with readable(model, second_order=True):
                    losses = F.cross_entropy(model(x), y, reduction="none")
                each = delta_gradients(shifts, record, losses, create_graph=True)
            loss = losses.mean()
            (loss + ETA * torch.stack([d.square().sum() for d in each]).sum() / len(x)).backward()
        else:
            loss = F.cross_entropy(call(x), y)
            loss.backward()
        shifts.collect()
        shifts.remove()
        return loss

    def step(x: Tensor, y: Tensor, trace: bool) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        if rebuilt is None:
            loss = through_shifts(x, y, trace)
        else:
            with rebuilt(shifts):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
        optimizer.step()
        return loss.detach()

    return step
