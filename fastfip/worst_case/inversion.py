"""Inverted triggers: for every class the smallest universal change of clean inputs that sends most of them there.

A backdoor is a shortcut, so the class it leads to is reached by a smaller change than the others are. Two forms of
change are looked for, as triggers come in two: a small additive pattern over the whole input, and a patch, x (1 - m) +
p m with a small mask m (Neural Cleanse, Wang et al., S&P 2019). All classes are searched at once, on clean data alone.

Index letters: `n` sample, `c` class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.errors import DataError, ModelError
from fastfip.nets.state import requires_grad
from fastfip.worst_case.pixels import PixelRange, typical_norm

__all__ = ["FORMS", "Additive", "Inverted", "Patch", "TriggerForm", "invert"]


@dataclass(frozen=True)
class Inverted:
    """What one search found.

    C counts the classes that were searched.

    Attributes:
        form: "additive" or "patch". classes: [C] their labels.
        size: [C] size of the change at which `reach` of the samples go to the class: L2 norm in units of a typical
            input's (sqrt(d) times the standard deviation of the inputs), or number of positions that the mask covers.
        success: [C] share of the samples of other classes that go there, at that size. reached: [C] whether it is
            `reach`; where it is not, `size` is the largest that was tried.
        moved: [C, *input] the mean clean input with the change on it. base: [*input] the mean clean input.
        mask: [C, 1, ...] of the patch, None for the additive form.
        apply: `apply(x, k)` puts the change of the k-th class, at its size, on inputs x.
    """

    form: str
    classes: Tensor
    size: Tensor
    success: Tensor
    reached: Tensor
    moved: Tensor
    base: Tensor
    mask: Tensor | None
    apply: Callable[[Tensor, int], Tensor]


class TriggerForm(ABC):
    """One form of change, with parameters for every class."""

    name: ClassVar[str]

    def __init__(self, x: Tensor) -> None:
        self.range = PixelRange.of_inputs(x)
        self.unit = typical_norm(x)

    parameters: list[Tensor]

    @abstractmethod
    def apply(self, x: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        """Return x [N, ...] changed by the change of the c-th class [N], enlarged `scale` [N] times."""

    @abstractmethod
    def size(self, scale: Tensor | float = 1.0) -> Tensor:
        """Return the size [C] of the changes, enlarged `scale` times."""

    @abstractmethod
    def step(self, reached: Tensor, left: float) -> None:
        """Move by the gradient: smaller where the class is reached [C], larger where not; `left` falls from 1 to 0."""

    def mask(self, scale: Tensor) -> Tensor | None:
        """Return the mask, where the form has one."""
        return None


class Additive(TriggerForm):
    """x + delta, kept in the range that the clean inputs span.

    The direction of delta follows the gradient and its norm is set apart (Rony et al., CVPR 2019). Steps of Adam are
    alike in every coordinate: a change that needs only a few of them came out twice as large as it has to be after
    100 steps, no smaller than those of other classes.
    """

    name = "additive"

    def __init__(self, x: Tensor, classes: int, generator: torch.Generator) -> None:
        super().__init__(x)
        start = torch.randn(classes, *x.shape[1:], generator=generator, device="cpu", dtype=torch.float32).to(x)
        spread = self.unit / math.sqrt(x[0].numel())
        self.delta = (1e-3 * spread * start).requires_grad_(True)
        self.parameters = [self.delta]
        self.norm = torch.full((classes,), 0.1 * self.unit, dtype=x.dtype, device=x.device)
        # Larger than a change of everything by the whole range is pointless.
        self.largest = float(self.range.span.expand(1, *x.shape[1:]).square().sum().sqrt())
        self.course = torch.zeros_like(self.delta)

    def apply(self, x: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        """Return x + scale * delta_c, clamped."""
        moved = x + _like(scale, x) * self.delta[c]
        return self.range.clamp(moved)

    def size(self, scale: Tensor | float = 1.0) -> Tensor:
        """Return the L2 norm over that of a typical input."""
        return _norm(self.delta) * scale / self.unit

    def step(self, reached: Tensor, left: float) -> None:
        """Turn delta by at most a fifth of its norm, and shrink or enlarge the norm by at most a twentieth."""
        gradient = self.delta.grad
        assert gradient is not None
        pace = math.sin(math.pi / 2 * left)
        with torch.no_grad():
            self.course.lerp_(gradient / _like(_norm(gradient), gradient), 0.5)
            moved = self.delta - _like(0.2 * pace * self.norm / _norm(self.course), gradient) * self.course
            self.norm = (self.norm * torch.where(reached, 1 - 0.05 * pace, 1 + 0.05 * pace)).clamp(max=self.largest)
            self.delta.copy_(moved * _like(self.norm / _norm(moved), moved))


class Patch(TriggerForm):
    """(1 - m) x + m p: mask and pattern in the range of the clean inputs; one mask value for all channels."""

    name = "patch"

    def __init__(self, x: Tensor, classes: int, generator: torch.Generator) -> None:
        super().__init__(x)
        shape = (classes, 1, *x.shape[2:]) if x.dim() > 2 else (classes, *x.shape[1:])
        draw = lambda shape: torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(x)  # noqa: E731
        self.mask_logits = (0.1 * draw(shape) - 2.0).requires_grad_(True)
        self.pattern_logits = (0.1 * draw((classes, *x.shape[1:]))).requires_grad_(True)
        self.parameters = [self.mask_logits, self.pattern_logits]
        self.usual = float(self.size().detach().mean())  # by which the penalty is scaled
        # Strong at first and falling: from below, a change is never large in places that it does not need.
        self.weight = torch.full((classes,), 10.0, device=x.device, dtype=torch.float32)
        self.adam = torch.optim.Adam(self.parameters, lr=0.1, betas=(0.5, 0.9))

    def apply(self, x: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        """Return the inputs with the patch of class c on them."""
        m = (self.mask_logits.sigmoid()[c] * _like(scale, x)).clamp(max=1)
        return x + m * (self.range.low + self.range.span * self.pattern_logits.sigmoid()[c] - x)

    def size(self, scale: Tensor | float = 1.0) -> Tensor:
        """Return the sum of the mask."""
        m = self.mask_logits.sigmoid().flatten(1)
        return (m * (scale[:, None] if isinstance(scale, Tensor) else scale)).clamp(max=1).sum(1)

    def step(self, reached: Tensor, left: float) -> None:
        """Let Adam make a step on the loss and the penalty, whose weight rises while the class is reached."""
        (self.weight * self.size() / self.usual).sum().backward()
        self.adam.step()
        self.weight = torch.where(reached, self.weight * 1.2, self.weight / 1.2).clamp(1e-4, 1e4)

    def mask(self, scale: Tensor) -> Tensor:
        """Return the mask."""
        return (self.mask_logits.sigmoid() * _like(scale, self.mask_logits)).clamp(max=1)


FORMS: dict[str, type[Additive] | type[Patch]] = {form.name: form for form in (Additive, Patch)}


def invert(
    model: nn.Module,
    task: Task,
    batch: Batch,
    classes: Sequence[int],
    form: str = "patch",
    *,
    reach: float = 0.9,
    steps: int = 100,
    per_class: int = 16,
    check: int = 48,
    chunk: int = 512,
    amp: torch.dtype | None = None,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Inverted:
    """Look for the smallest change of one form for every class.

    For each class the cross-entropy towards it is minimised while the size is pressed down as long as the class is
    reached and let go while it is not: for patches by a penalty with Adam (Neural Cleanse, sec. 4), for additive
    changes by setting their norm. Then the changes are scaled, class by class, to the size at which just `reach` of the
    samples go there, so that sizes are compared at equal success.

    Args:
        model: in eval mode; its parameters get no gradient.
        task: how batch and model meet.
        batch: clean samples, in one batch.
        classes: the labels to search for.
        form: see `FORMS`.
        reach: share of the samples of other classes that must go to the class.
        steps: of the search.
        per_class: samples a class and step.
        check: samples a class on which the size is measured.
        chunk: samples that go through the net at a time.
        amp: dtype of autocast; None: none.
        seed: of samples and starting points.
        watch: called with the number of steps that are done.

    Raises:
        DataError: samples of one class alone.
        ModelError: a net that passes no gradient to its inputs.
    """
    search = _Search(model, task, batch, classes, form, reach, chunk, amp, torch.Generator().manual_seed(seed))
    with requires_grad(model.parameters(), False):
        with torch.enable_grad():
            search.run(steps, per_class, watch or (lambda step: None))
        with torch.no_grad():
            return search.measure(check)


class _Search:
    """The search under way."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        classes: Sequence[int],
        form: str,
        reach: float,
        chunk: int,
        amp: torch.dtype | None,
        generator: torch.Generator,
    ) -> None:
        self.model, self.task, self.batch, self.classes = model, task, batch, len(classes)
        self.reach, self.chunk, self.amp, self.generator = reach, chunk, amp, generator
        x = task.inputs(batch).detach()
        # The steps of a change are too small for 16 bits; the net gets its inputs in their own dtype.
        self.x, self.y, self.dtype = x.to(torch.promote_types(x.dtype, torch.float32)), task.labels(batch), x.dtype
        self.label = torch.tensor(list(classes), device=self.x.device)
        self.form = FORMS[form](self.x, len(classes), generator)
        self.others = [torch.nonzero(self.y.cpu() != c).flatten() for c in classes]
        if not all(len(others) for others in self.others):
            raise DataError("all clean samples are of one class: samples of other classes are needed")

    def draw(self, count: int) -> Tensor:
        """Return samples for each class that are not of it, [C, count], as indices."""
        picked = [o[torch.randint(len(o), (count,), generator=self.generator, device="cpu")] for o in self.others]
        return torch.stack(picked).to(self.x.device)

    def logits(self, index: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        """Return the logits of samples [N] with the changes of the classes c [N]."""
        moved = self.form.apply(self.x[index], c, scale)
        batch = self.task.replace_inputs(take(self.batch, index, len(self.y)), moved.to(self.dtype))
        with torch.autocast(self.x.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.task.forward(self.model, batch).float()

    def run(self, steps: int, per_class: int, watch: Callable[[int], None]) -> None:
        """Minimise."""
        form, C = self.form, self.classes
        device = self.x.device
        success = torch.zeros(C, device=device, dtype=torch.float32)
        best = [p.detach().clone() for p in form.parameters]
        smallest = torch.full((C,), math.inf, device=device, dtype=torch.float32)
        c_all = torch.arange(C, device=device).repeat_interleave(per_class)
        for step in range(steps):
            watch(step)
            index = self.draw(per_class).flatten()
            for p in form.parameters:
                p.grad = None
            hits = torch.zeros(C, device=device, dtype=torch.float32)
            for part in torch.arange(len(index), device=device).split(self.chunk):
                c = c_all[part]
                unscaled = torch.ones(len(part), device=device, dtype=torch.float32)
                logits, wanted = self.logits(index[part], c, unscaled), self.label[c]
                if logits.requires_grad:
                    (nn.functional.cross_entropy(logits, wanted, reduction="sum") / per_class).backward()
                if any(p.grad is None for p in form.parameters):
                    raise ModelError(
                        "the search needs the gradient of the inputs, and the model passes none to them (it is "
                        "quantised, or runs under no_grad): give the model in floating point"
                    )
                hits.index_add_(0, c, (logits.detach().argmax(1) == wanted).float())
            size = form.size().detach()
            success = 0.7 * success + 0.3 * hits / per_class
            reached = success >= self.reach
            # The size swings: what is kept is the smallest that did reach, or else the last.
            better = reached & (size < smallest) | smallest.isinf()
            for kept, now in zip(best, form.parameters):
                kept[better] = now.detach()[better]
            smallest = torch.where(better & reached, size, smallest)
            form.step(reached, 1 - step / steps)
        with torch.no_grad():
            for kept, now in zip(best, form.parameters):
                now.copy_(kept)

    def share(self, index: Tensor, scale: Tensor) -> Tensor:
        """Return the share [C] of samples [C, K] that go to the class, the changes enlarged `scale` [C] times."""
        C, K = index.shape
        c = torch.arange(C, device=index.device).repeat_interleave(K)
        flat, out = index.flatten(), torch.zeros(C, device=index.device, dtype=torch.float32)
        for part in torch.arange(C * K, device=index.device).split(self.chunk):
            hit = self.logits(flat[part], c[part], scale[c[part]]).argmax(1) == self.label[c[part]]
            out.index_add_(0, c[part], hit.float())
        return out / K

    def measure(self, count: int, rounds: int = 7, largest: float = 4.0) -> Inverted:
        """Scale every change to where it just reaches, by bisection on the same samples."""
        index = self.draw(count)
        low = torch.zeros(self.classes, device=index.device, dtype=torch.float32)
        high = torch.full_like(low, largest)
        success = self.share(index, high)
        for k in range(rounds):
            middle = torch.ones_like(low) if k == 0 else (low + high) / 2
            got = self.share(index, middle)
            enough = got >= self.reach
            high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
            success = torch.where(enough, got, success)
        reached = success >= self.reach
        high = torch.where(reached, high, torch.full_like(high, largest))
        base = self.x.mean(0)
        every = torch.arange(self.classes, device=index.device)
        form = self.form

        @torch.no_grad()
        def apply(x: Tensor, k: int) -> Tensor:
            c = torch.full((len(x),), k, device=x.device)
            return form.apply(x, c, high[c])

        return Inverted(
            form.name,
            self.label.cpu(),
            form.size(high).cpu(),
            success.cpu(),
            reached.cpu(),
            form.apply(base.expand(self.classes, *base.shape), every, high).cpu(),
            base.cpu(),
            form.mask(high),
            apply,
        )


def _norm(x: Tensor) -> Tensor:
    """Return the L2 norm [C] of each class's part, never 0."""
    return x.flatten(1).square().sum(1).add(1e-20).sqrt()


def _like(scale: Tensor, x: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (x.dim() - 1))
