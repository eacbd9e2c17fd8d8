"""Weights multiplied by masks: w' = w * m, and only m is tuned.

The gradient with respect to a mask is that of w' times w, summed over what the mask is broadcast along. So neither pass
of the net is changed, no graph holds the product, and weights without a mask get no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["Mask", "Masks", "Shape", "batchnorm_weights", "output_rows", "per_element", "weights_of"]

Shape = Callable[[nn.Module, Tensor], tuple[int, ...]]


@dataclass
class Mask:
    """One tensor of the model and its mask.

    Attributes:
        name: of the tensor's first place, e.g. "layer1.0.bn1.weight".
        weight: the parameter itself, which holds the product.
        received: its values at the start, w.
        value: the mask m, ones at the start, of a shape that broadcasts to w's; float32, or float64 with it.
    """

    name: str
    weight: nn.Parameter
    received: Tensor
    value: Tensor


class Masks:
    """Masks of some of a model's tensors.

    The parameters themselves hold w * m, as of the last `write`, so the model computes, scores and saves as masked.
    """

    def __init__(self, masks: list[Mask]) -> None:
        self.masks = masks

    @classmethod
    def of(cls, places: list[tuple[str, nn.Module, str]], shape: Shape) -> Masks:
        """Make masks of ones.

        Args:
            places: (name, module, attribute) of each; a tied weight gets one mask.
            shape: `shape(module, weight)` of the mask, of its first place.
        """
        masks: dict[int, Mask] = {}
        for name, module, attribute in places:
            weight = module._parameters[attribute]
            assert weight is not None
            if id(weight) in masks:
                continue
            received = weight.detach().clone()
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            size = shape(module, weight)
            # ones_like keeps the weight's memory layout, so that products need no change of it.
            value = torch.ones_like(received, dtype=dtype) if size == tuple(weight.shape) else None
            if value is None:
                value = torch.ones(size, dtype=dtype, device=weight.device)
            masks[id(weight)] = Mask(name, weight, received, value.requires_grad_(True))
        return cls(list(masks.values()))

    def __len__(self) -> int:
        """Return how many tensors are masked."""
        return len(self.masks)

    @property
    def values(self) -> list[Tensor]:
        """The masks, as an optimiser takes them."""
        return [mask.value for mask in self.masks]

    @torch.no_grad()
    def write(self) -> None:
        """Write w * m of the present masks into the parameters; masks of one leave every bit of w."""
        products = torch._foreach_mul([m.received for m in self.masks], [m.value.detach() for m in self.masks])
        torch._foreach_copy_([m.weight.detach() for m in self.masks], products)

    @contextlib.contextmanager
    def tuning(self) -> Iterator[None]:
        """Add what back-propagates in a block to the gradients of the masks; the masks are written before it."""
        self.write()
        flags = [mask.weight.requires_grad for mask in self.masks]
        try:
            for mask in self.masks:
                mask.weight.requires_grad_(True)
                mask.weight.grad = None
            yield
            self._collect()
        finally:
            for mask, flag in zip(self.masks, flags):
                mask.weight.grad = None
                mask.weight.requires_grad_(flag)

    @torch.no_grad()
    def _collect(self) -> None:
        used = [mask for mask in self.masks if mask.weight.grad is not None]
        if not used:
            return
        gradients = [m.weight.grad.to(m.value.dtype) for m in used if m.weight.grad is not None]
        pulled = torch._foreach_mul(gradients, [m.received.to(m.value.dtype) for m in used])
        for mask, gradient in zip(used, pulled):
            gradient = gradient.sum_to_size(mask.value.shape)
            mask.value.grad = gradient if mask.value.grad is None else mask.value.grad + gradient

    @torch.no_grad()
    def clamp_(self, low: list[float] | float, high: float = 1.0) -> None:
        """Clamp every mask to [low, high], `low` one number or one for each mask; written by the next `write`."""
        values = [v.detach() for v in self.values]
        torch._foreach_clamp_min_(values, low)
        torch._foreach_clamp_max_(values, high)


def per_element(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """Shape of a mask with an entry for every element of the weight."""
    return tuple(weight.shape)


def output_rows(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """Shape of a mask with an entry for every output channel (of a vector: for every element)."""
    if isinstance(module, _ConvTransposeNd) and module.groups == 1:  # its weight is stored input first
        return (1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (weight.shape[0], *[1] * (weight.dim() - 1))


def batchnorm_weights(model: nn.Module, frozen: Container[int] = ()) -> list[tuple[str, nn.Module, str]]:
    """Return the places of BatchNorm's gamma, in module order, without those whose id is in `frozen`."""
    return weights_of(model, _BatchNorm, frozen)


def weights_of(
    model: nn.Module,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd),
    frozen: Container[int] = (),
) -> list[tuple[str, nn.Module, str]]:
    """Return the places of the weights of some kinds of layers, in module order; not the computed and the frozen."""
    places = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, kind) else None
        if weight is not None and weight.is_floating_point() and weight.numel() and id(weight) not in frozen:
            places.append((f"{name}.weight" if name else "weight", module, "weight"))
    return places
