"""Convolution as a matrix product: the windows of a map of any dimension, stride, padding, dilation and groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

#: What torch.ops.aten.convolution takes: stride, padding, dilation, transposed, output padding, groups.
ConvolutionOptions = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


@dataclass(frozen=True)
class ConvShape:
    """What a convolution does besides its weight [O, C/groups, *kernel]; one number for each spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def taps(self) -> int:
        """Number of positions in the kernel."""
        return math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether the windows are the feature map itself."""
        return self.taps == 1 and all(s == 1 for s in self.stride) and not any(self.padding)


#: The same as an operator of torch takes it: kernel, stride, padding, dilation, groups; a Linear layer's are empty.
ShapeArguments = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def arguments_of(shape: ConvShape | None) -> ShapeArguments:
    """Return a shape as the arguments of an operator; None: a Linear layer."""
    if shape is None:
        return (), (), (), (), 1
    return shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups


def shape_of(arguments: Sequence[Any]) -> ConvShape | None:
    """Return the shape that an operator's arguments describe."""
    kernel, stride, padding, dilation, groups = arguments
    return ConvShape(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups) if len(kernel) else None


def per_dimension(option: Iterable[int], dims: int) -> tuple[int, ...]:
    """Return an option of a convolution with one number for each of its spatial dimensions."""
    values = tuple(int(v) for v in option)
    return values * dims if len(values) == 1 else values


def windows(x: Tensor, shape: ConvShape, out_size: tuple[int, ...]) -> Tensor:
    """Return the windows of x [B, C, *in] as a strided view [B, C, *kernel, *out] (of a padded copy if it is padded).

    Differentiable. `out_size` may be smaller than what fits: the windows of the rest are left out.
    """
    if any(shape.padding):
        x = F.pad(x, [p for size in reversed(shape.padding) for p in (size, size)])
    if 0 in x.stride():  # the adjoint of as_strided is not that of an expanded tensor
        x = x.contiguous()
    strides = x.stride()
    spatial = strides[2:]
    return x.as_strided(
        (*x.shape[:2], *shape.kernel, *out_size),
        (
            *strides[:2],
            *(s * d for s, d in zip(spatial, shape.dilation)),
            *(s * d for s, d in zip(spatial, shape.stride)),
        ),
        x.storage_offset(),
    )


def columns(x: Tensor, shape: ConvShape, out_size: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """Return the windows of x [B, C, *in] as [B, groups, C/groups * taps, T] with T = prod(out_size).

    `out` may be memory of that many elements, which is then filled and returned in this shape.
    """
    batch, channels = x.shape[:2]
    size = (batch, shape.groups, channels // shape.groups * shape.taps, math.prod(out_size))
    if shape.pointwise and tuple(x.shape[2:]) == tuple(out_size):
        return x.reshape(size)
    view = windows(x, shape, out_size)
    if out is None:
        return view.reshape(size)
    out.view(view.shape).copy_(view)
    return out.view(size)


def columns_transpose(cols: Tensor, shape: ConvShape, in_size: tuple[int, ...], out_size: tuple[int, ...]) -> Tensor:
    """Return the adjoint of :func:`columns`: sum [B, groups, C/groups * taps, T] into a feature map [B, C, *in]."""
    batch, groups = cols.shape[:2]
    channels = groups * (cols.shape[2] // shape.taps)
    padded = [n + 2 * p for n, p in zip(in_size, shape.padding)]
    full = cols.new_zeros((batch, channels, *padded))
    cols = cols.reshape(batch, channels, *shape.kernel, *out_size)
    both = (slice(None), slice(None))
    for tap in itertools.product(*(range(k) for k in shape.kernel)):
        reach = zip(tap, shape.dilation, out_size, shape.stride)
        where = tuple(slice(k * d, k * d + (o - 1) * s + 1, s) for k, d, o, s in reach)
        full[both + where] += cols[both + tap]
    return full[both + tuple(slice(p, p + n) for p, n in zip(shape.padding, in_size))]
