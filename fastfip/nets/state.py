"""What is done to a model for a block or on a copy: train and eval mode, requires_grad, deep copies, float32.

Models of 16 bits are worked on in float32: their steps and small gradients would round to nothing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfip.errors import ModelError, reason

__all__ = [
    "LOW_PRECISION",
    "as_written",
    "by_mesh",
    "cast",
    "copied",
    "dtypes_of",
    "empty_caches",
    "eval_mode",
    "fresh_caches",
    "frozen_copy",
    "is_compiled",
    "is_part",
    "is_sharded",
    "lendable",
    "own_part",
    "refuse_parts",
    "refuse_sharded",
    "requires_grad",
    "still_received",
    "to_float32",
    "training_flags",
    "unwrapped",
    "uses_batch_statistics",
    "without_caches",
]

#: Dtypes whose steps are too coarse to tune in.
LOW_PRECISION = (torch.float16, torch.bfloat16)

T = TypeVar("T", bound=Tensor)

#: Numbers of a weight below which sharing its memory saves too little to look after.
LEAST_LENT = 1 << 16


@contextlib.contextmanager
def training_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring `training` of these modules back after a block that sets it."""
    before = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode for a block; every module's own flag is as before afterwards."""
    with training_flags(model.modules()):
        yield model.eval()


@contextlib.contextmanager
def requires_grad(tensors: Iterable[Tensor], wanted: bool | Callable[[Tensor], bool]) -> Iterator[None]:
    """Set `requires_grad` of tensors for a block; each has its own flag again afterwards.

    Args:
        tensors: e.g. `model.parameters()`. What is no floating-point (or complex) tensor cannot require a gradient.
        wanted: one flag for all of them, or a function that tells it for each.
    """
    before = [(t, t.requires_grad) for t in tensors]
    try:
        for t, _ in before:
            asked = wanted(t) if callable(wanted) else wanted
            t.requires_grad_(asked and (t.is_floating_point() or t.is_complex()))
        yield
    finally:
        for t, flag in before:
            t.requires_grad_(flag)


@contextlib.contextmanager
def fresh_caches(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Empty what modules keep in eval mode between passes for a block, and put back what was there.

    That is a dict of tensors computed of parameters (LeViT's biases by position), which the module's own `train` method
    empties: one from a pass without gradients has none, the graph of another pass's is gone. A dict that `train` does
    not name is part of the model (masks, scales).
    """
    kept = [(cache, dict(cache)) for cache in _caches(modules)]
    for cache, _ in kept:
        cache.clear()
    try:
        yield
    finally:
        for cache, before in kept:
            cache.clear()
            cache.update(before)


def empty_caches(modules: Iterable[nn.Module]) -> None:
    """Empty what modules keep in eval mode between passes (see fresh_caches): the weights are others now."""
    for cache in _caches(modules):
        cache.clear()


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let modules keep nothing between passes in eval mode for a block: each pass computes it of the weights anew.

    The hook is on the module that keeps it, as `forward=` of the user's may call parts of a model.
    """
    keeping = [module for module in model.modules() if next(_caches([module]), None) is not None]
    hooks = [module.register_forward_pre_hook(lambda module, _: empty_caches([module])) for module in keeping]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _caches(modules: Iterable[nn.Module]) -> Iterator[dict[Any, Tensor]]:
    for module in modules:
        if type(module).train is not nn.Module.train:
            named = _named_by_train(type(module))
            for name, value in vars(module).items():
                if name in named and type(value) is dict and all(isinstance(t, Tensor) for t in value.values()):
                    yield value


def _named_by_train(kind: type) -> set[str]:
    """The names in the code of every `train` method of a class that is not torch's own; none where there is no code."""
    methods = (vars(c)["train"] for c in kind.__mro__ if "train" in vars(c) and c is not nn.Module)
    codes = (getattr(inspect.unwrap(method), "__code__", None) for method in methods if callable(method))
    return {name for code in codes for name in getattr(code, "co_names", ())}


def copied(model: nn.Module, remedy: str, lent: Mapping[nn.Parameter, Tensor] | None = None) -> nn.Module:
    """Return a deep copy of a model.

    Tensors that a module computed and keeps beside its parameters (the weight of torch.nn.utils.weight_norm,
    spectral_norm and prune, which is computed anew in each forward pass) are copied as plain numbers: torch refuses to
    copy them with their graph.

    Args:
        model: it is left as it is.
        remedy: what the error advises where the model cannot be copied.
        lent: parameters of the model -> values whose memory those of the copy share; all others are copied.

    Raises:
        ModelError: copying it fails, with the reason.
    """
    shared = {id(p): nn.Parameter(t.detach(), p.requires_grad) for p, t in (lent or {}).items()}
    try:
        with torch.no_grad():
            computed = (t for m in model.modules() for t in _tensors_in(m.__dict__) if t.grad_fn is not None)
            return copy.deepcopy(model, {**{id(t): t.detach().clone() for t in computed}, **shared})
    except Exception as error:  # what a user's module raises when it is copied can be anything
        refuse_sharded(model)
        raise ModelError(f"the model cannot be copied ({type(error).__name__}: {reason(error)}): {remedy}") from error


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Walk the tensors in the plain containers of a module's attributes; its parts and parameters have their own."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (dict, list, tuple):
        for item in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
            yield from _tensors_in(item)


def lendable(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the large weights of torch's own layers, each with itself: what no forward pass writes to."""
    out: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn.") and getattr(module, "max_norm", None) is None:
            for p in module._parameters.values():
                if type(p) is nn.Parameter and p.dim() > 1 and p.numel() >= LEAST_LENT and not p.is_inference():
                    out[p] = p
    return out


def still_received(p: Tensor, value: Tensor | None) -> bool:
    """Return whether a received value can stand for a tensor of the model: of its layout, and its numbers."""
    if (
        value is None
        or value.is_inference()
        or (value.dtype, value.device, value.shape) != (p.dtype, p.device, p.shape)
    ):
        return False
    return value.stride() == p.stride() and torch.equal(value, p)


def frozen_copy(model: nn.Module, received: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a copy in eval mode that requires no gradient: the model as it was received.

    Args:
        model: it is left as it is.
        received: name -> value that somebody keeps: where it is the model's own, the copy shares its memory.

    Raises:
        ModelError: the model cannot be copied.
    """
    known = received or {}
    lent = {
        p: known[name]
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and still_received(p.detach(), known.get(name))
    }
    twin = copied(model, "this method needs the received model beside the one that it tunes", lent)
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin.eval()


def unwrapped(model: nn.Module, compiled: bool = True) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and, if `compiled`, what torch.compile returns."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif compiled and type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def as_written(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let a model that torch.compile was used on run as its code says for a block.

    Compiled code knows one backward pass at a time, and nothing of weights that are put in another's place.
    """
    if not isinstance(model, nn.Module) or not is_compiled(model):  # what is no model is refused by who looks at it
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def uses_batch_statistics(model: nn.Module) -> bool:
    """Return whether a BatchNorm layer takes its statistics from the batch."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which each process has a part.

    Raises:
        ModelError: it is sharded (FSDP, DTensor).
    """
    refuse_parts(model.parameters(), map(type, model.modules()))


def refuse_parts(parameters: Iterable[Tensor], kinds: Iterable[type]) -> None:
    """Refuse parameters of which each process has a part, in modules of these classes.

    Raises:
        ModelError: they are such, or will be so again after the next pass (FSDP).
    """
    if _in_parts(parameters, kinds):
        raise ModelError(
            "the model is sharded over processes: take it as it was before fully_shard, or load the full state dict "
            "(torch.distributed.checkpoint.state_dict, full_state_dict=True) into an unsharded one"
        )


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process has a part of a model or of something in it, or will after the next pass (FSDP)."""
    return _in_parts(model.parameters(), map(type, model.modules()))


def is_part(t: object) -> bool:
    """Return whether a tensor is one of which each process has a part (a DTensor)."""
    return type(t).__name__ == "DTensor" or (isinstance(t, Tensor) and type(t.data).__name__ == "DTensor")


def own_part(t: Any) -> Tensor:
    """Return what this process has of a tensor: its part of a DTensor, any other tensor itself; the memory is its."""
    part: Tensor = t.to_local() if is_part(t) else t
    return part


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Return tensors in groups of one mesh each, in the order in which the meshes come up; plain ones are a group.

    torch's optimisers may compute with all tensors of a group at once, which have to lie on one mesh then.
    """
    groups: list[tuple[Any, list[T]]] = []
    for t in tensors:
        mesh = t.device_mesh if is_part(t) else None  # type: ignore[attr-defined]
        members = next((members for known, members in groups if known == mesh), None)
        if members is None:
            groups.append((mesh, [t]))
        else:
            members.append(t)
    return [members for _, members in groups]


def _in_parts(parameters: Iterable[Tensor], kinds: Iterable[type]) -> bool:
    return any(map(_is_fsdp, kinds)) or any(map(is_part, parameters))


def _is_fsdp(kind: type) -> bool:
    return any("FullyShardedDataParallel" in c.__name__ or c.__name__ == "FSDPModule" for c in kind.__mro__)


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was used on the model or a part of it."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and buffer by its name, tied ones by each."""
    return {name: t.dtype for name, t in _tensors_of(model)}


def cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Bring the parameters and buffers that are named to these dtypes, in place."""
    for name, t in _tensors_of(model):
        if name in dtypes and t.dtype != dtypes[name]:
            t.data = t.data.to(dtypes[name])


def to_float32(model: nn.Module) -> None:
    """Bring float16 and bfloat16 parameters and buffers to float32, in place."""
    cast(model, {name: torch.float32 for name, dtype in dtypes_of(model).items() if dtype in LOW_PRECISION})


def _tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
