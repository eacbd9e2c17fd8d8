"""Per-sample gradients with respect to delta: the Fisher information of Fast FIP, in N x R numbers.

For a sample n with input a [T, I] and output gradient g [T, O] of a layer,

    d l_n / d delta_r = 1[sigma_r + delta_r > 0] * sum_t (g U)[t, r] (a V)[t, r]

so no O x I gradient of a sample is formed. For a convolution a V is the convolution with the right singular vectors as
kernels and g U one with 1 x 1 kernels: the unfolded input is not formed either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .shift import Shift, SpectralShifts, is_transposed

__all__ = ["delta_gradients", "recording"]

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Record:
    """What the forward pass left: for each shift the (module, input, output) of each of its uses."""

    def __init__(self) -> None:
        self.uses: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {}


@contextlib.contextmanager
def recording(shifts: SpectralShifts) -> Iterator[Record]:
    """Record inputs and outputs of the layers whose weights are shifted, for `delta_gradients`."""
    record = Record()
    handles = []
    try:
        for k, shift in enumerate(shifts.shifts):
            for place in shift.places:

                def hook(module: nn.Module, args: Any, output: Tensor, k: int = k) -> None:
                    record.uses.setdefault(k, []).append((module, args[0], output))

                handles.append(place.register_forward_hook(hook))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def delta_gradients(shifts: SpectralShifts, record: Record, losses: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Return for each shift the gradients of every sample's own loss with respect to delta, [N, G, R].

    Args:
        shifts: the shifts, installed or not.
        record: of the forward pass that `losses` came from.
        losses: [N], one loss for each sample (never their mean).
        create_graph: keep the graph, so that functions of the result can be differentiated (Tr F).
    """
    uses = [(k, use) for k, entries in record.uses.items() for use in entries]
    gradients = torch.autograd.grad(
        losses.sum(),
        [output for _, (_, _, output) in uses],
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )
    n = losses.shape[0]
    out: list[Tensor | None] = [None] * len(shifts)
    for (k, (module, a, _)), g in zip(uses, gradients):
        if g is None:
            continue
        shift = shifts.shifts[k]
        each = _products(module, shift, a, g, n)
        out[k] = each if out[k] is None else out[k] + each  # type: ignore[operator]
    result = []
    for shift, value in zip(shifts.shifts, out):
        if value is None:
            value = losses.new_zeros(n, *shift.sigma.shape)
        result.append(value * (shift.sigma + shift.delta.detach() > 0))
    return result


def _products(module: nn.Module, shift: Shift, a: Tensor, g: Tensor, n: int) -> Tensor:
    """sum_t (g U)(a V) of one use, [N, G, R]."""
    u, v = shift.u.to(a.dtype), shift.v.to(a.dtype)
    if not isinstance(module, _ConvNd):
        left, right = g @ u[0], a @ v[0]  # [..., R], the samples outermost
        return (left * right).reshape(n, -1, left.shape[-1]).sum(1).unsqueeze(1)
    if is_transposed(module):
        a, g = g, a  # its weight gradient is that of a convolution that goes from the output to the input
    groups, rank = shift.sigma.shape
    dims = g.dim() - 2
    convolve = _CONVOLUTION[dims]
    kernel = v.mT.reshape(groups * rank, -1, *module.kernel_size)
    if module.padding_mode != "zeros":
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    padding: Any = 0 if module.padding_mode != "zeros" else module.padding
    right = convolve(a, kernel, None, module.stride, padding, module.dilation, groups)
    flat = u.mT.reshape(groups * rank, -1, *[1] * dims)
    left = convolve(g, flat, None, 1, 0, 1, groups)
    return (left * right).flatten(2).sum(-1).reshape(n, groups, rank)
