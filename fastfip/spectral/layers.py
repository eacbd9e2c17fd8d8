"""How a layer computes with W(delta).

A Linear or convolution that computes by its class's own forward gets one that goes through `fastfip.ops.spectral`;
hooks on it go on working. Everything else (a weight that another module reads, attention with a packed projection, a
forward of the user's own, layers so narrow that the gradient of the whole weight costs less) finds W(delta) itself in
the weight's place, as a leaf, and is torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastfip.ops.convolution import ConvShape
from fastfip.ops.spectral.apply import spectral_layer
from fastfip.ops.spectral.op import prefers_dense, spectral_conv, spectral_linear
from fastfip.spectral.relu import keep_signs
from fastfip.spectral.site import LayerUse, Recorder, WeightSite
from fastfip.spectral.weight import SpectralShift

__all__ = ["replaced_forward"]

_OWN = {
    cls.forward
    for cls in (
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}


def replaced_forward(number: int, shift: SpectralShift, site: WeightSite, recorder: Recorder) -> bool:
    """Let a layer compute through the spectral ops, if its forward is its class's own; `number` is for the record.

    Returns:
        whether it does.
    """
    module = site.module
    if site.replaced:
        return True
    if site.attribute != "weight" or type(module).forward not in _OWN:
        return False
    if "forward" in module.__dict__ or module._parameters.get("weight") is None:
        return False  # somebody else replaced it already
    compute: Any
    if isinstance(module, _ConvTransposeNd):
        compute = _transposed
    elif isinstance(module, _ConvNd):
        compute = _conv
    else:
        compute = _linear

    # More output padding than stride is legal below the dilation, and no adjoint of a convolution that torch computes.
    torchs_own = isinstance(module, _ConvTransposeNd) and any(
        more >= stride for more, stride in zip(module.output_padding, module.stride)
    )

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and compute is not _transposed and recorder.current is None:
            y = _compiled(module, shift, x, *args, **kwargs)
            if y is not None:
                return y
        without = not torch.is_grad_enabled() and not shift.saves_memory
        if torch.compiler.is_compiling() or without or not x.numel() or torchs_own:
            return type(module).forward(module, x, *args, **kwargs)
        dtype = _product_dtype(x, shift.weight)
        if recorder.current is None and not shift.saves_memory and _dense(module, shift, x, dtype):
            return type(module).forward(module, x, *args, **kwargs)
        own = module._parameters.get("bias")
        bias = None if own is None else own.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if recorder.current is None:
                keep_signs(x)
                return compute(module, shift, x.to(dtype), bias, *args, **kwargs)[0]
            # The bias is added where the autograd graph shows it: its per-sample gradients are read from there.
            y, known, shape = compute(module, shift, x.to(dtype), None, *args, **kwargs)
            recorder.current.uses.setdefault(number, []).append(LayerUse(module, known, y, shape))
            if bias is None:
                return y
            return y + (bias if shape is None else bias.reshape(-1, *[1] * len(shape.kernel)))

    module.__dict__["forward"] = forward
    site.replaced = True
    return True


def _compiled(module: Any, shift: SpectralShift, x: Tensor) -> Tensor | None:
    """Compute as one operator of a compiler's graph; None: the caller uses torch's own layer with W(delta).

    A compiler would trace the autograd of `spectral_linear` by rules of its own. W(delta) is put together in its graph,
    which keeps it for the backward pass.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.dtype != shift.weight.dtype:
        return None
    # Under a transform of torch.func a compiler leaves an operator's rule for it out.
    if not x.numel() or torch._C._are_functorch_transforms_active():
        return None
    taps = math.prod(module.kernel_size) if isinstance(module, _ConvNd) else None
    if prefers_dense(shift.u, shift.v, taps, _positions(module, x)):
        return None
    weight, bias = shift.recompose().detach(), module._parameters.get("bias")
    bias = None if bias is None else bias.to(x.dtype)
    operands = weight, shift.u, shift.v, shift.sigma, shift.delta, bias
    if taps is None:
        return spectral_layer(x, *operands, None)
    padded, shape = _windowed(module, x)
    y = spectral_layer(padded, *operands, shape)
    return y if x.dim() == padded.dim() else y[0]


def _dense(module: Any, shift: SpectralShift, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's own layer with the gradient of the whole weight is the cheaper one."""
    if isinstance(module, _ConvTransposeNd):
        return False
    taps = math.prod(module.kernel_size) if isinstance(module, _ConvNd) else None
    positions = _positions(module, x)
    # Weak directions are looked for last: they only make the op slower.
    return prefers_dense(shift.u, shift.v, taps, positions) or prefers_dense(
        shift.u, shift.v, taps, positions, shift.directions(dtype, positions)[1].weak
    )


def _positions(module: Any, x: Tensor) -> int:
    """N T of the layer's output, or of a transposed convolution's input; borders do not matter."""
    if not isinstance(module, _ConvNd):
        return x.numel() // max(1, x.shape[-1])
    stride = 1 if isinstance(module, _ConvTransposeNd) else math.prod(module.stride)
    return x.numel() // max(1, x.shape[-len(module.kernel_size) - 1] * stride)


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(kind)
    if x.dtype != weight.dtype:
        raise TypeError(f"the input is {x.dtype} and the weight {weight.dtype}: cast one of them, or use autocast")
    return x.dtype


Computed = tuple[Tensor, Tensor, ConvShape | None]


def _linear(module: nn.Linear, shift: SpectralShift, x: Tensor, bias: Tensor | None) -> Computed:
    weight, factors, scratch = shift.directions(x.dtype, _positions(module, x))
    return *spectral_linear(x, weight, factors, shift.delta, bias, scratch=scratch, wanted=shift.wanted), None


def _conv(module: Any, shift: SpectralShift, x: Tensor, bias: Tensor | None) -> Computed:
    padded, shape = _windowed(module, x)
    weight, factors, scratch = shift.directions(x.dtype, _positions(module, x))
    options: dict[str, Any] = {"scratch": scratch, "wanted": shift.wanted}
    y, p = spectral_conv(padded, weight, factors, shift.delta, shape, bias, **options)
    return (y if x.dim() == padded.dim() else y[0]), p, shape


def _windowed(module: Any, x: Tensor) -> tuple[Tensor, ConvShape]:
    """Return a convolution's input with a batch axis, padded as far as zeros on both sides do not, and its shape."""
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice  # pairs, the last dimension first; right for "same" as well
    if module.padding_mode != "zeros":
        x, pads = F.pad(x, padding, mode=module.padding_mode), (0,) * dims
    elif isinstance(module.padding, str):
        pads = tuple(reversed(padding[::2]))
        if any(a != b for a, b in zip(padding[::2], padding[1::2])):
            x, pads = F.pad(x, padding), (0,) * dims
    else:
        pads = tuple(module.padding)
    return x, ConvShape(module.kernel_size, module.stride, pads, module.dilation, module.groups)


def _transposed(
    module: Any,
    shift: SpectralShift,
    x: Tensor,
    bias: Tensor | None,
    output_size: list[int] | None = None,
) -> Computed:
    dims = len(module.kernel_size)
    batched = x.dim() == dims + 2
    x = x if batched else x.unsqueeze(0)
    if module.padding_mode != "zeros":
        raise ValueError("a transposed convolution has padding_mode 'zeros' only")
    more = module._output_padding(
        x, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + m + 1
        for n, s, p, d, k, m in zip(
            x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size, more
        )
    ]
    shape = ConvShape(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
    weight, factors, scratch = shift.directions(x.dtype, _positions(module, x))
    full = (x.shape[0], module.out_channels, *size)
    options: dict[str, Any] = {"transposed_to": full, "scratch": scratch, "wanted": shift.wanted}
    y, q = spectral_conv(x, weight, factors, shift.delta, shape, bias, **options)
    return (y if batched else y[0]), q, shape
