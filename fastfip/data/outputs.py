"""What a model gives for a batch, found out by one run: finite outputs, and logits where it ends in a softmax.

Cross-entropy would apply a second softmax to probabilities, with hardly any gradient left. Their logarithm is right on
paper but not in floating point: a class of probability 0 has no gradient, 1/p^2 overflows in second derivatives, and
bfloat16 rounds every p > 0.998 to one, where the loss is zero. So the softmax of the forward pass is watched and what
went into it is taken; the logarithm only where none can be seen (compiled or scripted code, arithmetic after it).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import DataError, FastFIPError, ModelError, reason
from fastfip.nets.state import is_compiled

__all__ = [
    "binary_labels",
    "binary_task",
    "first_outputs",
    "is_one_logit",
    "logits_task",
    "looks_like_probabilities",
    "multi_label",
    "reading",
    "two_columns",
]

#: How far below the largest a masked logit is put: probability 4e-44.
LOWEST = 100.0

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


@contextlib.contextmanager
def reading(data: str) -> Iterator[None]:
    """Turn what a net raises on data that it does not fit into one error that names the data.

    Raises:
        ModelError: the block raised an error that is none of fastfip's.
    """
    try:
        yield
    except FastFIPError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"the model fails on a batch of {data} ({type(error).__name__}: {reason(error)})") from error


def first_outputs(
    model: nn.Module, forward: Callable[[nn.Module, Any], Tensor], batch: Any, data: str = "the clean data"
) -> Tensor:
    """Run the net once, without gradients; return its outputs, which are finite.

    Args:
        model: in eval mode.
        forward: `forward(model, batch) -> outputs`, e.g. `Task.forward`.
        batch: on the net's device.
        data: what errors call the data.

    Raises:
        ModelError: it fails on the batch, or gives NaN or Inf.
    """
    with reading(data), torch.no_grad():
        out = forward(model, batch)
    if not bool(torch.isfinite(out).all()):
        raise ModelError(f"the model's outputs on {data} are NaN or Inf: check its weights and how images are scaled")
    return out


def logits_task(model: nn.Module, task: Task, batch: Batch, outputs: Tensor) -> tuple[Task, str | None]:
    """Return a task that gives logits where `model` gives probabilities, and what a result should say about it.

    Args:
        model: the net; it is not changed.
        task: how it meets a batch. With a `forward=` of the user's, outputs are what that hook says they are.
        batch: one batch of clean data.
        outputs: `task.forward(model, batch)`, in eval mode.

    Returns:
        the given task and None where outputs are logits; else a task whose `forward` gives logits [N, C], equal to the
        logarithm of the probabilities up to a constant for each sample.
    """
    if task.forward_hook is not None or not looks_like_probabilities(outputs):
        return task, None
    given = None
    if not _is_opaque(model):
        with torch.no_grad():
            given = _SoftmaxInput.of(replace(task, most=None), model, batch)[1]
    way, how = (_log, "their logarithm") if given is None else (_watched, "what goes into it")
    said = f"the model gives probabilities (a softmax inside it): {how} is taken as logits"
    return replace(task, forward_hook=partial(way, task)), said


def two_columns(outputs: Tensor, probability: bool = False) -> Tensor:
    """Return the logits [N, 2] that say the same as one logit a sample, [N] or [N, 1]: 0 and z.

    Their cross-entropy is the binary cross-entropy of z. `probability`: the outputs are sigmoids of z.
    """
    z = outputs.reshape(len(outputs))
    if probability:
        z = torch.logit(z, eps=torch.finfo(z.dtype).eps)
    return torch.stack([torch.zeros_like(z), z], 1)


def is_one_logit(outputs: Tensor, n: int) -> bool:
    """Return whether outputs are one number for each of n samples."""
    return outputs.is_floating_point() and tuple(outputs.shape) in ((n,), (n, 1))


def binary_labels(y: Any, n: int) -> Tensor | None:
    """Return labels of two classes as int64 [n], from any dtype and [n] or [n, 1]; None: they are others."""
    if not isinstance(y, Tensor) or tuple(y.shape) not in ((n,), (n, 1)) or y.is_complex():
        return None
    return y.reshape(n).long() if bool(((y == 0) | (y == 1)).all()) else None


def binary_task(task: Task, outputs: Tensor, batch: Batch) -> Task | None:
    """Return the task of two classes that a model with one logit has; None where it has no such task.

    Without `loss=` one logit and labels 0 and 1 are enough. With it the losses have to be the binary cross-entropy of
    the outputs, as logits or as probabilities.

    Args:
        task: the user's.
        outputs: of the batch.
        batch: its labels may be of any dtype.

    Returns:
        a task whose logits are [N, 2], and whose loss is the cross-entropy with labels int64 [N].
    """
    n = task.size(batch)
    try:
        y = binary_labels(task.labels(batch), n) if is_one_logit(outputs, n) else None
    except DataError:
        return None
    if y is None:
        return None
    z, wanted, probability = outputs.detach().reshape(n), y.to(outputs), False
    if task.loss_hook is not None:
        losses = task.loss(outputs, batch).detach()
        inside = bool(((z >= 0) & (z <= 1)).all())
        probability = inside and _close(losses, F.binary_cross_entropy(z, wanted, reduction="none"))
        if not probability and not _close(losses, F.binary_cross_entropy_with_logits(z, wanted, reduction="none")):
            return None
    return Task(forward_hook=partial(_both_columns, task, probability))


def multi_label(task: Task, outputs: Tensor, batch: Batch) -> Tensor | None:
    """Return how many samples' worth of labels are right, where each sample has several of them, 0 or 1, [N, L].

    Known by the losses of `loss=`: the binary cross-entropy, its mean or sum over the labels. None: it is another task.
    """
    if task.loss_hook is None or outputs.dim() != 2:
        return None
    try:
        y = task.labels(batch)
    except DataError:  # only the user's hooks know where they are
        return None
    if y.shape != outputs.shape or not bool(((y == 0) | (y == 1)).all()):
        return None
    wanted, losses = y.to(outputs), task.loss(outputs, batch)
    ways: list[tuple[float, Any]] = [(0.0, F.binary_cross_entropy_with_logits)]
    if bool(((outputs >= 0) & (outputs <= 1)).all()):
        ways.append((0.5, F.binary_cross_entropy))
    for threshold, entropy in ways:
        each = entropy(outputs, wanted, reduction="none")
        if _close(losses, each.mean(1)) or _close(losses, each.sum(1)):
            return ((outputs > threshold) == (wanted > 0.5)).double().mean(1).sum()
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)


def _both_columns(task: Task, probability: bool, model: nn.Module, batch: Batch) -> Tensor:
    return two_columns(task.forward(model, batch), probability)


def _watched(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    outputs, given = _SoftmaxInput.of(replace(task, most=None), model, batch)
    return _log_of(outputs) if given is None else given


def _log(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    return _log_of(task.forward(model, batch))


def _log_of(p: Tensor) -> Tensor:
    return p.clamp_min(1e-30 if p.dtype == torch.float64 else torch.finfo(p.dtype).tiny).log()


def _is_opaque(model: nn.Module) -> bool:
    """Return whether the calls inside the model cannot be watched: compiled or scripted code."""
    return is_compiled(model) or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())


class _SoftmaxInput(TorchFunctionMode):
    """Keeps what goes into the softmax that is called last, and what comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.result: Any = None
        self.versions: tuple[int, ...] = (0, 0)

    @classmethod
    def of(cls, task: Task, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of a batch, and what their softmax was taken of; None where they come from elsewhere."""
        with cls() as watch:
            outputs = task.forward(model, batch)
        if watch.given is None or watch.result is not outputs or watch.versions != _versions(watch.given, outputs):
            return outputs, None  # nothing seen, or something was done to either of them afterwards
        return outputs, _finite(watch.given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            self.given, self.result = args[0] if args else kwargs["input"], result
            self.versions = _versions(self.given, result)
        return result


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place; inference tensors count nothing and cannot be told."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def _finite(logits: Tensor) -> Tensor:
    """Return logits with classes that are masked by -inf at a finite distance, where a loss has a gradient."""
    floor = logits.detach().amax(-1, keepdim=True) - LOWEST
    return torch.where(logits.detach() == -math.inf, floor, logits)


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Return whether outputs [N, C] are probabilities (a softmax inside the net) rather than logits.

    Every row is non-negative and sums to one within 1e-3. Cross-entropy would apply a second softmax to such outputs;
    `forward=lambda model, batch: model(batch[0]).clamp_min(1e-30).log()` gives log-probabilities, which are logits.
    """
    if outputs.dim() != 2 or outputs.shape[0] == 0 or outputs.shape[1] < 2:
        return False
    out = outputs.detach().float()
    return bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 1e-3).all())
