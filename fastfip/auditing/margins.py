"""The largest margin that each class can reach: a sign of a backdoor that needs no trigger and hardly any data.

A model that was trained to answer the target whatever else an image shows is surer of that class than of any other,
somewhere among all inputs (maximum margin statistics, MM-BD, Wang et al., S&P 2024, arXiv 2205.06900).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.auditing.anomaly import Anomaly, anomaly
from fastfip.auditing.subject import Subject, subjects_of
from fastfip.data.batch import Batch, move_to, take
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Forward, Task
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.nets.checks import check_net, check_seed, device_of, usable_device
from fastfip.nets.process import seeded
from fastfip.nets.state import requires_grad
from fastfip.reporting.table import Report, Sheet
from fastfip.worst_case.pixels import PixelRange, perturbable

__all__ = ["SUSPICIOUS", "Margins", "margins"]

#: From this score on a model is called suspicious. It was set on development networks and then left alone.
SUSPICIOUS = 1.4
#: Steps of the ascent, the first one's length (over the diagonal of the range of inputs), and the share of the old
#: direction that is kept.
STEPS, STEP, MOMENTUM = 40, 0.03, 0.8
#: Starts a class; the second number from so many classes on.
STARTS, FEW_STARTS, MANY = 4, 2, 21
#: Inputs that go through the model at a time.
CHUNK = 128
#: Margins below this are counted as this: a class that no input reaches.
LEAST = 1e-3


@dataclass
class Margins(Report):
    """How sure a model can be made of each class.

    Attributes:
        margin: by class, the largest logit_c - max_{k != c} logit_k that was found.
        ranking: how the classes rank; the ratio is that of the median to the first.
        score: index of the first class times the logarithm of its margin over the median: how rare, times how large.
        settings: samples, seed, starts, steps, threshold. seconds: that it took. notes: what was done to the model.
    """

    margin: tuple[float, ...]
    ranking: Anomaly
    settings: dict[str, Any]
    seconds: float
    notes: list[str]

    @property
    def score(self) -> float:
        """Return the score; 0 where the classes have no spread."""
        return self.ranking.index[0] * -math.log(self.ranking.ratio)

    @property
    def suspicious(self) -> bool:
        """Return whether the score is above the threshold, which says nothing where there are under five classes."""
        return not self.ranking.why_not and self.score >= SUSPICIOUS

    def table(self, most: int = 5) -> Sheet:
        """Return the classes of the largest margins, as a table that prints."""
        first = self.ranking.classes[0]
        rows = [
            [f"{c}", f"{self.margin[c]:.3g}", f"{index:.2f}"]
            for c, index in zip(self.ranking.classes[:most], self.ranking.index)
        ]
        said = "suspicious" if self.suspicious else self.ranking.why_not or "nothing stands out"
        lines = [f"class {first} is first, score {self.score:.2f} (suspicious from {SUSPICIOUS}): {said}"]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("This is evidence, not a certificate: it cannot find backdoors that have no single target class.")
        return Sheet(f"Largest margins, {self.seconds:.0f} s", ["class>", "margin>", "index>"], rows, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "margin": list(self.margin), "ranking": asdict(self.ranking), "score": self.score,
            "suspicious": self.suspicious, "settings": self.settings, "seconds": self.seconds,
            "notes": list(self.notes),
        }  # fmt: skip


def margins(
    model: nn.Module,
    clean_loader: Iterable[Batch],
    *,
    samples: int = 500,
    seed: int = 0,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
) -> Margins:
    """Look for the input that each class is surest of, and whether one class is far surer than the others.

    The model is not changed. The search starts from noise in the range of the clean inputs, and raises the margin of
    each class by gradient steps of falling length. It uses only the range of the clean inputs, and no labels. (MM-BD
    has 30 starts in [0, 1], steps of fixed size until they converge, and a null distribution fitted to the other
    classes.)

    Args:
        model: as for `fastfip.audit`.
        clean_loader: as for `fastfip.purify`, with labels, which are not used.
        samples: largest number of clean samples that give the range.
        seed: seed of the starting points.
        device: where to compute; None: where the model is.
        forward: as for `fastfip.purify`.

    Raises:
        DataError: clean data that cannot be used.
        ModelError: a model that cannot be used.
        ConfigError: `samples` is not a number of samples. BackendError: a device that does not exist here.
    """
    start = time.perf_counter()
    seed = check_seed(seed)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigError(f"samples={samples!r}: give a whole number, 1 or more")
    check_net(model)
    device = device_of(model) if device is None else usable_device(device)
    task, notes = Task.of(forward), list[str]()
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        generator = torch.Generator().manual_seed(seed)
        clean = CleanSet.of(clean_loader, task)
        clean = clean.subset(torch.randperm(clean.n, generator=generator)[:samples])
        batch = move_to(clean.tensors(), device)
        if not perturbable(task, batch):
            raise DataError("margins need inputs that are real numbers, in a field of a known name such as x or image")
        if not bool(torch.isfinite(task.inputs(batch)).all()):
            raise DataError("some clean samples hold NaN or Inf: leave them out, or check their scaling")
        subject = subjects_of({"received": model}, clean, task, device, notes)[0]
        starts = STARTS if subject.classes < MANY else FEW_STARTS
        with requires_grad(subject.model.parameters(), False):
            found = _ascended(subject, subject.given(batch), starts, generator)
    ranking = anomaly(range(subject.classes), 1 / found.clamp_min(LEAST), torch.ones(len(found), dtype=torch.bool))
    settings = {
        "samples": clean.n, "seed": seed, "starts": starts, "steps": STEPS, "suspicious": SUSPICIOUS,
        "device": str(device),
    }  # fmt: skip
    return Margins(tuple(found.tolist()), ranking, settings, time.perf_counter() - start, notes)


def _ascended(subject: Subject, batch: Batch, starts: int, generator: torch.Generator) -> Tensor:
    """Return the largest margin [C] over starts and steps."""
    x = subject.task.inputs(batch).detach()
    n, wide = len(x), torch.promote_types(x.dtype, torch.float32)
    limits = PixelRange.of_inputs(x.to(wide))
    diagonal = float(limits.span.expand(1, *x.shape[1:]).square().sum().sqrt())
    classes = torch.arange(subject.classes, device=x.device).repeat_interleave(starts)
    out = []
    for c in classes.split(CHUNK):
        noise = torch.rand(len(c), *x.shape[1:], generator=generator, device="cpu", dtype=torch.float32)
        z = limits.low + limits.span * noise.to(x.device, wide)
        given = take(batch, torch.arange(len(c), device=x.device) % n, n)
        course, best = torch.zeros_like(z), torch.full((len(c),), -math.inf, device=x.device, dtype=torch.float32)
        for step in range(STEPS):
            z.requires_grad_(True)
            logits = subject.task.forward(subject.model, subject.task.replace_inputs(given, z.to(x.dtype))).float()
            margin = _margin(logits, c)
            if not margin.requires_grad:
                raise ModelError(
                    "the search needs the gradient of the inputs, and the model passes none to them (it is quantised, "
                    "or runs under no_grad): give the model in floating point"
                )
            (gradient,) = torch.autograd.grad(margin.sum(), z)
            best = torch.maximum(best, margin.detach())
            size = gradient.flatten(1).norm(dim=1).clamp_min(1e-20).reshape(-1, *[1] * (z.dim() - 1))
            course = MOMENTUM * course + gradient / size
            z = limits.clamp(z.detach() + STEP * diagonal * (1 - step / STEPS) * course)
        out.append(best)
    return torch.cat(out).reshape(subject.classes, starts).amax(1).cpu()


def _margin(logits: Tensor, c: Tensor) -> Tensor:
    """Return logit_c - max_{k != c} logit_k of logits [N, C], for c [N]."""
    own = nn.functional.one_hot(c, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -math.inf).amax(1)
