"""Universal perturbations: for every class the small change of the input that sends most clean samples there.

A backdoor is a shortcut: one small change of the input that moves every sample to one class. Without the trigger it can
still be looked for, on clean data alone, as the smallest universal perturbation for each class (Neural Cleanse, Wang et
al., S&P 2019; universal adversarial perturbations, Moosavi-Dezfooli et al., CVPR 2017). Purification uses what is found
as the inputs at which the Fisher information of the net is largest; an audit reports it.

Where a model takes no real numbers, or has no classes, the same is done to the vectors of its tokens
(`fastfip.worst_case.places`), or to raise every sample's loss (`fastfip.worst_case.goals`).

Index letters: `n` sample, `c` class (or number of a perturbation, where there are no classes).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.nets.state import requires_grad
from fastfip.worst_case.goals import Goal, TowardsClass
from fastfip.worst_case.pixels import PixelRange, typical_norm
from fastfip.worst_case.places import InputPlace, Place, TokenPlace
from fastfip.worst_case.store import DeltaStore, row_norms

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks

__all__ = ["Perturbations"]

#: Inputs of one pass of `improve`: a larger batch goes through the model in parts, for the memory of its activations.
PASS_BYTES = 5 << 20


@dataclass
class GradientSums:
    """Gradients of samples in what was used of their classes, summed by class, part after part of a batch.

    Attributes:
        classes: [K] int64. place: [N], which of them each sample is for. total: [K, *input]. seen: samples so far.
    """

    classes: Tensor
    place: Tensor
    total: Tensor
    seen: int = 0

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Add the gradients [n, *input] of the next n samples; what is not finite counts as zero."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        place = self.place[self.seen : self.seen + len(gradient)]
        self.total = self.total.to(wide).index_add_(0, place, gradient.to(wide).nan_to_num(0.0, 0.0, 0.0))
        self.seen += len(gradient)


@dataclass
class Perturbations:
    """A few universal perturbations, one for each class where there are classes, improved by normalised gradient steps.

    Attributes:
        store: the perturbations, on the device of what they perturb; each is of bounded L2 norm.
        place: what they perturb.
        goal: what they are improved for.
        unit: the norm of what is perturbed, sqrt(d) times its standard deviation. The radius is a multiple of it.
        radius: L2 bound of each perturbation, in the units of what it perturbs.
        success: [C] running share of samples (not of the class) that the perturbation of c reaches: sends to c.
        outside: [K] classes whose perturbation rounding left a little longer than the bound: the next step shortens
            them as well, whatever classes it is for.
        together: samples of a pass of `improve`, at most; None: as many as have inputs of a few megabytes.
        ranks: the processes that share each batch, if there are several: each has gradients for its own samples.
    """

    store: DeltaStore
    place: Place
    goal: Goal
    unit: float
    radius: float
    generator: torch.Generator
    success: Tensor
    outside: Tensor
    history: list[tuple[float, list[float]]] = field(default_factory=list)
    together: int | None = None
    ranks: Ranks | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        goal: int | Goal,
        generator: torch.Generator,
        radius: float = 0.02,
        place: Place | None = None,
        ranks: Ranks | None = None,
    ) -> Perturbations:
        """Start from tiny noise.

        Args:
            x: clean examples of what is perturbed, [N, ...]: inputs [N, ch, ...] as the model takes them.
            goal: what for; a number C: one perturbation towards each of C classes.
            generator: CPU generator; nothing else is drawn from.
            radius: of the first bound, in units of `unit`.
            place: where; None: the input, within the range of `x`.
            ranks: the processes that share each batch.
        """
        x = x.detach().float()
        unit = typical_norm(x)
        goal = TowardsClass(goal) if isinstance(goal, int) else goal
        return cls(
            DeltaStore.noise(x, goal.rows, generator, 1e-3 * radius * unit, unit / math.sqrt(x[0].numel())),
            InputPlace(PixelRange.of_inputs(x)) if place is None else place,
            goal,
            unit,
            radius * unit,
            generator,
            torch.zeros(goal.rows, device=x.device, dtype=torch.float32),
            torch.zeros(0, dtype=torch.int64, device=x.device),
            ranks=ranks,
        )

    @property
    def relative_radius(self) -> float:
        """Return the bound in units of the norm of what is perturbed."""
        return self.radius / self.unit

    @property
    def of_tokens(self) -> bool:
        """Return whether vectors of token ids are perturbed, and no inputs."""
        return isinstance(self.place, TokenPlace)

    def choose(self, task: Task, batch: Batch, sharpness: float) -> Tensor:
        """Return for each sample of a batch the number of a perturbation, [N] int64; see `draw`."""
        own = self.goal.own(task, batch)
        if own is not None:
            return self.draw(own, sharpness)
        drawn = torch.multinomial(self._weights(sharpness), task.size(batch), True, generator=self.generator)
        return drawn.to(self.success.device)

    def draw(self, y: Tensor, sharpness: float) -> Tensor:
        """Return for each sample a class other than its own, the likelier the better its perturbation works.

        Args:
            y: [N] int64, true classes; -1: none that has a perturbation.
            sharpness: probabilities are proportional to `success ** sharpness`; 0: uniform.
        """
        table = self._weights(sharpness).expand(len(y), -1).clone()
        known = (y >= 0).cpu()
        table[torch.arange(len(y), device="cpu")[known], y.cpu()[known]] = 0
        return torch.multinomial(table, 1, generator=self.generator)[:, 0].to(y.device)

    def _weights(self, sharpness: float) -> Tensor:
        """Return what the perturbations are drawn in proportion to, [C], on the CPU."""
        weight = self.success.clamp_min(0.01).cpu()
        return (weight / weight.max()).pow(sharpness).clamp_min(1e-12)

    def improve(self, model: nn.Module, task: Task, batch: Batch, c: Tensor, step: float = 0.3) -> Tensor:
        """Take one step of the perturbations `c` [N] towards their goal on a batch.

        The model's parameters get no gradient. Each perturbation moves by `step` radii along its own normalised
        gradient (with classes: of the cross-entropy towards c), then back into the ball.

        Returns:
            the share of samples that were reached (with classes: went to their c), as a scalar.
        """
        n = task.size(batch)
        most = min(self.together or n, max(1, PASS_BYTES * n // max(1, self.place.nbytes(task, batch))))
        hits, sums = [], self.sums(c)
        with requires_grad(model.parameters(), False):
            parts = torch.arange(n, device="cpu").tensor_split(math.ceil(n / most))
            for part in parts:
                mine = c[part.to(c.device)]
                some = batch if len(parts) == 1 else take(batch, part, n)
                with self.moved(model, task, some, mine) as (used, moved):
                    logits = task.forward(model, moved)
                    sums.add(self.gradient(task, logits, moved, used, mine))
                hits.append(self.goal.hit(task, logits.detach(), moved, mine))
                del used, moved, logits  # with the graph, before the next part
        self.move(sums, step)
        return self.count(torch.cat(hits), c)

    @contextlib.contextmanager
    def moved(self, model: nn.Module, task: Task, batch: Batch, c: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """Give the perturbations `c` [N] as a leaf [N, ...], and the batch to run the model on, which meets them.

        Forward and backward passes belong inside the block.
        """
        used = self.store.rows(c).to(self.place.dtype(task, batch)).requires_grad_(True)
        with self.place.moved(model, task, batch, used) as moved:
            yield used, moved

    def gradient(
        self, task: Task, logits: Tensor, batch: Batch, used: Tensor, c: Tensor, retain_graph: bool = False
    ) -> Tensor:
        """Return the gradient of the goal's loss in what was used, [N, ...]."""
        loss = self.goal.loss(task, logits, batch, c)
        gradient = torch.autograd.grad(loss, used, retain_graph=retain_graph, allow_unused=True)[0]
        return torch.zeros_like(used) if gradient is None else gradient  # None: a pass that did not meet them

    def sums(self, c: Tensor) -> GradientSums:
        """Return empty sums of gradients for a step of the perturbations of the classes `c` [N]."""
        touched, place = torch.unique(torch.cat([c, self.outside]), return_inverse=True)
        like = self.store.values
        total = torch.zeros(len(touched), *like.shape[1:], device=like.device, dtype=torch.float32)
        return GradientSums(touched, place[: len(c)], total)

    @torch.no_grad()
    def move(self, sums: GradientSums, step: float) -> None:
        """Move the perturbations of the classes of `sums` and bring them back into the ball; no others are touched."""
        touched, total = sums.classes, sums.total
        if self.ranks is not None:
            self.ranks.sum_([total], "perturbations")
        total = total.float()
        size = row_norms(total)
        rows = self.store.rows(touched)
        rows -= total.mul_(step * self.radius).div_(size.clamp_min(1e-20))
        rows *= self._shortening(rows)
        if self.store.exact:
            self.outside = touched[(self._shortening(rows) < 1).flatten()]
        self.store.put(touched, rows)

    def _shortening(self, rows: Tensor) -> Tensor:
        """Return the factor, at most 1, that brings each row into the ball, [K, 1, ...]."""
        return (self.radius / row_norms(rows).clamp_min(1e-20)).clamp(max=1)

    @torch.no_grad()
    def count(self, hit: Tensor, c: Tensor) -> Tensor:
        """Take note of which samples, bool [N], the perturbations c [N] reached; return the share, as a scalar.

        `success` is a running mean: a sample counts a tenth, so about ten samples are remembered.
        """
        hit = hit.float()
        seen = torch.zeros_like(self.success).index_add_(0, c, torch.ones_like(hit))
        hits = torch.zeros_like(self.success).index_add_(0, c, hit)
        keep = 0.9**seen
        self.success = keep * self.success + (1 - keep) * hits / seen.clamp_min(1)
        return hit.mean()

    def grow(self, factor: float) -> None:
        """Widen the bound; the perturbations themselves stay where they are."""
        self.history.append((self.relative_radius, self.success.tolist()))
        self.radius *= factor
