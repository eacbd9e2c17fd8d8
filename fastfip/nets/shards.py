"""A model of which each process has a part (FSDP2's `fully_shard`, tensor parallelism): a whole twin, and the way back.

Each rank gathers all weights into a plain copy of the model, works on that, and writes its own parts back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastfip.errors import ConfigError, ModelError, reason
from fastfip.nets.state import copied, eval_mode, is_part, is_sharded

__all__ = ["Shards", "on_parts", "whole_value"]

#: Where the code is that shards; activation checkpointing, beside it, stays on.
_SHARDING = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed._composable.fsdp",
    "torch.distributed._composable.replicate",
)
#: What `fully_shard` notes on modules for the compiler.
_NOTES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_REMEDY = "give group= a process group of all ranks that have parts of the model"
#: What a group of FSDP's parameters does with gradients and weights in a backward pass, and what it does by default.
_REDUCTIONS = {
    "reduce_grads": True, "all_reduce_grads": True, "reshard_after_backward": True, "gradient_divide_factor": None,
}  # fmt: skip
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of outputs, whole and in parts; 16 bits: 5e-2


class Shards:
    """The parts of a model's parameters on this rank.

    Attributes:
        model: the sharded model. twin: the whole one, a plain copy with all weights, without what torch.distributed
            has put on the modules; it is gathered when it is first asked for, by all ranks.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        """Look at the parts.

        Args:
            model: its modules are resharded where a forward pass has left them whole.
            group: as users give it: "auto" or a process group; its ranks have to be those that have the parts, of
                whichever parameters.

        Raises:
            ConfigError: the group is None, or its ranks are not those of the meshes.
            ModelError: weights on the meta device, or parts of another kind than DTensors (FSDP1).
        """
        self.model = model
        _check_kind(model)
        self.reshard()
        self.parts = {name: p for name, p in model.named_parameters(remove_duplicate=False) if is_part(p)}
        self.group = self._group_of(group)

    @classmethod
    def of(cls, model: object, group: Any, params: object = None) -> Shards | None:
        """Return the parts of a model, None where it is whole (or no module at all).

        Raises:
            ConfigError: see `__init__`; or `params` are tensors of the model, of which the twin has others.
        """
        if not isinstance(model, nn.Module) or not is_sharded(model):
            return None
        if isinstance(params, Mapping):
            raise ConfigError("params= of a model that is sharded over processes takes names, not tensors")
        return cls(model, group)

    def reshard(self) -> None:
        """Take the whole weights off that a forward pass has left on modules: the parameters are the parts again."""
        for module in self.model.modules():
            if _is_fsdp2(type(module)):
                module.reshard()  # type: ignore[operator]

    @property
    def world(self) -> int:
        """Return how many processes have parts."""
        return dist.get_world_size(self.group)

    def _group_of(self, group: Any) -> Any:
        if group is None:
            raise ConfigError(
                "the model is sharded over processes, and group=None is this process alone: make the call on every "
                "rank with group='auto', or take the model as it was before fully_shard"
            )
        if isinstance(group, str) and group == "auto":
            group = dist.group.WORLD
        elif not isinstance(group, dist.ProcessGroup):
            raise ConfigError(f"group={group!r}: give 'auto' or the process group that the model is sharded over")
        ours, all_theirs = sorted(dist.get_process_group_ranks(group)), set[int]()
        for name, p in self.parts.items():
            theirs = p.device_mesh.mesh.flatten().tolist()  # type: ignore[attr-defined]
            all_theirs.update(theirs)
            if not set(theirs) <= set(ours):
                raise ConfigError(
                    f"the parameter {name} is sharded over the ranks {sorted(theirs)}, the group has {ours}: {_REMEDY}"
                )
        if all_theirs != set(ours):
            raise ConfigError(
                f"the model is sharded over the ranks {sorted(all_theirs)}, the group has {ours}: {_REMEDY}"
            )
        return group

    @functools.cached_property
    @torch.no_grad()
    def twin(self) -> nn.Module:
        """Gather all weights: a collective of every mesh that they lie on."""
        whole: dict[nn.Parameter, Tensor] = {}
        for p in self.parts.values():
            if p not in whole:  # tied ones are gathered once
                whole[p] = whole_value(p)
        with _plain(self.model):
            return copied(self.model, "take it as it was before fully_shard", whole)

    def part(self, name: str, value: Tensor) -> Tensor:
        """Return this rank's part of a whole value, laid out as the parameter of that name; nothing is sent.

        Where the parameter is whole on every rank, that is the value itself.
        """
        p: Any = self.parts.get(name)
        if p is None:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        with torch.no_grad():
            everywhere = DTensor.from_local(
                value.detach(), p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False
            )
            mine: Any = everywhere.redistribute(p.device_mesh, p.placements)
            local = mine.to_local()
            if local.untyped_storage().nbytes() > local.nbytes:  # a view of the whole, which would live as long as it
                local = local.clone()
            return DTensor.from_local(
                local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )

    def summed(self, name: str, value: Tensor) -> Tensor:
        """Return this rank's part of the sum over the ranks of a whole value, laid out as the parameter."""
        total = value.detach().contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return self.part(name, total)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the sharded model the values of the twin: each rank its own parts, and all buffers."""
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        value: Tensor
        for name, value in self.twin.named_parameters():
            if name in self.parts:
                self.parts[name].to_local().copy_(self.part(name, value).to_local())  # type: ignore[attr-defined]
            else:
                own[name].copy_(value)
        buffers = dict(self.model.named_buffers())
        for name, value in self.twin.named_buffers():
            buffers[name].copy_(value)

    def unsharded(self) -> list[dict[str, Tensor]]:
        """Return, for each unit of FSDP, name -> the tensor that its forward pass has in the parameter's place.

        These have memory only while the unit computes. What belongs to no unit comes last, as it is.
        """
        found, seen = list[dict[str, Tensor]](), set[str]()
        for module in self.model.modules():
            if _is_fsdp2(type(module)):
                module.unshard()  # type: ignore[operator]
                unit = {n: p for n, p in self.model.named_parameters() if n in self.parts and not is_part(p)}
                module.reshard()  # type: ignore[operator]
                found.append({name: p for name, p in unit.items() if name not in seen})
                seen.update(unit)
        found.append({name: p for name, p in self.model.named_parameters() if name not in seen})
        return [unit for unit in found if unit]

    @property
    def rewritten(self) -> bool:
        """Return whether code of the model may know that it has a part only, as in tensor parallelism.

        FSDP alone lets modules compute with whole weights.
        """
        managed = {id(p) for m in self.model.modules() if _is_fsdp2(type(m)) for p in m.parameters()}
        return any(id(p) not in managed or sum(s.is_shard() for s in p.placements) > 1 for p in self.parts.values())  # type: ignore[attr-defined]

    @property
    def has_policy(self) -> bool:
        """Return whether a unit of FSDP computes in another dtype than that of its parts, offloads them, or has a hook.

        Such a hook takes part in the sum of gradients over the ranks, in a way that nobody else knows.
        """
        own = {None, *(p.dtype for p in self.parts.values())}
        for group in self._groups():
            policy = group.mp_policy
            if not {policy.param_dtype, policy.reduce_dtype, policy.output_dtype} <= own:
                return True
            if type(group.offload_policy).__name__ != "OffloadPolicy" or group._all_reduce_hook is not None:
                return True
        return False

    def hook_passes(self) -> list[Any]:
        """Let every unit give its whole weights back after a pass without gradients; return the handles of the hooks.

        FSDP keeps those of a root, which would be old ones once the parts are tuned.
        """

        def give_back(module: Any, *_: object) -> None:
            if not torch.is_grad_enabled() and _is_fsdp2(type(module)):  # a plain copy has the hook as well
                module.reshard()

        units = [m for m in self.model.modules() if _is_fsdp2(type(m))]
        # Modules that share a unit are no root, and the first one must not give back what the others need.
        alone = [m for m in units if len(m._get_fsdp_state()._modules) == 1]  # type: ignore[operator]
        return [m.register_forward_hook(give_back) for m in alone]

    def _groups(self) -> list[Any]:
        """Return FSDP's own groups of parameters, one or more of each unit."""
        states = [m._get_fsdp_state() for m in self.model.modules() if _is_fsdp2(type(m))]  # type: ignore[operator]
        found = {id(g): g for state in states for g in _groups_of(state)}
        return list(found.values())

    @contextlib.contextmanager
    def plain_reductions(self) -> Iterator[None]:
        """Let every backward pass of a block take the mean of gradients over the ranks, and leave no weights whole."""
        groups = self._groups()
        before = [{name: getattr(g, name) for name in _REDUCTIONS if hasattr(g, name)} for g in groups]
        try:
            for g, known in zip(groups, before):
                vars(g).update({name: _REDUCTIONS[name] for name in known})
            yield
        finally:
            for g, known in zip(groups, before):
                vars(g).update(known)

    @torch.no_grad()
    def summed_by_fsdp(self, gradients: list[Tensor]) -> list[Tensor]:
        """Make sums over the ranks of the means that FSDP's backward passes took; return the gradients of others."""
        for g in gradients:
            if is_part(g):
                g.to_local().mul_(g.device_mesh.size())  # type: ignore[attr-defined]
        return [g for g in gradients if not is_part(g)]

    @torch.no_grad()
    def compare(self, forward: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        """See whether the twin computes what the sharded model does, where the model was rewritten for its parts.

        Every rank has to give the same batch.

        Raises:
            ModelError: it does not, as where a number of heads was divided by that of the ranks.
        """
        if not self.rewritten:
            return
        with eval_mode(self.model):
            right = whole_value(forward(self.model, batch)).float()
        self.reshard()
        remedy = "fastfip computes with whole weights on each rank: take the model as it was before it was parallelised"
        try:
            with eval_mode(self.twin):
                found = forward(self.twin, batch).float()
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"with whole weights the model does not compute ({reason(error)}): {remedy}") from error
        rough = _TOLERANCE.get(next(iter(self.parts.values())).dtype, 5e-2)
        scale = float(right.abs().max())
        if found.shape != right.shape or not torch.allclose(found, right, rtol=rough, atol=rough * scale):
            raise ModelError(f"with whole weights the model answers otherwise than in its parts: {remedy}")


class _OnParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: list[Tensor], shards: Shards, names: tuple[str, ...], *parts: Tensor) -> Tensor:
        ctx.value, ctx.shards, ctx.names = hidden[0], shards, names  # in a list torch does not follow its graph
        return hidden[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.value is None:  # its graph is gone, which is as large as the whole model
            raise ModelError(
                "the backward pass of a sharded trace runs once: call fisher_trace again, on every rank, for another"
            )
        whole = dict(ctx.shards.twin.named_parameters(remove_duplicate=False))
        with torch.enable_grad():
            found = torch.autograd.grad(ctx.value, [whole[name] for name in ctx.names], allow_unused=True)
        world = ctx.shards.world
        parts = []
        for name, g in zip(ctx.names, found):
            g = torch.zeros_like(whole[name]) if g is None else g * gradient
            parts.append(ctx.shards.summed(name, g) / world)
        ctx.value = None
        return None, None, None, *parts


def on_parts(value: Tensor, shards: Shards, names: Iterable[str]) -> Tensor:
    """Return a scalar of the twin's weights whose gradient goes to the sharded ones: the mean over the ranks of it.

    Its backward pass is a collective.
    """
    every = dict(shards.model.named_parameters(remove_duplicate=False))
    own = {name: every[name] for name in names}
    if not value.requires_grad:
        return value
    result: Tensor = _OnParts.apply([value], shards, tuple(own), *own.values())
    return result


def whole_value(t: Any) -> Tensor:
    """Return a tensor with the values of all ranks: of a DTensor the whole, of any other tensor itself."""
    if not is_part(t):
        return cast(Tensor, t)
    local, mesh = t.to_local(), t.device_mesh
    if local.device.type != mesh.device_type:  # parts that are offloaded: the mesh sends from its own devices
        from torch.distributed.tensor import DTensor

        local = local.to(mesh.device_type)
        t = DTensor.from_local(local, mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
    return cast(Tensor, t.full_tensor())


def _groups_of(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12 or so a unit may have several
    if several is not None:
        return list(several)
    return [g for g in [state._fsdp_param_group] if g is not None]


def _is_fsdp2(kind: type) -> bool:
    return any(c.__name__ == "FSDPModule" for c in kind.__mro__)


def _check_kind(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any("FullyShardedDataParallel" in c.__name__ for c in type(module).__mro__):
            where = f" at {name!r}" if name else ""
            raise ModelError(
                f"the model has FullyShardedDataParallel{where}, which keeps flat parts of its weights: use "
                "fully_shard (FSDP2), or take the model as it was before it was sharded"
            )
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ModelError(
                f"the parameter {name} is on the meta device, without weights: model.to_empty(device=...) and load "
                "them first (torch.distributed.checkpoint.state_dict)"
            )


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Take off the classes, hooks and notes that sharding has put on modules, for a block that copies them."""
    before: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module in list(model.modules()):
            before.append((module, type(module), {}))
            _, kind, kept = before[-1]
            if _is_fsdp2(kind):
                module.__class__ = next(c for c in kind.__mro__ if not _is_fsdp2(c))
            for name, value in list(vars(module).items()):
                if isinstance(value, dict):  # of hooks, or of the states of what was applied to the module
                    others = {key: one for key, one in value.items() if not _of_sharding(one)}
                    if len(others) < len(value):
                        kept[name] = value
                        vars(module)[name] = type(value)(others)
                elif name in _NOTES or _of_sharding(value):
                    kept[name] = vars(module).pop(name)
        yield
    finally:
        for module, kind, kept in before:
            vars(module).update(kept)
            module.__class__ = kind


def _of_sharding(thing: Any) -> bool:
    """Whether a hook (behind partials, bound methods and torch's own wrapper of hooks) or a state is of a sharding."""
    for _ in range(8):
        if thing is None or isinstance(thing, (nn.Module, Tensor)):
            return False
        if any(str(getattr(one, "__module__", "")).startswith(_SHARDING) for one in (type(thing), thing)):
            return True
        behind = (getattr(thing, name, None) for name in ("func", "hook", "__self__", "__wrapped__"))
        thing = next((one for one in behind if one is not None), None)
    return False
