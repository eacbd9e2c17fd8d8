"""One rule for each kind of operation: how its gradient and what it has saved become per-sample gradients (forms.py).

A rule looks at an autograd node and at those of its inputs that come from parameters, and returns a recipe, or None
where it does not apply. It does not compute: layers and backends do not multiply. What an operation has saved is read
from its node (`_saved_...`, as torch documents), with its own history, so every form can be differentiated again.

Those of norms are in norm_rules.py. To add a rule: write a function, register it under the node's name;
`tests/fisher/test_rules.py` walks the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfip.fisher.graph.forms import ConvForm, DenseForm, GradientForm, RowsForm, SumForm
from fastfip.fisher.graph.layout import Layout, candidates
from fastfip.fisher.graph.reading import shape_of
from fastfip.fisher.graph.recipe import Builder, Recipe, Slots, output_shape, rule
from fastfip.ops.convolution import ConvShape, per_dimension

# ------------------------------------------------------------------------------------------------- matrix products


def _dense(side: Tensor | None, flip: bool, factor: float = 1.0) -> Builder:
    """The gradient of a matrix in z = a W (g natural [M, O]); `side` is a [M, I]."""

    def build(g: Tensor, layout: Layout, samples: int) -> GradientForm:
        assert side is not None
        g, a = layout.split(g, samples), layout.split(side, samples)
        return DenseForm(g if factor == 1 else g * factor, a, flip)

    return build


def _scaled(value: Any) -> float:
    return float(value) if value is not None else 1.0


def _matmul(node: Any, slots: Slots, samples: int, first: int, saved: tuple[str, str]) -> Recipe | None:
    """Products z = mat1 @ mat2, with mat1 in slot `first`; the parameter is one of them, or the bias."""
    z = output_shape(node)
    alpha, beta = _scaled(getattr(node, "_saved_alpha", None)), _scaled(getattr(node, "_saved_beta", None))
    if first in slots:  # W a: the samples are columns
        if set(slots) != {first}:
            return None
        side = getattr(node, saved[1])
        shape = torch.Size((z[1], z[0]))
        build = {first: _dense(None if side is None else side.t(), False, alpha)}
        return Recipe(
            "linear", shape, candidates((0,), shape, samples), slots, build, {first: DenseForm}, natural=torch.t
        )
    builders: dict[int, Builder] = {}
    if first + 1 in slots:  # a W, the end has the shape [I, O]
        builders[first + 1] = _late(lambda: _dense(getattr(node, saved[0]), True, alpha))
    if first == 1 and 0 in slots:
        ending = shape_of(slots[0])
        if len(ending) > 1 and ending[0] != 1:
            return None
        builders[0] = elementwise(lambda g: g if beta == 1 else g * beta, ending)
    makes = {slot: SumForm if slot < first else DenseForm for slot in builders}
    return Recipe("linear", z, candidates((0,), z, samples), slots, builders, makes)


def _late(make: Callable[[], Builder]) -> Builder:
    """Saved tensors are read when the gradient is there, not when the graph is."""
    return lambda g, layout, samples: make()(g, layout, samples)


@rule("AddmmBackward0")
def _addmm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    return _matmul(node, slots, samples, 1, ("_saved_mat1", "_saved_mat2"))


@rule("MmBackward0")
def _mm(node: Any, slots: Slots, samples: int) -> Recipe | None:
    return _matmul(node, slots, samples, 0, ("_saved_self", "_saved_mat2"))


# --------------------------------------------------------------------------------------------------- convolutions


def _one_after_another(t: Tensor, layout: Layout, samples: int) -> Tensor:
    """Bring a batch [k*N, ...] into the order in which the frames of a sample follow each other."""
    if layout.major or t.shape[0] == samples:
        return t
    return layout.split(t, samples).flatten(0, 1)


@rule("ConvolutionBackward0", "ConvolutionOverrideableBackward0")
def _convolution(node: Any, slots: Slots, samples: int) -> Recipe | None:
    options = [getattr(node, f"_saved_{k}") for k in ("stride", "padding", "dilation")]
    transposed = node._saved_transposed
    return convolution_recipe(node, slots, samples, options, node._saved_groups, transposed, lambda: node._saved_input)


def convolution_recipe(
    node: Any,
    slots: Slots,
    samples: int,
    options: Sequence[Any],  # stride, padding, dilation
    groups: int,
    transposed: bool,
    saved: Callable[[], Tensor],
) -> Recipe | None:
    """A convolution of `saved()` with a weight in slot 1 and a bias in slot 2."""
    z = output_shape(node)
    if 0 in slots:
        return None
    dims = len(z) - 2
    builders: dict[int, Builder] = {}
    if 1 in slots:
        kernel = tuple(shape_of(slots[1])[2:])
        stride, padding, dilation = (per_dimension(option, dims) for option in options)
        shape = ConvShape(kernel, stride, padding, dilation, groups)

        def weight(g: Tensor, layout: Layout, samples: int) -> GradientForm:
            g, x = (_one_after_another(t, layout, samples) for t in (g, saved()))
            return ConvForm(x, g, shape, samples) if transposed else ConvForm(g, x, shape, samples)

        builders[1] = weight
    if 2 in slots:
        builders[2] = elementwise(lambda g: g, shape_of(slots[2]), after=dims)
    return Recipe("convolution", z, candidates((0,), z, samples), slots, builders, {1: ConvForm, 2: SumForm})


# --------------------------------------------------------------------------------------------------- elementwise


def _reduced(h: Tensor, layout: Layout, samples: int, ending: torch.Size, after: int) -> SumForm:
    """Sum contributions h to a parameter-side tensor of shape `ending` that is broadcast (`after` more dimensions)."""
    size = tuple(ending) + (1,) * after
    size = (1,) * (h.dim() - len(size)) + size
    per = layout.split(h, samples)
    gone = [d + 1 for d in range(h.dim()) if size[d] == 1 and per.shape[d + 1] != 1]
    if per.dtype in (torch.float16, torch.bfloat16):
        per = per.float()
    total = per.sum(gone) if gone else per
    return SumForm(total.reshape(samples, *ending), per)


def elementwise(contribution: Callable[[Tensor], Tensor], ending: torch.Size, after: int = 0) -> Builder:
    """Gradients of a tensor of shape `ending` that is broadcast to the output, by the contribution of each element."""
    return lambda g, layout, samples: _reduced(contribution(g), layout, samples, ending, after)


def _broadcast_dims(z: torch.Size, endings: list[torch.Size]) -> tuple[int, ...]:
    """Dimensions of z in which none of the parameter-side tensors differs: where the samples may lie."""
    dims = []
    for d in range(len(z)):
        back = len(z) - d  # counted from the end, as broadcasting does
        if all(len(ending) < back or ending[len(ending) - back] == 1 for ending in endings):
            dims.append(d)
    return tuple(dims)


def _pointwise(
    kind: str, node: Any, slots: Slots, samples: int, parts: Mapping[int, Callable[[Tensor], Tensor]]
) -> Recipe | None:
    if not set(slots) <= set(parts):
        return None
    z = output_shape(node)
    endings = {slot: shape_of(edge) for slot, edge in slots.items()}
    dims = _broadcast_dims(z, list(endings.values()))
    builders = {slot: elementwise(parts[slot], endings[slot]) for slot in slots}
    return Recipe(kind, z, candidates(dims, z, samples), slots, builders, dict.fromkeys(slots, SumForm))


@rule("AddBackward0")
def _add(node: Any, slots: Slots, samples: int) -> Recipe | None:
    alpha = float(node._saved_alpha)
    return _pointwise("added", node, slots, samples, {0: lambda g: g, 1: lambda g: g if alpha == 1 else g * alpha})


@rule("SubBackward0")
def _sub(node: Any, slots: Slots, samples: int) -> Recipe | None:
    alpha = float(node._saved_alpha)
    return _pointwise("added", node, slots, samples, {0: lambda g: g, 1: lambda g: g * -alpha})


@rule("MulBackward0")
def _mul(node: Any, slots: Slots, samples: int) -> Recipe | None:
    if len(slots) > 1:
        return None
    parts = {0: lambda g: g * node._saved_other, 1: lambda g: g * node._saved_self}
    return _pointwise("multiplied", node, slots, samples, parts)


@rule("DivBackward0")
def _div(node: Any, slots: Slots, samples: int) -> Recipe | None:
    if len(slots) > 1:
        return None
    parts = {
        0: lambda g: g / node._saved_other,
        1: lambda g: -g * node._saved_self / node._saved_other.square(),
    }
    return _pointwise("multiplied", node, slots, samples, parts)


@rule("AddcmulBackward0")
def _addcmul(node: Any, slots: Slots, samples: int) -> Recipe | None:
    if 1 in slots and 2 in slots:
        return None
    by = float(node._saved_value)
    parts = {
        0: lambda g: g,
        1: lambda g: by * g * node._saved_tensor2,
        2: lambda g: by * g * node._saved_tensor1,
    }
    return _pointwise("multiplied", node, slots, samples, parts)


@rule("PreluKernelBackward0")
def _prelu(node: Any, slots: Slots, samples: int) -> Recipe | None:
    return _pointwise("elementwise", node, slots, samples, {1: lambda g: g * node._saved_self.clamp(max=0)})


@rule("ExpandBackward0")
def _expand(node: Any, slots: Slots, samples: int) -> Recipe | None:
    return _pointwise("token", node, slots, samples, {0: lambda g: g})


# ------------------------------------------------------------------------------------------------------- tables


def _table(node: Any, slots: Slots, samples: int, index: Callable[[], Tensor], lead: int) -> Recipe | None:
    """Tables z[p] = W[index[p]], with `lead` dimensions of positions."""
    z = output_shape(node)
    size = shape_of(slots[0])

    def build(g: Tensor, layout: Layout, samples: int) -> GradientForm:
        where = layout.split(index(), samples)
        where = where.reshape(samples, -1)
        g = layout.split(g, samples)
        return RowsForm(g.reshape(samples, where.shape[1], *size[1:]), where, size[0])

    return Recipe("embedding", z, candidates(range(lead), z, samples), slots, {0: build}, {0: RowsForm})


@rule("EmbeddingBackward0")
def _embedding(node: Any, slots: Slots, samples: int) -> Recipe | None:
    # What scale_grad_by_freq=True makes of the gradient, with counts over the whole batch, is no derivative: left out.
    padding = node._saved_padding_idx
    padding = padding - (1 << 64) if padding >= 1 << 63 else padding

    def index() -> Tensor:
        indices = node._saved_indices
        return indices if padding < 0 else indices.masked_fill(indices == padding, -1)

    return _table(node, slots, samples, index, len(output_shape(node)) - 1)


@rule("IndexBackward0")
def _index(node: Any, slots: Slots, samples: int) -> Recipe | None:
    indices = node._saved_indices
    if len(indices) != 1 or indices[0] is None or indices[0].dtype not in (torch.int64, torch.int32):
        return None
    size = shape_of(slots[0])[0]
    return _table(node, slots, samples, lambda: node._saved_indices[0].remainder(size), indices[0].dim())


@rule("IndexSelectBackward0")
def _index_select(node: Any, slots: Slots, samples: int) -> Recipe | None:
    return _table(node, slots, samples, lambda: node._saved_index, 1) if node._saved_dim == 0 else None
