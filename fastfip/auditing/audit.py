"""`audit`: what an owner who does not know the trigger can find out about a model. Evidence, never a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastfip.auditing.anomaly import LEVEL, SMALLER, anomaly
from fastfip.auditing.result import Audit, NetAudit, Retuning
from fastfip.auditing.subject import Subject, about, subjects_of
from fastfip.data.batch import Batch, take
from fastfip.data.cleanset import CleanSet
from fastfip.data.outputs import first_outputs, reading
from fastfip.data.task import Forward, Loss, Task
from fastfip.errors import ConfigError, DataError, FastFIPError, ModelError, reason
from fastfip.fisher.sharpness import sharpness as measure_sharpness
from fastfip.methods.run import autocast_dtype
from fastfip.metrics.evaluation import evaluate
from fastfip.nets.checks import check_amp, check_net, check_seed, device_of, usable_device
from fastfip.nets.process import seeded
from fastfip.nets.state import copied, requires_grad
from fastfip.reporting.progress import Beat
from fastfip.worst_case.inversion import FORMS, Inverted, invert
from fastfip.worst_case.pixels import perturbable

__all__ = ["audit"]

#: Steps after which the re-tuning test looks.
LOOKS = (0, 1, 2, 5, 10, 20)


def audit(
    model: nn.Module,
    clean_loader: Iterable[Batch],
    *,
    purified: nn.Module | None = None,
    poisoned: Iterable[Batch] | None = None,
    asr_loader: Iterable[Batch] | None = None,
    forms: Sequence[str] = ("patch", "additive"),
    classes: Sequence[int] | None = None,
    reach: float = 0.9,
    steps: int = 100,
    samples: int = 1000,
    sharpness: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool | str = False,
    progress: Callable[[str], None] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Audit:
    """Look for signs of a backdoor with clean samples alone, before and after a purification.

    The models are not changed. For every class, the audit searches for the smallest change that sends most clean
    samples to this class when it is made to all of them, as a patch and as an additive pattern (see
    `fastfip.worst_case.inversion`). A backdoor is a shortcut, so its class needs a much smaller change than the others.
    A class is flagged if two things are true: in fewer than 5 % of clean models (over all forms) a class stands out as
    far by chance, and its change is at most half the median of the classes. Both numbers are fixed.

    Args:
        model: any model that classifies inputs of real numbers; if its weights are float16 or bfloat16, a copy in
            float32 is audited.
        clean_loader: as for `fastfip.purify`.
        purified: the model after purification. It gets the same search, and the changes found on `model` are tried on
            it.
        poisoned: a few triggered samples with the attacker's label, if you have some. The re-tuning test tunes a copy
            of the purified model (or of `model`, if there is none) on them and checks whether the backdoor comes back.
        asr_loader: other triggered samples, on which the re-tuning test measures (see `fastfip.evaluate`). None: half
            of `poisoned` is kept for this.
        forms: which forms of change are searched for.
        classes: labels to search for; None: all. Fewer than 5 can be ranked but not flagged.
        reach: share of the samples of other classes that a change must send to the class.
        steps: of each search.
        samples: largest number of clean samples that are used.
        sharpness: whether lambda_max, Tr(H) and Tr(F) are measured (on 128 samples).
        seed: seed of all random choices.
        device: where to compute; None: where the model is.
        amp: False, True, "bf16" or "fp16": autocast of the searches.
        progress: called with a line before each part, and while a search takes long.
        forward: as for `fastfip.purify`.
        loss: as for `fastfip.purify`; used by the sharpness.

    Returns:
        the evidence. It prints as a table, and `.plot("audit.png")` draws the changes. After Ctrl-C it holds the
        searches that were complete, if there are any.

    Raises:
        DataError: clean data that cannot be used.
        ModelError: a model that cannot be used, or a purified one of another form.
        ConfigError: a setting out of its range, or no such device.
        BackendError: a device that does not exist here.
    """
    start = time.perf_counter()
    seed = check_seed(seed)
    _check(forms, reach, steps, samples, amp)
    task = Task.of(forward, loss)
    say = progress or (lambda text: None)
    nets = {"received": model} if purified is None else {"received": model, "purified": purified}
    for name, net in nets.items():
        with about(name):
            check_net(net)
    device = device_of(model) if device is None else usable_device(device)
    notes: list[str] = []
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        clean = CleanSet.of(clean_loader, task)
        generator = torch.Generator().manual_seed(seed)
        clean = clean.subset(torch.randperm(clean.n, generator=generator)[:samples])
        batch = _one_batch(clean, task, device, notes)
        subjects = subjects_of(nets, clean, task, device, notes)
        received, last = subjects[0], subjects[-1]
        clean.check(received.classes)
        notes += clean.notes
        poison = None if poisoned is None else _Poison(last, task, poisoned, asr_loader, device, seed)
        searched = _classes(classes, received.classes)
        audits: dict[str, NetAudit] = {}
        retuning, interrupted = None, False
        try:
            for subject in subjects:
                name, net = subject.name, subject.model
                found = audits[name] = NetAudit(name, {}, {}, None)
                for form in forms if batch is not None else ():
                    what = f"{name} model: the smallest {form} change for each of {len(searched)} classes"
                    say(what)
                    one = invert(
                        net, subject.task, subject.given(batch), searched, form, reach=reach, steps=steps,
                        per_class=_per_class(len(searched)), check=48 if len(searched) <= 20 else 32,
                        amp=autocast_dtype(amp, device), seed=seed, watch=Beat(say, f"{what}, step", steps).at,
                    )  # fmt: skip
                    found.inverted[form] = one
                    found.anomaly[form] = anomaly(searched, one.size, one.reached)
                if sharpness:
                    say(f"{name} model: sharpness")
                    found.sharpness = _sharpness(net, clean, subject.task, device, seed, notes)
            if last is not received and batch is not None:
                for form, one in audits["received"].inverted.items():
                    audits["purified"].transfer[form] = _transfer(last.model, last.task, last.given(batch), one)
            if poison is not None:
                say("re-tuning test")
                retuning = _retune(last, clean, poison, device)
        except KeyboardInterrupt:
            audits = {name: found for name, found in audits.items() if found.inverted}
            if not audits:
                raise
            interrupted = True
            notes.append("interrupted: only the searches that were complete are shown")
    settings = {
        "reach": reach, "steps": steps, "samples": clean.n, "seed": seed, "level": LEVEL, "smaller": SMALLER,
        "device": str(device), "amp": amp, "classes": len(searched),
    }  # fmt: skip
    took = time.perf_counter() - start
    return Audit(audits["received"], audits.get("purified"), retuning, settings, took, notes, interrupted)


def _check(forms: Sequence[str], reach: float, steps: int, samples: int, amp: bool | str) -> None:
    for form in forms:
        if form not in FORMS:
            raise ConfigError(f"form {form!r}: must be one of {', '.join(FORMS)}")
    if not 0 < reach <= 1:
        raise ConfigError(f"reach={reach}: must be > 0 and <= 1")
    if steps < 1 or samples < 2:
        raise ConfigError(f"steps={steps}, samples={samples}: steps must be at least 1, and samples at least 2")
    check_amp(amp)


def _one_batch(clean: CleanSet, task: Task, device: torch.device, notes: list[str]) -> Any:
    """Return the clean samples as one batch on the device; None and a note where they cannot be changed."""
    from fastfip.data.batch import move_to

    try:
        batch = clean.tensors()
    except DataError as error:
        notes.append(f"no changes were looked for: {error}")
        return None
    if not perturbable(task, batch):
        notes.append(
            "no changes were looked for: the inputs are not real numbers in a field of a known name, such as x or image"
        )
        return None
    if clean.labels is None:
        notes.append("no changes were looked for: the labels are not class indices")
        return None
    bad = int((~torch.isfinite(task.inputs(batch)).flatten(1).all(1)).sum())
    if bad:
        raise DataError(f"{bad} of {clean.n} clean samples hold NaN or Inf: leave them out, or check their scaling")
    return move_to(batch, device)


def _classes(classes: Sequence[int] | None, count: int) -> list[int]:
    if classes is None:
        return list(range(count))
    chosen = list(dict.fromkeys(int(c) for c in classes))
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ConfigError(f"classes={chosen}: give labels from 0 to {count - 1}")
    return chosen


def _per_class(classes: int) -> int:
    """Samples a class and step: the more classes there are, the fewer, as each is one of many to compare with."""
    return min(16, max(4, 160 // classes))


def _sharpness(
    net: nn.Module, clean: CleanSet, task: Task, device: torch.device, seed: int, notes: list[str]
) -> dict[str, Any] | None:
    sample = clean.subset(torch.arange(min(128, clean.n)))
    try:
        with requires_grad(net.parameters(), True):
            return measure_sharpness(
                net, sample.batches(64, device=device), forward=task.forward, loss=task.loss_hook, iterations=20,
                tolerance=0.01, probes=5, seed=seed,
            ).to_dict()  # fmt: skip
    except (FastFIPError, RuntimeError, NotImplementedError) as error:
        notes.append(f"sharpness not measured: {reason(error)}")
        return None


@torch.no_grad()
def _transfer(net: nn.Module, task: Task, batch: Any, inverted: Inverted) -> list[float]:
    """Return for each class how often the change found on another net still sends samples there."""
    x, y = task.inputs(batch), task.labels(batch)
    out = []
    for k, c in enumerate(inverted.classes.tolist()):
        index = torch.nonzero(y != c).flatten()[:64]
        moved = task.replace_inputs(take(batch, index, len(y)), inverted.apply(x[index], k).to(x.dtype))
        out.append(float((task.forward(net, moved).argmax(1) == c).float().mean()))
    return out


class _Poison:
    """The samples of the re-tuning test, looked at before the search, which takes far longer.

    Attributes:
        bad: the samples to tune with. asr: of the net as it is. generator: of the order of clean samples.

    Raises:
        DataError: too few samples, labels that are none of the model's.
        ModelError: a net that fails on them, or has nothing to tune.
    """

    def __init__(
        self, subject: Subject, own: Task, poisoned: Any, asr_loader: Any, device: torch.device, seed: int
    ) -> None:
        self.subject, self.device = subject, device
        if not any(p.is_floating_point() for p in subject.model.parameters()):
            raise ModelError("the model has no parameters that the re-tuning test could tune: leave out poisoned=")
        bad = CleanSet.of(poisoned, own)
        if bad.labels is None or bad.n < 2:
            raise DataError("poisoned= needs at least 2 triggered samples with the attack's label")
        bad.check(subject.classes)
        for part in bad.batches(64, device=device):
            first_outputs(subject.model, subject.task.forward, part, "the poisoned samples")
        self.generator = torch.Generator().manual_seed(seed)
        look: Any = list(asr_loader) if isinstance(asr_loader, Iterator) else asr_loader
        if look is None:
            order = torch.randperm(bad.n, generator=self.generator)
            kept = bad.subset(order[bad.n // 2 :])
            bad, look = bad.subset(order[: bad.n // 2]), list(kept.batches(128))
        self.bad, self.look = bad, look
        self.asr = self.measure(subject.model)

    def measure(self, net: nn.Module) -> float:
        """Return the attack's success on the samples that are not tuned with."""
        task = self.subject.task
        with reading("asr_loader="):
            measured = evaluate(net, None, self.look, forward=task.forward, loss=task.loss_hook, device=self.device)
        return math.nan if measured.asr is None else measured.asr


def _retune(subject: Subject, clean: CleanSet, poison: _Poison, device: torch.device) -> Retuning:
    """Tune with clean and poisoned samples and look how the attack's success goes."""
    task, bad = subject.task, poison.bad
    net = copied(subject.model, "the re-tuning test works on a copy")
    for p in net.parameters():
        p.requires_grad_(p.is_floating_point())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    good: Iterator[Batch] = iter(())
    course = [(0, poison.asr)]
    for step in range(1, max(LOOKS) + 1):
        batch = next(good, None)
        if batch is None:
            good = clean.batches(min(64, clean.n), shuffle=True, generator=poison.generator, device=device, smallest=2)
            batch = next(good)
        optimizer.zero_grad()
        task.loss(task.forward(net, batch), batch).mean().backward()
        for part in bad.batches(64, device=device):
            share = task.size(part) / bad.n
            (share * task.loss(task.forward(net, part), part).mean()).backward()
        optimizer.step()
        if step in LOOKS:
            course.append((step, poison.measure(net)))
    return Retuning(tuple(course), bad.n)
