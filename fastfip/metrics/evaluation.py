"""How a net does on clean and on triggered images: ACC, ASR, RA, and what a defence changed: DER, RIR.

All are fractions in [0, 1]; `str()` of an evaluation shows per cent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch, move_to, to_tensors
from fastfip.data.outputs import binary_task, is_one_logit, multi_label, reading, two_columns
from fastfip.data.task import Forward, Loss, Task, check_labels, iter_batches
from fastfip.errors import DataError, ModelError
from fastfip.nets.checks import device_of, usable_device
from fastfip.nets.state import eval_mode

__all__ = [
    "Evaluation",
    "accuracy",
    "attack_success_rate",
    "binomial_tail",
    "der",
    "evaluate",
    "rir",
    "robust_accuracy",
    "wilson",
]

#: Fewer samples than that, and a share of them is shown with its interval.
FEW = 200

#: Fields of a dict batch of triggered images that hold the true label; the attack's is where labels always are.
TRUE_LABEL_KEYS = ("true_label", "true_labels", "original_label", "original_labels", "original_target")


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where it could not be.

    Attributes:
        acc: clean accuracy. loss: mean clean loss. n: clean samples. on: what they were.
        asr: attack success rate, never over images of the target class. ra: robust accuracy, the share of the same
            triggered images that get their true label. n_triggered: how many they are.
        per_class: (label, clean samples answered rightly, clean samples) of each class that has some.
        fisher_trace: Tr(F) on clean samples in eval mode. notes: what could not be known.
    """

    acc: float | None = None
    asr: float | None = None
    ra: float | None = None
    loss: float | None = None
    fisher_trace: float | None = None
    n: int = 0
    n_triggered: int = 0
    on: str = "test_loader"
    notes: tuple[str, ...] = ()
    per_class: tuple[tuple[int, int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {**self.__dict__, "notes": list(self.notes), "per_class": [list(row) for row in self.per_class]}

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the interval of 95 % confidence of "acc", "asr" or "ra" (see `wilson`); None: not measured."""
        value = getattr(self, name)
        n = self.n if name == "acc" else self.n_triggered
        return None if value is None or n == 0 else wilson(value, n)

    def shown(self, name: str) -> str:
        """Return "acc", "asr" or "ra" as text, with its interval where it rests on fewer than 200 samples."""
        value, around = getattr(self, name), self.interval(name)
        if value is None:
            return "-"
        few = around is not None and (self.n if name == "acc" else self.n_triggered) < FEW
        return f"{100 * value:.2f} %" + (f" ({100 * around[0]:.1f} to {100 * around[1]:.1f})" if few and around else "")

    def __str__(self) -> str:
        parts = [
            f"{word} {self.shown(word.lower())}" for word in ("ACC", "ASR", "RA") if self.shown(word.lower()) != "-"
        ]
        parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
        parts += [f"Tr(F) {self.fisher_trace:.4g}"] if self.fisher_trace is not None else []
        return ", ".join(parts) or "nothing measured"


class _Measured(Protocol):
    @property
    def acc(self) -> float | None: ...
    @property
    def asr(self) -> float | None: ...
    @property
    def ra(self) -> float | None: ...


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a share that was seen in n samples (Wilson 1927): of 95 % confidence, by default.

    Args:
        share: in [0, 1].
        n: samples, at least 1.
        z: standard errors of a normal distribution within which the share lies.
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_tail(k: int, n: int, p: float) -> float:
    """Return the probability of k or more successes in n trials of probability p, 0 < p < 1."""
    ways = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k, n + 1))
    terms = (math.exp(w + i * math.log(p) + (n - i) * math.log1p(-p)) for i, w in enumerate(ways, start=k))
    return min(1.0, math.fsum(terms))


def der(before: _Measured, after: _Measured) -> float:
    """Return the defence effectiveness rating, [max(0, dASR) - max(0, dACC) + 1] / 2, drops d = before - after.

    1: the backdoor is gone at no cost; 0.5: nothing changed. Zhu et al., FT-SAM (arXiv 2304.11823).

    Raises:
        DataError: ACC or ASR was not measured.
    """
    return (max(0.0, _value(before, "asr") - _value(after, "asr")) - _lost(before, after) + 1) / 2


def rir(before: _Measured, after: _Measured) -> float:
    """Return the robust improvement rating, [max(0, -dRA) - max(0, dACC) + 1] / 2, drops d = before - after.

    Accuracy lost counts against a defence; the function released with the benchmark adds it instead. BackdoorBench
    (arXiv 2407.19845).

    Raises:
        DataError: ACC or RA was not measured.
    """
    return (max(0.0, _value(after, "ra") - _value(before, "ra")) - _lost(before, after) + 1) / 2


def _lost(before: _Measured, after: _Measured) -> float:
    return max(0.0, _value(before, "acc") - _value(after, "acc"))


def _value(of: _Measured, name: str) -> float:
    value: float | None = getattr(of, name)
    if value is None:
        raise DataError(f"{name.upper()} was not measured: pass {'test_loader' if name == 'acc' else 'asr_loader'}=")
    return value


def evaluate(
    model: nn.Module,
    test_loader: Iterable[Batch] | None = None,
    asr_loader: Iterable[Batch] | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    target: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Measure a net on clean and on triggered images, in eval mode; the model is left as it was.

    Args:
        model: a classifier with logits [N, C].
        test_loader: clean batches `(x, y, ...)`; None: ACC and loss are None.
        asr_loader: triggered images. Its batches, the attack's label being the class that the attacker wants, may be:
            - `(x, attack label, true label)`;
            - BackdoorBench's five: `(x, attack label, index, poison indicator, true label)`, of which those with
              indicator 0 carry no trigger and are passed over;
            - `(x, attack label)`: the images of the target class must have been removed already, and there is no RA;
            - with `target=`: `(x, true label)`;
            - a dict with the attack's label where labels are and the true one as `true_label` or `original_label`.
            Images whose true label is the attack's are left out.
        forward: `forward(model, batch) -> logits`, see `fastfip.data.Task`.
        loss: `loss(logits, batch) -> Tensor [N]`, used for `loss` only.
        target: the attack's label where the batches do not hold it.
        device: where to compute; None: where the model is.

    Raises:
        DataError: an empty loader, labels that are no class indices or out of range, a batch of another form.
        ModelError: the model fails on a batch.
        ConfigError: no such kind of device. BackendError: a device that is not here.
    """
    task = Task.of(forward, loss)
    notes: list[str] = []
    acc = mean = asr = ra = None
    n = triggered = 0
    tally: list[Tensor] = []
    with _evaluating(model, device) as run_device:
        if test_loader is not None:
            acc, mean, n = _clean(model, test_loader, task, run_device, notes, tally)
            if acc is None:
                notes.append("labels or outputs are no class indices: ACC not measured, only the loss")
        if asr_loader is not None:
            asr, ra, triggered = _triggered(model, asr_loader, task, target, run_device, notes)
        else:
            notes.append("no trigger given: ASR not measured")
    right, samples = tally[0].tolist() if tally else ((), ())
    classes = tuple((label, *pair) for label, pair in enumerate(zip(right, samples)) if pair[1])
    return Evaluation(acc, asr, ra, mean, None, n, triggered, notes=tuple(notes), per_class=classes)


def accuracy(model: nn.Module, test_loader: Iterable[Batch], *, forward: Forward | None = None) -> float:
    """Return the share of clean samples that get their label; see :func:`evaluate`."""
    with _evaluating(model, None) as where:
        return float(_clean(model, test_loader, Task.of(forward), where, [], [])[0] or 0.0)


def attack_success_rate(
    model: nn.Module, asr_loader: Iterable[Batch], *, target: int | None = None, forward: Forward | None = None
) -> float:
    """Return the share of triggered images of other classes that get the attack's label; see :func:`evaluate`."""
    with _evaluating(model, None) as where:
        return _triggered(model, asr_loader, Task.of(forward), target, where, [])[0]


def robust_accuracy(
    model: nn.Module, asr_loader: Iterable[Batch], *, target: int | None = None, forward: Forward | None = None
) -> float:
    """Return the share of triggered images of other classes that get their true label; see :func:`evaluate`.

    Raises:
        DataError: the batches hold no true labels.
    """
    with _evaluating(model, None) as where:
        ra = _triggered(model, asr_loader, Task.of(forward), target, where, [])[1]
    if ra is None:
        raise DataError("robust accuracy needs true labels: give (x, attack label, true label) or target=")
    return ra


@contextlib.contextmanager
def _evaluating(model: nn.Module, wanted: torch.device | str | None) -> Iterator[torch.device]:
    """Eval mode without gradients; training flags and device are restored."""
    own_device = device_of(model)
    device = own_device if wanted is None else usable_device(wanted)
    with eval_mode(model), torch.no_grad():
        try:
            if device != own_device:
                model.to(device)
            yield device
        finally:
            if device != own_device:
                model.to(own_device)


def _logits_shape(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ModelError(f"accuracy needs logits [N, C] with C > 1, the model gave {list(logits.shape)}: pass forward=")
    return logits


def _count(tally: list[Tensor], right: Tensor, y: Tensor, classes: int) -> Tensor:
    """Add to the tally, [2, C], what is right and all there is of each class; return how many are right."""
    new = torch.zeros(2, classes, dtype=torch.int64, device=y.device)
    new.index_add_(1, y, torch.stack([right.long(), torch.ones_like(y)]))
    tally[:] = [new + old for old in tally] or [new]
    return right.sum()


def _clean(
    model: nn.Module, loader: Iterable[Batch], task: Task, device: torch.device, notes: list[str], tally: list[Tensor]
) -> tuple[float | None, float, int]:
    right: Tensor | float = 0.0
    total: Tensor | float = 0.0
    n = 0
    for number, given in enumerate(iter_batches(loader, task), 1):
        batch = move_to(given, device)
        with reading(f"test_loader= (batch {number})"):
            logits = task.forward(model, batch)
        size = task.size(given)
        hits, losses = _answers(logits, batch, size, task, notes, tally)
        right = float("nan") if hits is None else right + hits
        total = total + losses.double().sum()
        n += size
    acc = float(right) / n
    return None if math.isnan(acc) else acc, float(total) / n, n


def _answers(
    logits: Tensor, batch: Batch, n: int, task: Task, notes: list[str], tally: list[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """Return how many of n samples are answered rightly (None: it cannot be told) and the losses [n]."""
    two = binary_task(task, logits, batch) if is_one_logit(logits, n) else None
    if two is not None:
        columns = two.forward_hook(lambda _: logits, batch)  # type: ignore[misc, arg-type]  # of outputs that are known
        y = task.labels(batch).reshape(n).long().to(logits.device)
        return _count(tally, columns.argmax(1) == y, y, 2), F.cross_entropy(columns, y, reduction="none")
    y_or_none = _class_labels(batch, logits, task)
    losses = task.loss(logits, batch)
    if y_or_none is not None:
        y = y_or_none.to(logits.device).long()
        return _count(tally, logits.argmax(1) == y, y, logits.shape[1]), losses
    each = multi_label(task, logits, batch)
    if each is not None and (said := "several labels a sample: ACC is the share of labels that are right") not in notes:
        notes.append(said)
    return each, losses


def _class_labels(batch: Batch, logits: Tensor, task: Task) -> Tensor | None:
    """The labels [N], checked against logits [N, C]; None where `loss=` gives sense to something else."""
    try:
        y = task.labels(batch)
        check_labels(y, logits.shape[1] if logits.dim() == 2 else None)
    except DataError:
        if task.loss_hook is None:
            raise
        return None
    if logits.dim() == 2 and logits.shape[1] > 1 and len(y) == len(logits):
        return y
    if task.loss_hook is None:
        _logits_shape(logits)
    return None


def _triggered(
    model: nn.Module,
    loader: Iterable[Batch],
    task: Task,
    target: int | None,
    device: torch.device,
    notes: list[str],
) -> tuple[float, float | None, int]:
    hit: Tensor | float = 0.0
    kept: Tensor | float = 0.0
    n, seen, blind = 0, 0, False
    # The hook of the user knows the clean batches; without it a dict's true labels must not reach the model.
    for number, raw in enumerate(iter_batches(loader, Task(task.forward_hook, _no_loss)), 1):
        batch, attack, true, counts = _read(raw, task, target)
        seen += len(attack)
        blind = blind or true is None
        with reading(f"asr_loader= (batch {number})"):
            logits = task.forward(model, move_to(batch, device))
        logits = two_columns(logits) if is_one_logit(logits, len(attack)) else _logits_shape(logits)
        for y in (attack, *([] if true is None else [true])):
            check_labels(y, logits.shape[1])
        if true is not None:
            counts = counts & (true != attack)
        got = logits.argmax(1).cpu()[counts]
        hit = hit + (got == attack[counts]).sum()
        if true is not None:
            kept = kept + (got == true[counts]).sum()
        n += int(counts.sum())
    if n == 0:
        raise DataError(f"no triggered image counts: all {seen} are of the attack's own class or carry no trigger")
    if blind:
        notes.append("no true labels with the triggered images: RA not measured, target class taken as removed already")
    return float(hit) / n, None if blind else float(kept) / n, n


def _no_loss(logits: Tensor, batch: Batch) -> Tensor:
    raise NotImplementedError


def _read(batch: Batch, task: Task, target: int | None) -> tuple[Batch, Tensor, Tensor | None, Tensor]:
    """(batch for the model, attack label [N], true label [N] or None, which carry a trigger [N])."""
    first = task.labels(batch)
    check_labels(first)
    true: Tensor | None = None
    indicator: Tensor | None = None
    if isinstance(batch, Mapping):
        key = next((k for k in TRUE_LABEL_KEYS if k in batch), None)
        true = None if key is None else to_tensors(batch[key])
        batch = {k: v for k, v in batch.items() if k != key}
    elif len(batch) == 3:
        true = batch[2]
    elif len(batch) == 5:
        indicator, true = batch[3], batch[4]
    elif len(batch) != 2:
        raise DataError(
            f"a triggered batch of {len(batch)} items: give (x, attack label, true label), (x, attack label), or "
            "BackdoorBench's five (x, attack label, index, poison indicator, true label)"
        )
    if target is not None:
        true = first if true is None else true
        first = torch.full_like(true, target)
    if true is not None:
        if not isinstance(true, Tensor):
            raise DataError("the true labels of triggered images must be a tensor [N] of class indices")
        check_labels(true)
        true = true.long().cpu()
    counts = torch.ones(len(first), dtype=torch.bool)
    if isinstance(indicator, Tensor) and indicator.shape == first.shape:
        counts = indicator.cpu() != 0
    return batch, first.long().cpu(), true, counts
