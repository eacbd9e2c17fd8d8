"""Where a model holds a weight, and what its layers computed with W(delta) there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastfip.errors import ModelError
from fastfip.ops.convolution import ConvShape

__all__ = ["ForwardRecord", "LayerUse", "Recorder", "WeightSite"]


_MAKER = "_makes_"
_GUARD = "_no_copy_while_shifted"


class _NoCopy:
    """Lies in a module while W(delta) does: a copy would go on computing with the original's weights."""

    def __reduce__(self) -> Any:
        raise ModelError("a model cannot be copied while its weights are shifted: remove() or fold() first")


@dataclass
class WeightSite:
    """A module and the name of its parameter; the parameters' order is kept, so that the state dict's is."""

    module: nn.Module
    attribute: str
    replaced: bool = False
    order: list[str] | None = None
    own: type[nn.Module] | None = None

    def put(self, value: Tensor) -> None:
        """Let the module compute with a tensor that is no parameter."""
        # A parameter cannot be a computed tensor, so its place in the module is taken by a plain attribute meanwhile.
        self._take_parameter()
        self.module.__dict__[self.attribute] = value
        self._flat(value)

    def _flat(self, value: Tensor) -> None:
        """Recurrent layers compute with a list of their weights, not with the attributes."""
        if isinstance(self.module, nn.RNNBase):
            flat: Any = self.module._flat_weights
            flat[self.module._flat_weights_names.index(self.attribute)] = value

    def put_made(self, make: Callable[[], Tensor]) -> None:
        """Let the module find a tensor that is made when it is read: who never reads it needs no memory for it."""
        self._take_parameter()
        if self.own is None:
            self.own = type(self.module)
            self.module.__class__ = _made_on_reading(self.own, self.attribute)
        self.module.__dict__[_MAKER + self.attribute] = make

    def _take_parameter(self) -> None:
        self.module.__dict__[_GUARD] = _NoCopy()
        if self.attribute in self.module._parameters:
            self.order = list(self.module._parameters) if self.order is None else self.order
            del self.module._parameters[self.attribute]

    def restore(self, weight: nn.Parameter) -> None:
        """Give the module its parameter and its forward back, if they were taken."""
        if self.order is None:
            return
        if self.own is not None:
            self.module.__class__ = self.own
            self.own = None
        self.module.__dict__.pop(_GUARD, None)
        self.module.__dict__.pop(_MAKER + self.attribute, None)
        self.module.__dict__.pop(self.attribute, None)
        if self.replaced:
            del self.module.__dict__["forward"]
            self.replaced = False
        rest = {**self.module._parameters, self.attribute: weight}
        order = [*(name for name in self.order if name in rest), *(name for name in rest if name not in self.order)]
        self.module._parameters.clear()
        self.module._parameters.update({name: rest[name] for name in order})
        self._flat(weight)


_MADE: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _made_on_reading(cls: type[nn.Module], attribute: str) -> type[nn.Module]:
    """Return the class with a property in an attribute's place."""
    if (cls, attribute) not in _MADE:

        def made(module: nn.Module) -> Any:
            return module.__dict__[_MAKER + attribute]()

        names = {attribute: property(made), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        meta: Any = type(cls)
        _MADE[cls, attribute] = meta(cls.__name__, (cls,), names)
    return _MADE[cls, attribute]


class LayerUse(NamedTuple):
    """One computation of a shifted layer.

    `known` is p = x V, or for a transposed convolution q = x U; `output` is where its other side's gradient is had.
    """

    module: nn.Module
    known: Tensor
    output: Tensor
    shape: ConvShape | None


@dataclass
class ForwardRecord:
    """What the forward pass left, by the number of the shift."""

    uses: dict[int, list[LayerUse]] = field(default_factory=dict)


@dataclass
class Recorder:
    """Holds the record that is being taken, if one is."""

    current: ForwardRecord | None = None
