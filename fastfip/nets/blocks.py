"""Gradient checkpointing of a model that has none of its own: which of its parts, and how they run so for a block."""

from __future__ import annotations

import contextlib
import copyreg
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastfip.nets.counting import storage_key, strided_tensors

__all__ = ["Saving", "best_blocks", "checkpointed"]

_KINDS: dict[type[nn.Module], type[nn.Module]] = {}


@contextlib.contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules keep only their inputs for a backward pass, and be computed again in it, for a `with` block.

    Their class is another one meanwhile, of the same name; a copy, or what is pickled, is of their own. Parameters,
    buffers, hooks and names stay as they are; hooks of the module itself run once, those inside it again with it.
    Random numbers are the same ones again. See `process.computed_again_alike` for BatchNorm and for modes that change.

    Args:
        blocks: modules that compute by the forward method of their class.
    """
    own = [(block, type(block)) for block in blocks]
    try:
        for block, kind in own:
            block.__class__ = _again_in_backward(kind)
        yield
    finally:
        for block, kind in own:
            block.__class__ = kind


def _again_in_backward(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class whose forward is that of another one, checkpointed where a graph is made."""
    if kind not in _KINDS:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return kind.forward(self, *args, **kwargs)
            return checkpoint(lambda *given: kind.forward(self, *given, **kwargs), *args, use_reentrant=False)

        def reduce(self: nn.Module, protocol: Any) -> Any:
            mine = type(self)
            self.__class__ = kind  # a copy, or what is pickled, is of the model's own class
            try:
                how = self.__reduce_ex__(protocol)
            finally:
                self.__class__ = mine
            # The usual way is refused for what is of another class at the moment.
            plain = isinstance(how, tuple) and how[0].__name__ == "__newobj__"
            return (copyreg._reconstructor, (kind, object, None), *how[2:]) if plain else how  # type: ignore[attr-defined]

        names = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__,
                 "__qualname__": kind.__qualname__}  # fmt: skip
        meta: Any = type(kind)
        made = meta(kind.__name__, (nn.Module,), names)
        made.__bases__ = (kind,)  # afterwards: a class that is told of those below it does not hear of this one
        _KINDS[kind] = made
    return _KINDS[kind]


@dataclass
class _Call:
    """One call of a module: the memory of what it is given, and of what is kept for its backward pass."""

    inputs: int
    kept: dict[int, int] = field(default_factory=dict)  # by the number of the storage


@dataclass(frozen=True)
class Saving:
    """What a choice of modules to checkpoint does, in bytes of activations that a pass keeps.

    Attributes:
        blocks: the modules, none inside another; empty where it does not pay.
        plain: kept by the whole model as it is.
        peak: kept with the modules checkpointed, at most: their inputs, what lies between, and the largest of them.
    """

    blocks: tuple[nn.Module, ...]
    plain: int
    peak: int


#: Share of the plain activations that checkpointing has to save to be worth a second computation.
LEAST = 0.1


def best_blocks(model: nn.Module, call: Callable[[], object]) -> Saving:
    """Find the modules that keep least if they are checkpointed.

    The largest modules that keep no more than some bound are taken, for each bound that makes a difference. A low one
    takes small modules, whose inputs are many; under a high one the largest module, computed again, is itself large.

    Args:
        model: any.
        call: runs its forward pass with a graph, through which nothing goes backward.
    """
    calls, plain = _kept_by_calls(model, call)
    worst = {m: max(sum(c.kept.values()) for c in each) for m, each in calls.items()}
    saves = {m: sum(sum(c.kept.values()) - c.inputs for c in each) for m, each in calls.items()}
    best = Saving((), plain, plain)
    for bound in sorted({size for m, size in worst.items() if saves[m] > 0}):
        wanted = {m for m in calls if worst[m] <= bound and saves[m] > 0}
        chosen = list(_largest(model, wanted))
        peak = plain - sum(saves[m] for m in chosen) + max(worst[m] for m in chosen)
        if peak < min(best.peak, (1 - LEAST) * plain):
            best = Saving(tuple(chosen), plain, peak)
    return best


def _largest(model: nn.Module, wanted: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yield the outermost modules below a model that are wanted, each once."""
    seen: set[int] = set()
    rest = [*model.children()][::-1]
    while rest:
        module = rest.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if module in wanted:
            seen.update(map(id, module.modules()))
            yield module
        else:
            rest += [*module.children()][::-1]


def _kept_by_calls(model: nn.Module, call: Callable[[], object]) -> tuple[dict[nn.Module, list[_Call]], int]:
    """Return the calls of each module that may be checkpointed, and how much memory is kept in all."""
    calls: dict[nn.Module, list[_Call]] = {}
    whole = _Call(0)
    open_calls = [whole]
    own = {storage_key(t) for t in [*model.parameters(), *model.buffers()]}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = {storage_key(t): t.untyped_storage().nbytes() for t in strided_tensors((args, kwargs))}
        open_calls.append(_Call(sum(size for key, size in given.items() if key not in own)))
        calls.setdefault(module, []).append(open_calls[-1])

    def end(module: nn.Module, args: Any, output: Any) -> None:
        open_calls.pop()

    numbers: dict[int, int] = {}  # of storages that live: nothing is really kept, and their memory is used again
    fresh = itertools.count()

    def keep(t: Tensor) -> None:
        if t.layout == torch.strided and storage_key(t) not in own:
            storage, key = t.untyped_storage(), storage_key(t)
            if key not in numbers:
                numbers[key] = next(fresh)
                weakref.finalize(storage, numbers.pop, key, None)
            for one in open_calls:
                one.kept[numbers[key]] = storage.nbytes()

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if module is not model and _may_be(module):
                hooks.callback(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(end).remove)
        with saved_tensors_hooks(keep, lambda nothing: nothing):
            call()
    return calls, sum(whole.kept.values())


def _may_be(module: nn.Module) -> bool:
    """Return whether a module has parts, and computes by its class's own forward method, which may be another one."""
    plain = not isinstance(module, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict, nn.RNNBase))
    plain = plain and "forward" not in vars(module) and type(module).__name__ != "OptimizedModule"
    return plain and type(module).__call__ is nn.Module.__call__ and next(module.children(), None) is not None
