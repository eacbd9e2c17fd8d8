"""Rules of normalisation (rules.py has the others, and says what a rule is)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastfip.fisher.graph.forms import GradientForm, SumForm
from fastfip.fisher.graph.layout import Layout, candidates
from fastfip.fisher.graph.reading import inputs_of, shape_of
from fastfip.fisher.graph.recipe import Builder, Recipe, Slots, output_shape, rule
from fastfip.fisher.graph.rules import elementwise
from fastfip.fisher.graph.sums import centred_sums


def _norm(
    node: Any, slots: Slots, samples: int, x_hat: Callable[[], Tensor], dims: tuple[int, ...], after: int
) -> Recipe | None:
    """Norms z = x_hat * weight + bias, with weight in slot 1 and bias in slot 2."""
    if 0 in slots:
        return None
    z = output_shape(node)
    parts = {1: lambda g: g * x_hat(), 2: lambda g: g}
    builders = {slot: elementwise(parts[slot], shape_of(edge), after) for slot, edge in slots.items()}
    return Recipe("norm", z, candidates(dims, z, samples), slots, builders, dict.fromkeys(slots, SumForm))


def _channelwise(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *(1,) * (like.dim() - 2))


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def _batch_norm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    z = output_shape(node)
    batch_statistics = getattr(node, "_saved_training", True)
    if z[0] == 1 and all(edge[0].name() == "RepeatBackward0" for edge in slots.values()):
        return _instance_norm(node, slots, samples, batch_statistics)
    if batch_statistics:
        return None
    if 0 in slots:
        return None

    def saved() -> tuple[Tensor, Tensor, Tensor]:
        return node._saved_input, node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()

    builders = batch_norm_builders(slots, 1, saved)
    return Recipe("norm", z, candidates((0,), z, samples), slots, builders, dict.fromkeys(slots, SumForm))


def mend_transposed(nodes: Iterable[Any]) -> None:
    """Give BatchNorm of a graph the gradient in the layout of its input, where there are maps with a side of one.

    Where one of the two is transposed, as where tokens are made of a map, torch 2.13 takes the one for the other: a
    single sample, and maps of which a side is one, pass for contiguous in both layouts.
    """
    for node in nodes:
        if node.name() == "NativeBatchNormBackward0":
            samples, _, *sides = output_shape(node)
            if len(sides) > 1 and 1 in (samples, *sides):
                x = node._saved_input
                if 0 not in x.stride():
                    node.register_prehook(partial(_in_layout, x.shape, x.stride()))


def _in_layout(shape: torch.Size, stride: tuple[int, ...], gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    g, *rest = gradients
    if g is None or g.stride() == stride:
        return gradients
    return g.new_empty_strided(shape, stride).copy_(g), *rest


def batch_norm_builders(
    slots: Slots, weight: int, saved: Callable[[], tuple[Tensor, Tensor, Tensor]]
) -> dict[int, Builder]:
    """Weight (in slot `weight`) and bias of BatchNorm with the statistics in `saved()`: x, mean, 1 / deviation."""
    last: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []  # weight and bias come from the same sums

    def builder(slot: int) -> Builder:
        def build(g: Tensor, layout: Layout, samples: int) -> GradientForm:
            x, mean, scale = saved()
            if last and last[0][0] is g:
                sums = last.pop()[1]
            else:
                sums = centred_sums(g, x, mean)
                last[:] = [(g, sums)] if len(slots) > 1 else []
            total = sums[0] * scale.to(sums[0].dtype) if slot == weight else sums[1]
            return SumForm(layout.split(total, samples).sum(1), layout.split(g, samples))

        return build

    return {slot: builder(slot) for slot in slots}


def _running_x_hat(node: Any) -> Tensor:
    x = node._saved_input
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return (x - _channelwise(node._saved_running_mean, x)) * _channelwise(scale, x)


def _instance_norm(node: Any, slots: Slots, samples: int, own_statistics: bool) -> Recipe | None:
    """Instance norm: torch writes it as batch norm of [1, N*C, ...], with the parameters repeated N times."""
    z = output_shape(node)
    times = {tuple(edge[0]._saved_repeats) for edge in slots.values()}  # type: ignore[attr-defined]
    if len(times) != 1 or len(next(iter(times))) != 1:
        return None
    repeats = next(iter(times))[0]
    natural = torch.Size((repeats, z[1] // repeats, *z[2:]))
    inner = {slot: inputs_of(edge[0])[0] for slot, edge in slots.items()}

    def x_hat() -> Tensor:
        x = node._saved_input
        if not own_statistics:
            return _running_x_hat(node).reshape(natural)
        dims = tuple(range(2, x.dim()))
        centred = x - x.mean(dims, keepdim=True)
        variance = centred.square().mean(dims, keepdim=True)
        return (centred * (variance + node._saved_eps).rsqrt()).reshape(natural)

    parts = {1: lambda g: g * x_hat(), 2: lambda g: g}
    edges = {slot: edge for slot, edge in inner.items() if edge is not None}
    builders = {slot: elementwise(parts[slot], shape_of(edge), len(z) - 2) for slot, edge in edges.items()}
    layouts, makes = candidates((0,), natural, samples), dict.fromkeys(slots, SumForm)
    return Recipe("norm", natural, layouts, edges, builders, makes, natural=lambda g: g.reshape(natural))


def _standardised(x: Tensor, dims: tuple[int, ...], rstd: Tensor, centre: bool) -> Tensor:
    """x_hat as the operation computed it, with the right derivatives; what it added to the variance is in `rstd`."""
    x = x.to(rstd.dtype)
    centred = x - x.mean(dims, keepdim=True) if centre else x
    variance = centred.square().mean(dims, keepdim=True)
    added = rstd.detach().pow(-2) - variance.detach()
    return centred * (variance + added).rsqrt()


@rule("NativeLayerNormBackward0")
def _layer_norm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    z = output_shape(node)
    own = len(node._saved_normalized_shape)
    last = tuple(range(-own, 0))

    def x_hat() -> Tensor:
        return _standardised(node._saved_input, last, node._saved_result2, centre=True)

    return _norm(node, slots, samples, x_hat, tuple(range(len(z) - own)), 0)


@rule("FusedRmsNormBackward0")
def _rms_norm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    z = output_shape(node)
    own = len(node._saved_normalized_shape)
    last = tuple(range(-own, 0))

    def x_hat() -> Tensor:
        return _standardised(node._saved_input, last, node._saved_result1, centre=False)

    return _norm(node, slots, samples, x_hat, tuple(range(len(z) - own)), 0)


@rule("NativeGroupNormBackward0")
def _group_norm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    z = output_shape(node)

    def x_hat() -> Tensor:
        x = node._saved_input
        grouped = x.reshape(x.shape[0], node._saved_group, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        scale = (centred.square().mean(2, keepdim=True) + node._saved_eps).rsqrt()
        return (centred * scale).reshape(x.shape)

    return _norm(node, slots, samples, x_hat, (0,), len(z) - 2)
