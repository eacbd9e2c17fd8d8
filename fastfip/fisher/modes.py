"""The state in which Fisher terms are taken: what is refused, and what is switched for the length of a forward pass."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, map_tensors
from fastfip.data.outputs import logits_task
from fastfip.data.task import Task
from fastfip.errors import DataError, ModelError
from fastfip.nets.checks import of_checkpointing
from fastfip.nets.process import keeping_activations
from fastfip.nets.state import LOW_PRECISION, fresh_caches, is_compiled

#: Of each model the modes and the code of `forward=` with which its forward pass was tried, and whether it gave
#: probabilities.
_TRIED: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()
_MOST_TRIES = 8  # of a forward pass that takes random numbers and still gives the same outputs


def fit_for_fisher(model: nn.Module, task: Task, batch: Batch, takes_logits: bool) -> Task:
    """Try the forward pass on the first batch that a model is seen with in its modes; return the task to use.

    Where the model ends in a softmax and the loss takes logits, the returned task gives what goes into the softmax
    (with a `forward=` of the user's, outputs are what it says). Nothing is tried twice.

    Args:
        model: in the modes in which it is used.
        task: how the model and the batch meet.
        batch: on the model's device.
        takes_logits: the loss is a cross-entropy, fastfip's own.

    Raises:
        ModelError: outputs are random, or the pass changes a buffer, which gets its values back.
    """
    modes = tuple(m.training for m in model.modules())
    key = (takes_logits, getattr(task.forward_hook, "__code__", type(task.forward_hook)), modes)
    known = _TRIED.setdefault(model, {})
    if known.get(key) is False:
        return task
    buffers = {name: (b, b._version, b.clone()) for name, b in model.named_buffers() if not b.is_inference()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), readable(model), torch.random.fork_rng(devices):
        before = _random_state(devices)
        outputs = task.forward(model, batch)
        drew = not all(map(torch.equal, before, _random_state(devices)))
        agree = all(_same(outputs, task.forward(model, batch)) for _ in range(_MOST_TRIES if drew else 1))
    changed = _restored(dict(model.named_buffers()), buffers)
    if changed and (any(modes) or not agree):
        remedy = "call model.eval()" if any(modes) else "in eval mode too: pass forward= that leaves it as it is"
        raise ModelError(f"the forward pass changes the buffer {changed[0]!r}, and the model is to stay: {remedy}")
    if not agree:
        remedy = "call model.eval()" if any(modes) else "in eval mode too: pass forward= that switches it off"
        raise ModelError(
            f"the outputs are random (two passes on one batch differ: dropout, stochastic depth): {remedy}; the Fisher"
            " of a random subnet is not the model's"
        )
    said = None
    if takes_logits:
        with readable(model):
            task, said = logits_task(model, task, batch, outputs)
    known[key] = said is not None
    return task


def _random_state(devices: Iterable[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by no more than the order in which a device adds up."""
    if a.shape != b.shape:
        return False
    rough = 1e-2 if a.dtype in LOW_PRECISION else 1e-4
    return torch.allclose(a, b, rtol=0, atol=rough * float(a.abs().nan_to_num().max()), equal_nan=True)


def _restored(now: Mapping[str, Tensor], before: Mapping[str, tuple[Tensor, int, Tensor]]) -> list[str]:
    """Give buffers their values back; return the names of those that had changed."""
    changed = [name for name, (b, version, _) in before.items() if now.get(name) is not b or b._version != version]
    with torch.no_grad():
        for name in changed:
            (now[name] if name in now and now[name].shape == before[name][2].shape else before[name][0]).copy_(
                before[name][2]
            )
    return changed


@contextlib.contextmanager
def naming_precision(params: Iterable[Tensor], batch: Batch) -> Iterator[None]:
    """Say what is wrong where a forward pass fails on inputs of another precision than the weights.

    Raises:
        DataError: it failed, and they are.
    """
    try:
        yield
    except RuntimeError as error:
        weights = {p.dtype for p in params if p.is_floating_point()}
        inputs: set[torch.dtype] = set()
        map_tensors(lambda t: (inputs.add(t.dtype), t)[1] if t.is_floating_point() else t, batch)  # type: ignore[func-returns-value]
        if len(weights) != 1 or not inputs - weights or torch.is_autocast_enabled("cpu"):
            raise
        (own,), theirs = weights, sorted(str(d).removeprefix("torch.") for d in inputs - weights)
        raise DataError(
            f"the data are {theirs[0]} and the model's weights {str(own).removeprefix('torch.')}: pass x.to({own}), or"
            f" model.to(torch.{theirs[0]})"
        ) from error


def check_modes(model: nn.Module) -> None:
    """Refuse a model that has no per-sample gradients as it stands.

    Raises:
        ModelError: a BatchNorm that uses the statistics of the batch, or active dropout; with the remedy.
    """
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not _is_instance_norm(m):
            if m.training:
                raise ModelError(
                    f"BatchNorm {name!r} is in train mode: it couples the samples of a batch, there are no per-sample"
                    " gradients; call model.eval() (Fisher terms use the running statistics)"
                )
            if m.running_mean is None:
                raise ModelError(
                    f"BatchNorm {name!r} keeps no running statistics and so couples the samples of a batch in eval mode"
                    " too: there are no per-sample gradients; give it track_running_stats=True"
                )
        elif m.training and _dropout_of(m) > 0:
            raise ModelError(
                f"dropout {name!r} is active: the Fisher of a random subnet is not the model's; call model.eval()"
            )


def _dropout_of(m: nn.Module) -> float:
    p = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else 0.0
    if isinstance(m, nn.MultiheadAttention) or (isinstance(m, nn.RNNBase) and m.num_layers > 1):
        p = m.dropout
    return float(p)


def _is_instance_norm(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.instancenorm._InstanceNorm)


@contextlib.contextmanager
def readable(model: nn.Module, second_order: bool = False) -> Iterator[None]:
    """Make a forward pass leave a graph that rules can read, and with `second_order` one that has second derivatives.

    Recurrent layers are computed step by step rather than by one opaque call, compiled models run eagerly, and fused
    attention, which has no second derivative, gives way to the mathematical form; layers whose second derivative is
    expensive in torch are computed by second_order.py, and checkpointed blocks keep what they compute. (Those that
    torch goes through backward once only keep it in any case.)
    """
    with contextlib.ExitStack() as stack:
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_without_mkldnn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(eagerly(is_compiled(model)))
        stack.enter_context(fresh_caches(model.modules()))
        stack.enter_context(keeping_activations(every=second_order))
        if second_order:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            from fastfip.fisher.second_order import CheapSecondOrder

            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(CheapSecondOrder())
        yield


@contextlib.contextmanager
def naming_checkpoints() -> Iterator[None]:
    """Say what is wrong where a graph of the user's cannot be gone through as often as it must be.

    Raises:
        ModelError: it was checkpointed in such a way.
    """
    try:
        yield
    except Exception as error:  # torch raises several kinds
        if not of_checkpointing(error):
            raise
        raise ModelError(
            "a part of the model is checkpointed in a way that lets its graph be read once only (gradient checkpointing"
            " with context_fn=, or composable): turn the checkpointing off, or take fisher_diagonal"
        ) from error


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()  # its flags() warns about devices that are not there
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def eagerly(compiled: bool) -> contextlib.AbstractContextManager[None]:
    """Run compiled code as what it was compiled from; a function of the user's may be compiled as well."""
    used = compiled or "torch._dynamo" in sys.modules  # torch.compile imports it, and little else does
    if not used or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
