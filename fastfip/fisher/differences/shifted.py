"""The forward pass with shifted weights: a torch function mode that replaces the operations that use parameters.

Which call uses what is known from the graph of an earlier pass (ShiftTarget): a call is recognised by the memory that
its argument views, and by the kind of operation that is due. A call that should have come and did not is reported.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfip.fisher.differences.shifts import (
    RowShift,
    ValueShift,
    WeightShift,
    convolution,
    fits_convolution,
    fits_matrix,
    linear,
)
from fastfip.fisher.graph.forms import ConvForm, DenseForm, SumForm
from fastfip.fisher.graph.layout import Layout
from fastfip.fisher.graph.plan import Plan, UseGroup
from fastfip.ops.convolution import ConvolutionOptions, per_dimension

MemoryKey = tuple[Any, ...]


@dataclass(frozen=True)
class ScheduledUse:
    """One use of a parameter, in the order of execution."""

    order: int
    operation: str  # name of the autograd node
    layout: Layout
    shape: torch.Size  # that the layout speaks of
    options: ConvolutionOptions | None = None  # of a convolution
    padded: tuple[int, ...] = ()  # spatial size of the input that it saw


@dataclass
class ShiftTarget:
    """A parameter, or a part of one, and where its shift is due."""

    name: str
    key: MemoryKey
    uses: list[ScheduledUse]
    summed: bool  # the shift will know the sum of the gradients
    shift: WeightShift | None = None
    flip: bool = False  # the parameter is [I, O]
    done: int = 0

    def due(self) -> ScheduledUse | None:
        """The use that comes next."""
        return self.uses[self.done] if self.done < len(self.uses) else None


def key_of(t: Tensor) -> MemoryKey:
    """Equal for two views of the same elements of the same memory, transposed or not."""
    ends = sorted((size, stride) for size, stride in zip(t.shape, t.stride()) if size != 1)
    return t.untyped_storage().data_ptr(), t.storage_offset(), *ends


def target_of(plan: Plan, group: UseGroup) -> ShiftTarget:
    """Describe a group of uses before its gradients are there."""
    view = group.chain.view(plan.params[group.chain.param].detach())
    uses, summed, positions = [], True, 0
    for use in group.uses:
        site = plan.sites[use.site]
        node: Any = site.node
        z, makes = site.recipe.shape, site.recipe.makes[use.slot]
        options: ConvolutionOptions | None = None
        padded: tuple[int, ...] = ()
        if makes is ConvForm:
            dims = len(z) - 2
            stride, padding, dilation, output_padding = (
                per_dimension(getattr(node, f"_saved_{k}"), dims)
                for k in ("stride", "padding", "dilation", "output_padding")
            )
            options = stride, padding, dilation, node._saved_transposed, output_padding, node._saved_groups
            x = node._saved_input.shape
            padded, summed = tuple(x[2:]), fits_convolution(view.numel(), (math.prod(z) + math.prod(x)) // plan.samples)
        elif makes is DenseForm:
            positions += z[0] // plan.samples
            summed = fits_matrix(positions, *view.shape)
        elif makes is not SumForm:
            summed = False
        uses.append(ScheduledUse(node._sequence_nr(), node.name(), plan.layouts[use.site], z, options, padded))
    uses.sort(key=lambda use: use.order)
    return ShiftTarget(group.chain.param, key_of(view), uses, summed)


def flipped(plan: Plan, group: UseGroup) -> bool:
    """Whether the matrix of a product is used as [I, O], behind the data: what its graph sees of x W^T is W^T."""
    use = group.uses[0]
    return (plan.sites[use.site].node.name(), use.slot) in (("AddmmBackward0", 2), ("MmBackward0", 1))


class ShiftedForward(TorchFunctionMode):
    """Run what is inside with W + h G_n for sample n, wherever `targets` say so."""

    def __init__(self, targets: Sequence[ShiftTarget], h: float, samples: int, exact: bool) -> None:
        super().__init__()
        self.targets, self.h, self.samples, self.exact = targets, h, samples, exact
        self.at: dict[MemoryKey, ShiftTarget] = {}
        for target in targets:
            target.done = 0
            if target.shift is not None:
                self.at[target.key] = target
        self.memory = {key[0] for key in self.at}
        self.casts: dict[int, tuple[Tensor, ShiftTarget]] = {}  # copies of parameters in another dtype

    def missed(self) -> list[str]:
        """Names of the parameters some of whose uses were not met."""
        return sorted({target.name for target in self.targets if target.shift is not None and target.due() is not None})

    def target(self, value: Any) -> ShiftTarget | None:
        """The target that an argument stands for."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if id(value) in self.casts:
            return self.casts[id(value)][1]
        if value.layout != torch.strided or value.untyped_storage().data_ptr() not in self.memory:
            return None
        return self.at.get(key_of(value))

    def take(self, value: Any, *operations: str) -> tuple[WeightShift, ScheduledUse] | None:
        """The shift of an argument, if it is due in one of these operations now."""
        target = self.target(value)
        use = None if target is None else target.due()
        if target is None or use is None or target.shift is None or use.operation not in operations:
            return None
        target.done += 1
        return target.shift, use

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a call, or let it be."""
        kwargs = kwargs or {}
        if isinstance(func, types.FunctionType):
            if func.__module__ != F.__name__:
                return func(*args, **kwargs)
            with self:  # a function of functions: what it calls is looked at in its turn
                return _opened(func)(*args, **kwargs)
        handler = HANDLERS.get(getattr(func, "__name__", ""))
        if handler is not None:
            out = handler(self, func, args, kwargs)
            if out is not None:
                return out
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _CASTS and isinstance(out, Tensor) and out is not args[0]:
            target = self.target(args[0])
            if target is not None and out.shape == args[0].shape:
                self.casts[id(out)] = out, target
        return out

    def values(self, value: Any, operations: Sequence[str], after: int = 0) -> Tensor | None:
        """An argument plus its shift, with a sample axis where the operation's output has it; None: no shift is due."""
        got = self.take(value, *operations)
        if got is None:
            return None
        shift, use = got
        assert isinstance(shift, ValueShift)
        return value.reshape(*value.shape, *(1,) * after) + self.spread(shift, use, value.shape, after).to(value.dtype)

    def spread(self, shift: ValueShift, use: ScheduledUse, shape: torch.Size, after: int) -> Tensor:
        """Return h G_n, to be broadcast against the operation's output."""
        each = shift.each
        if each.shape[1:] != shape and [s for s in each.shape[1:] if s != 1] != [s for s in shape if s != 1]:
            each = each.mT
        full = (1,) * (len(use.shape) - len(shape) - after) + tuple(shape) + (1,) * after
        each = (self.h * each).reshape(self.samples, *full)
        k = use.shape[use.layout.dim] // self.samples
        d = use.layout.dim
        each = each.movedim(0, d)  # [..., N, 1, ...]
        if k == 1:
            return each.flatten(d, d + 1)
        size = list(each.shape)
        size[d + 1] = k
        each = each.expand(size)
        return (each if use.layout.major else each.transpose(d, d + 1)).flatten(d, d + 1)


_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as"})
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def _opened(func: types.FunctionType) -> types.FunctionType:
    """A function of torch.nn.functional that does not ask for overrides: its own calls do."""
    scope = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    twin = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


# --------------------------------------------------------------------------------------------------- the operations

Handler = Callable[[ShiftedForward, Any, tuple[Any, ...], dict[str, Any]], "Tensor | None"]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for functions of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


_PRODUCTS = ("AddmmBackward0", "MmBackward0")


def _product(mode: ShiftedForward, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x W^T + b of x [*, I], W [O, I]; None if nothing is due."""
    due, added = mode.take(weight, *_PRODUCTS), mode.take(bias, *_PRODUCTS, "AddBackward0")
    if due is None:
        if added is None or bias is None:
            return None
        assert isinstance(added[0], ValueShift)
        z, (shift, use) = F.linear(x, weight, bias), added
        moved = mode.spread(added[0], use, bias.shape, 0).to(z.dtype)
        return (z.reshape(use.shape) + moved).view(z.shape)
    shift, use = due
    flat, major = x.reshape(-1, x.shape[-1]), use.layout.major
    each = Layout(0, major).split(flat, mode.samples)  # [N, T, I]
    z = linear(each, weight, shift, mode.h, mode.exact and x.dtype == weight.dtype)
    if bias is not None:
        z = z + bias.to(z.dtype)
    if added is not None:
        assert isinstance(added[0], ValueShift)
        z = z + (mode.h * added[0].each)[:, None].to(z.dtype)
    z = z.flatten(0, 1) if major else z.transpose(0, 1).flatten(0, 1)
    return z.view(*x.shape[:-1], -1)


@handles("linear")
def _linear(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _product(mode, *_arguments(args, kwargs, "input", "weight", "bias"))


@handles("matmul", "__matmul__", "mm")
def _matmul(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    if len(args) < 2:
        return None
    x, weight = args[:2]
    if not isinstance(weight, Tensor) or weight.dim() != 2 or mode.target(weight) is None:
        return None
    return _product(mode, x, weight.t(), None)


@handles("addmm")
def _addmm(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    if kwargs or len(args) != 3 or (args[0].dim() > 1 and args[0].shape[0] != 1):
        return None
    return _product(mode, args[1], args[2].t(), args[0].reshape(-1) if args[0].dim() > 1 else args[0])


_CONVOLUTIONS = ("ConvolutionBackward0", "ConvolutionOverrideableBackward0")


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    x, weight, bias = _arguments(args, kwargs, "input", "weight", "bias")
    due = mode.take(weight, *_CONVOLUTIONS)
    moved = None if bias is None else mode.values(bias, _CONVOLUTIONS, after=x.dim() - 2)
    if due is None:
        if moved is None:
            return None
        args, kwargs = tuple(None if a is bias else a for a in args), {k: v for k, v in kwargs.items() if k != "bias"}
        return func(*args, **kwargs) + moved
    shift, use = due
    assert use.options is not None
    missing = [p - s for p, s in zip(use.padded, x.shape[2:])]
    if any(missing):  # padding="same" of an even kernel: torch adds the odd row itself, at the end
        x = F.pad(x, [n for m in reversed(missing) for n in (0, m)])
    layout = use.layout
    if not layout.major and x.shape[0] != mode.samples:
        x = layout.split(x, mode.samples).flatten(0, 1)
    z = convolution(x, weight, shift, mode.h, use.options, mode.exact)
    if not layout.major and x.shape[0] != mode.samples:
        z = z.unflatten(0, (mode.samples, -1)).transpose(0, 1).flatten(0, 1)
    if moved is not None:
        return z + moved.to(z.dtype)
    return z if bias is None else z + bias.to(z.dtype).view(-1, *(1,) * (z.dim() - 2))


def _affine(
    mode: ShiftedForward, func: Any, args: Any, kwargs: Any, names: tuple[str, ...], nodes: tuple[str, ...], after: int
) -> Tensor | None:
    """A norm: without its affine map, which follows with the shift."""
    known = dict(zip(names, args)) | kwargs
    weight, bias = known.get("weight"), known.get("bias")
    moved = [None if p is None else mode.values(p, nodes, after) for p in (weight, bias)]
    if moved == [None, None]:
        return None
    plain = [
        p if m is not None or p is None else p.view(*p.shape, *(1,) * after) for p, m in zip((weight, bias), moved)
    ]
    w, b = (p if m is None else m for p, m in zip(plain, moved))
    z = func(*(None if name in ("weight", "bias") else value for name, value in zip(names, args)),
             **{k: v for k, v in kwargs.items() if k not in ("weight", "bias")})  # fmt: skip
    z = z if w is None else z * w
    return z if b is None else z + b


@handles("layer_norm")
def _layer_norm(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    return _affine(mode, func, args, kwargs, names, ("NativeLayerNormBackward0",), 0)


@handles("rms_norm")
def _rms_norm(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    names = ("input", "normalized_shape", "weight", "eps")
    return _affine(mode, func, args, kwargs, names, ("FusedRmsNormBackward0", "MulBackward0"), 0)


@handles("group_norm")
def _group_norm(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    names = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
    return _affine(mode, func, args, kwargs, names, ("NativeGroupNormBackward0",), args[0].dim() - 2)


_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")


@handles("batch_norm", "instance_norm")
def _batch_norm(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    return _affine(mode, func, args, kwargs, names, _BATCH_NORMS, args[0].dim() - 2)


@handles("embedding", "__getitem__", "index_select")
def _embedding(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    due = mode.take(args[0], "EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0")
    if due is None:
        return None
    shift, use = due
    assert isinstance(shift, RowShift)
    z = func(*args, **kwargs)
    index = args[2] if use.operation == "IndexSelectBackward0" else args[1]
    index = index[0] if isinstance(index, tuple) else index
    split = use.layout.split(z, mode.samples)
    each = mode.h * shift.at(use.layout.split(index, mode.samples).reshape(mode.samples, -1))
    return z + _merged(each.reshape(split.shape).to(z.dtype), use.layout)


def _merged(each: Tensor, layout: Layout) -> Tensor:
    """The inverse of Layout.split."""
    d = layout.dim
    each = each.movedim(0, d) if layout.major else each.movedim(0, d + 1)
    return each.flatten(d, d + 1)


@handles("expand", "expand_as")
def _expand(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    due = mode.take(args[0], "ExpandBackward0")
    if due is None:
        return None
    shift, use = due
    assert isinstance(shift, ValueShift)
    return func(*args, **kwargs) + mode.spread(shift, use, args[0].shape, 0).to(args[0].dtype)


_ELEMENTWISE = {
    "AddBackward0": ("add", "__add__", "__radd__", "add_", "__iadd__"),
    "SubBackward0": ("sub", "__sub__", "__rsub__", "rsub", "sub_", "__isub__", "subtract"),
    "MulBackward0": ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"),
    "DivBackward0": ("div", "__truediv__", "__rtruediv__", "true_divide", "div_", "__itruediv__", "divide"),
}


def _pointwise(node: str) -> Handler:
    def handler(mode: ShiftedForward, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        moved = [mode.values(a, (node,)) for a in args[:2]]
        if all(m is None for m in moved):
            return None
        return func(*(a if m is None else m for a, m in zip(args, moved)), *args[2:], **kwargs)

    return handler


for _node, _names in _ELEMENTWISE.items():
    handles(*_names)(_pointwise(_node))
