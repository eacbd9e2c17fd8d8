"""What a run shares with the process around it: the global random state, memory, and torch's checkpoints.

A checkpointed part of a model keeps its inputs only, and is computed again in the backward pass. That is torch's own
checkpoint(); a block of ours stands in its place for what it needs besides.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastfip.nets.state import training_flags

__all__ = [
    "PeakMemory", "checkpoints_kept", "checkpoints_met", "computed_again_alike", "keeping_activations",
    "resident_memory", "seeded",
]  # fmt: skip

#: The global generators are the whole process's: one thread at a time has them. Blocks of one thread may be nested.
_GENERATORS = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, NumPy and torch for a block, and give every generator its old state back.

    Blocks of several threads take turns: what one had seeded would be kept by another as the state to give back, and
    neither would draw what its seed says.
    """
    with _GENERATORS:
        yield from _seeded(seed, device)


def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    import numpy

    python, old = random.getstate(), numpy.random.get_state()
    cuda = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if cuda else 0
    with torch.random.fork_rng(devices=[index] if cuda else []):
        try:
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            # Not torch.manual_seed: it would seed devices that this run has nothing to do with.
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(old)


class PeakMemory:
    """The peak of memory during a block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.what = "tensors on the device" if self.cuda else "resident memory of the process"
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux: 5 sets the peak that it keeps for the process back to the present value.
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self.what += ", since it began"
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else _resident_peak()


def resident_memory(field: str = "VmRSS") -> int | None:
    """Return the resident memory of this process in bytes, "VmHWM": its peak; None where the system cannot say it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def _resident_peak() -> int:
    peak = resident_memory("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


#: Where torch looks up what runs before and after a function that is checkpointed.
_PLACES = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")
_GENERATOR = "_checkpoint_without_reentrant_generator"
_CHECKPOINTS = threading.Lock()
_FOUND: dict[str, Callable[..., Iterator[None]]] = {}  # by place, while a thread is in a block
_REENTRANT: list[Any] = []  # torch's own function of checkpoint(use_reentrant=True), likewise
_entered = 0  # how many blocks threads are in


class _Here(threading.local):
    """What holds in a thread: in how many blocks it is, by what they keep, and how many functions were met and kept."""

    every = some = met = kept = 0
    modules: Sequence[nn.Module] = ()


_HERE = _Here()


@contextlib.contextmanager
def _standing_in() -> Iterator[None]:
    """Stand in torch's place for a block; whatever other threads do, torch's own function is there again at the end."""
    global _entered
    entered = False
    try:
        with _CHECKPOINTS:
            if not _entered:
                modules = {place: sys.modules[place] for place in _PLACES if place in sys.modules}
                _FOUND.update({k: getattr(m, _GENERATOR) for k, m in modules.items() if hasattr(m, _GENERATOR)})
                for place, found in _FOUND.items():
                    setattr(modules[place], _GENERATOR, partial(_run, found))
                _REENTRANT.append(torch.utils.checkpoint.CheckpointFunction)
                torch.utils.checkpoint.CheckpointFunction = _Reentrant  # type: ignore[assignment,misc]
            _entered, entered = _entered + 1, True
        yield
    finally:
        if entered:
            with _CHECKPOINTS:
                _entered -= 1
                if not _entered:
                    for place, found in _FOUND.items():
                        setattr(sys.modules[place], _GENERATOR, found)
                    _FOUND.clear()
                    torch.utils.checkpoint.CheckpointFunction = _REENTRANT.pop()  # type: ignore[misc]


@contextlib.contextmanager
def keeping_activations(every: bool = True) -> Iterator[None]:
    """Let checkpoint(use_reentrant=False) keep what it computes for a block, in this thread.

    What is computed again in a backward pass, after the block, would be so without what holds in it, and torch refuses
    what then differs. Where torch has no such function any more, it is left as it is.

    Args:
        every: False: only what can be gone through backward once, such as selective and composable checkpoints.
    """
    with _standing_in():
        _HERE.every += every
        _HERE.some += 1
        try:
            yield
        finally:
            _HERE.every -= every
            _HERE.some -= 1


@contextlib.contextmanager
def computed_again_alike(model: nn.Module) -> Iterator[None]:
    """Let what is checkpointed in a block be computed again as it was the first time, in this thread.

    The model's modules are then in the modes in which they were, whatever they are meanwhile, and BatchNorm does not
    count the batch a second time in its running statistics, which torch alone lets it do. Checkpoints that ask for
    use_reentrant=True, which only `backward()` on all that requires a gradient can go through, run without.
    """
    before = _HERE.modules
    with _standing_in():
        _HERE.modules = tuple(model.modules())
        try:
            yield
        finally:
            _HERE.modules = before


def _run(found: Callable[..., Iterator[None]], fn: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand in for torch's generator, whose arguments are `fn`, whether to keep random states, contexts, and others.

    Of `fn` it makes the second computation only.
    """
    plain = torch.utils.checkpoint.noop_context_fn
    own = args[1] if len(args) > 1 else kwargs.get("context_fn", plain)
    _HERE.met += 1
    if _HERE.every or (_HERE.some and own is not plain):
        _HERE.kept += 1
        yield
    else:
        yield from found(_again(fn, _HERE.modules) if _HERE.modules else fn, *args, **kwargs)


class _Reentrant:
    """Stands in for torch's autograd function of checkpoint(use_reentrant=True)."""

    @staticmethod
    def apply(fn: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not _HERE.modules:
            return _REENTRANT[0].apply(fn, preserve_rng_state, *args)
        again = torch.utils.checkpoint.checkpoint
        return again(fn, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _again(fn: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., Any]:
    """Return a function with its modules in the modes that they have now, and running statistics left alone."""
    modes = [module.training for module in modules]

    def run(*args: Any, **kwargs: Any) -> Any:
        with training_flags(modules):
            for module, training in zip(modules, modes):
                module.training = training
            with _statistics_apart(modules):
                return fn(*args, **kwargs)

    return run


@contextlib.contextmanager
def _statistics_apart(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give norm layers in train mode copies of their running statistics to write to, for a block."""
    norms = [m for m in modules if m.training and isinstance(m, _NormBase)]
    own = [(norm, name, b) for norm in norms for name, b in norm._buffers.items() if b is not None]
    try:
        for norm, name, b in own:
            norm._buffers[name] = b.detach().clone()
        yield
    finally:
        for norm, name, b in own:
            norm._buffers[name] = b


def checkpoints_met() -> int:
    """Return how many checkpointed functions have been run in blocks of this thread so far."""
    return _HERE.met


def checkpoints_kept() -> int:
    """Return how many of them kept what they computed."""
    return _HERE.kept
