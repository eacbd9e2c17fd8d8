"""The net that is tuned, and the way back to how the user gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastfip.errors import ModelError
from fastfip.nets.checks import check_net
from fastfip.nets.state import LOW_PRECISION, cast, copied, to_float32

__all__ = ["WorkCopy"]


class WorkCopy:
    """A copy of the user's net (or, in place, the net itself) and a record of how it was.

    Recorded are training flags, requires_grad, gradients, devices, dtypes, which weights are tied and the order of
    the state dict. `finish` brings them back around the new values; `undo` brings the old values back as well.

    Raises:
        ModelError: no module, no weights, weights without data, or a net that cannot be copied.
    """

    def __init__(self, model: nn.Module, inplace: bool) -> None:
        _check(model)
        self.inplace = inplace
        if inplace:
            if any(p.is_inference() for p in model.parameters()):
                raise ModelError("the weights were made in inference_mode and cannot be changed: use inplace=False")
            self.model = model
        else:
            self.model = copied(model, "pass inplace=True to tune it itself")
        self.flags = {name: module.training for name, module in self.model.named_modules()}
        self.modules = {name: type(module) for name, module in self.model.named_modules()}
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.grads = {name: p.grad for name, p in self.parameters.items()}
        self.homes = {name: (t.device, t.dtype) for name, t in self._tensors()}
        self.contiguous = {name: p.is_contiguous() for name, p in self.parameters.items()}
        self.order = {name: (list(m._parameters), list(m._buffers)) for name, m in self.model.named_modules()}
        self.keys = {name: _form(value) for name, value in self.model.state_dict().items()}
        # In place: where the values are. Layout, device and dtype may change meanwhile, but an optimiser or a view of
        # the user's must find the values there again.
        self.memory = {name: t.detach() for name, t in self._tensors()} if inplace else {}
        self.saved = {name: t.detach().clone() for name, t in self._tensors()} if inplace else {}
        for p in self.parameters.values():
            p.grad = None

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.parameters.items(), *self.buffers.items()]

    @property
    def device(self) -> torch.device:
        """Return the device of the first parameter (buffers, if there are none)."""
        return next(iter(self.homes.values()))[0]

    @property
    def is_low_precision(self) -> bool:
        """Return whether some weights are float16 or bfloat16."""
        return any(dtype in LOW_PRECISION for _, dtype in self.homes.values())

    def to(self, device: torch.device) -> None:
        """Move the net; one that is spread over several devices stays as it is."""
        if len({d for d, _ in self.homes.values()}) == 1 and self.device != device:
            self.model.to(device)
        if device.type == "cpu" and any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            # Convolutions on CPUs are a third faster in this layout; the values are the same.
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it, its stubs do not

    def to_float32(self) -> None:
        """Tune float16 and bfloat16 weights in float32: their own steps would round small changes away."""
        to_float32(self.model)

    def to_own_dtype(self) -> None:
        """Bring every tensor back to its dtype."""
        if not self.is_low_precision:
            return
        cast(self.model, {name: dtype for name, (_, dtype) in self.homes.items()})

    def finish(self, who: str) -> nn.Module:
        """Return the net with everything but the values as it was.

        Raises:
            ModelError: the method `who` left something behind (a fault of the method, not of the user).
        """
        self.to_own_dtype()
        self._reorder()
        now = {name: _form(value) for name, value in self.model.state_dict().items()}
        types = {name: type(module) for name, module in self.model.named_modules()}
        buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        if list(now.items()) != list(self.keys.items()) or types != self.modules or buffers != set(self.buffers):
            odd = [k for k in {**now, **self.keys} if now.get(k) != self.keys.get(k)] or [*({*types} ^ {*self.modules})]
            raise ModelError(f"the method {who} did not take back what it did to the model: {odd[:3]}")
        self._flags_and_homes()
        return self.model

    def undo(self) -> None:
        """In place: bring everything back as it was, values too. A copy is simply dropped."""
        if not self.inplace:
            return
        self.to_own_dtype()
        self._reorder()
        with torch.no_grad():
            for name, t in [
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            ]:
                if name in self.saved:
                    t.copy_(self.saved[name])
        self._flags_and_homes()

    def _flags_and_homes(self) -> None:
        devices = {name: device for name, (device, _) in self.homes.items()}
        if len(set(devices.values())) == 1:
            self.model.to(self.device)
        for name, module in self.model.named_modules():
            module.training = self.flags.get(name, module.training)
        for name, p in self.model.named_parameters(remove_duplicate=False):
            p.requires_grad_(self.requires_grad.get(name, p.requires_grad))
            if self.contiguous.get(name):
                p.data = p.data.contiguous()
            p.grad = self.grads.get(name)
        self._to_own_memory()

    @torch.no_grad()
    def _to_own_memory(self) -> None:
        for name, t in [*self.model.named_parameters(remove_duplicate=False),
                        *self.model.named_buffers(remove_duplicate=False)]:  # fmt: skip
            own = self.memory.get(name)
            if own is not None and own.shape == t.shape and own.data_ptr() != t.data_ptr():
                t.data = own.copy_(t)

    def _reorder(self) -> None:
        """A parametrisation that is taken off puts its weight last: the state dict keeps the user's order."""
        for name, module in self.model.named_modules():
            for wanted, mapping in zip(self.order.get(name, ([], [])), (module._parameters, module._buffers)):
                if list(mapping) != wanted and sorted(mapping) == sorted(wanted):
                    items: dict[str, Any] = {key: mapping[key] for key in wanted}
                    mapping.clear()
                    mapping.update(items)


def _check(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is TorchScript, whose weights cannot be exchanged: give the nn.Module it came from")
    check_net(model)
    if not any(p.is_floating_point() for p in model.parameters()):
        raise ModelError("the model has no floating-point parameters to tune (quantised, or scripted without weights)")


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
