"""The net that is tuned, and the way back to how the user gave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastfip.errors import ModelError
from fastfip.methods.run import Run
from fastfip.nets.checks import check_net
from fastfip.nets.state import (
    LOW_PRECISION,
    cast,
    copied,
    empty_caches,
    lendable,
    refuse_sharded,
    to_float32,
    unwrapped,
)

if TYPE_CHECKING:
    from fastfip.nets.shards import Shards

__all__ = ["WorkCopy", "check_tunable", "in_full_precision"]


class WorkCopy:
    """A copy of the user's net (or, in place, the net itself) and a record of how it was.

    What is tuned is the module inside wrappers (DataParallel, torch.compile); `finish` hands the wrapper back.

    Recorded are training flags, requires_grad, gradients, devices, dtypes, which weights are tied and the order of
    the state dict. `finish` brings them back around the new values; `undo` brings the old values back as well.

    With `lend` the method leaves weight matrices as they are until it gives them new memory at its end: those of
    torch's own layers are not copied then, nor, in place, kept a second time.

    Attributes:
        shards: the parts of the net, where it is worked on in them; None: it is whole.

    Raises:
        ModelError: no module, no weights, weights without data, or a net that cannot be copied.
    """

    shards: Shards | None = None

    def __init__(self, model: nn.Module, inplace: bool, lend: bool = False) -> None:
        check_tunable(model)
        refuse_sharded(model)
        lent = lendable(model) if lend else {}
        self.inplace, self.given = inplace, unwrapped(model)
        if inplace:
            if any(p.is_inference() for p in model.parameters()):
                raise ModelError("the weights were made in inference_mode and cannot be changed: use inplace=False")
            self.whole = model
        else:
            self.whole = copied(model, "pass inplace=True to tune it itself", lent)
        self.model = unwrapped(self.whole)
        self.twin_of: nn.Module | None = None
        if inplace and isinstance(model, nn.parallel.DistributedDataParallel):
            # Hooks on its parameters average gradients, of backward passes that it did not see begin.
            self.twin_of = self.model
            self.model = copied(self.model, "take the module inside DistributedDataParallel")
            lent = {}
        self._record({id(p) for p in lent} if inplace else set())

    def _record(self, lent: set[int]) -> None:
        """Note how `model` is; in place its values are kept, of those with the ids `lent` without a copy."""
        self.flags = {name: module.training for name, module in self.model.named_modules()}
        self.modules = {name: type(module) for name, module in self.model.named_modules()}
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.grads = {name: p.grad for name, p in self.parameters.items()}
        self.homes = {name: (t.device, t.dtype) for name, t in self._tensors()}
        self.contiguous = {name: t.stride() for name, t in self._tensors() if t.is_contiguous()}
        self.order = {name: (list(m._parameters), list(m._buffers)) for name, m in self.model.named_modules()}
        self.keys = {name: _form(value) for name, value in self.model.state_dict().items()}
        # In place: where the values are. Layout, device and dtype may change meanwhile, but an optimiser or a view of
        # the user's must find the values there again.
        self.memory = {name: t.detach() for name, t in self._tensors()} if self.inplace else {}
        kept = self._tensors() if self.inplace else []
        self.saved = {n: t.detach() if id(t) in lent else t.detach().clone() for n, t in kept}
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

    def frozen(self, keep: bool) -> frozenset[int]:
        """Return the ids of the parameters that stay: if `keep`, those that the user froze, unless all are frozen.

        Raises:
            ModelError: a model with an adapter, of which more than the adapter would be tuned: saving would lose that.
        """
        floats = {name for name, p in self.parameters.items() if p.is_floating_point()}
        still = {name for name in floats if not self.requires_grad[name]}
        if getattr(self.given, "peft_config", None) and still and (still == floats or not keep):
            raise ModelError(
                "save_pretrained keeps the adapter of this PEFT model and not what is frozen: load it with "
                "is_trainable=True so that the adapter is tuned, or merge it first, model = model.merge_and_unload()"
            )
        return frozenset(id(self.parameters[name]) for name in still) if keep and still != floats else frozenset()

    @property
    def received(self) -> dict[str, Tensor]:
        """Return the values that were received, which nobody may write to, until `finish`."""
        if self.inplace:
            return self.saved
        named = [*self.given.named_parameters(), *self.given.named_buffers()]
        return {name: t.detach() for name, t in named}

    @torch.no_grad()
    def moved(self) -> set[str]:
        """Return the names of parameters and buffers whose values are not those that were received.

        Before `finish`, which in place writes over these.
        """
        old = self.received
        new = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name for name, t in new if name in old and not torch.equal(t, old[name].to(t.device))}

    def to(self, device: torch.device) -> None:
        """Move the net; one that is spread over several devices stays as it is."""
        if len({d for d, _ in self.homes.values()}) == 1 and self.device != device:
            self.model.to(device)

    def channels_last(self, works: Callable[[], bool]) -> None:
        """Put a convolutional net on a CPU in the layout in which it is a third faster, if it `works` so.

        A net may flatten with `x.view(x.size(0), -1)`, which only the layout that it was written for allows.
        """
        before = {name: t.data for name, t in self._tensors()}
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it, its stubs do not
        if not works():
            for name, t in self._tensors():
                t.data = before[name]

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
        self._apart()
        if self.twin_of is not None:
            with torch.no_grad():
                for own, new in zip(_tensors_of(self.twin_of), _tensors_of(self.model)):
                    own.copy_(new)
            empty_caches(self.twin_of.modules())
        return self.whole

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
            p.grad = self.grads.get(name)
        for name, t in self._named():
            strides = self.contiguous.get(name, t.stride())
            if strides != t.stride():  # those of a side of length 1 say nothing of the memory, and choose kernels
                t.data = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t.data)
        self._to_own_memory()
        empty_caches(self.model.modules())

    def _named(self) -> list[tuple[str, Tensor]]:
        """Return the parameters and buffers that the model has now."""
        return [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]

    @torch.no_grad()
    def _to_own_memory(self) -> None:
        for name, t in self._named():
            own = self.memory.get(name)
            if own is not None and own.shape == t.shape and own.data_ptr() != t.data_ptr():
                t.data = own.copy_(t)

    def _apart(self) -> None:
        """Give every tensor of a copy memory of its own: what was not moved may still be the given model's."""
        if not self.inplace:
            theirs = {t.untyped_storage().data_ptr() for t in self.received.values() if t.numel()}
            for _, t in self._named():
                if t.numel() and t.untyped_storage().data_ptr() in theirs:
                    t.data = t.data.clone()

    def _reorder(self) -> None:
        """A parametrisation that is taken off puts its weight last: the state dict keeps the user's order."""
        for name, module in self.model.named_modules():
            for wanted, mapping in zip(self.order.get(name, ([], [])), (module._parameters, module._buffers)):
                if list(mapping) != wanted and sorted(mapping) == sorted(wanted):
                    items: dict[str, Any] = {key: mapping[key] for key in wanted}
                    mapping.clear()
                    mapping.update(items)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def check_tunable(model: nn.Module) -> None:
    """Refuse what has no weights that can be tuned.

    Raises:
        ModelError: see `check_net`; or TorchScript, or no floating-point parameters.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is TorchScript, whose weights cannot be exchanged: give the nn.Module it came from")
    check_net(model)
    if not any(p.is_floating_point() for p in model.parameters()):
        raise ModelError("the model has no floating-point parameters to tune (quantised, or scripted without weights)")


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__


def in_full_precision(work: WorkCopy, run: Run) -> None:
    """Tune float16 and bfloat16 weights in float32, if the net can run so; the result is rounded once, at the end."""
    own = run.task
    work.to_float32()
    run.task = own.in_float32()
    try:
        with torch.no_grad():
            run.forward(next(iter(run.clean.batches(2, device=run.device))))
        run.note("float16 and bfloat16 weights are tuned in float32 and rounded at the end")
    except RuntimeError:
        work.to_own_dtype()
        run.task = own
        run.note("the model casts to low precision itself: its weights are tuned in their own dtype")
