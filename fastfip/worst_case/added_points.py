"""Universal points: for every class a few points at learned places that send most point clouds to it.

The points of a cloud have no order, so that what moves each of them by its number in the cloud is not the change that a
trigger makes. A trigger is a few points at places of their own, which any points of a cloud may take: here the places
are looked for by the gradient in their coordinates, and a cloud's points are drawn anew for each pass (Xiang et al.,
arXiv 2104.05808, find the places of a trigger in this way; Li et al., arXiv 2103.16074).

Index letters: `n` sample, `c` class, `k` place, `p` point of a cloud.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.worst_case.goals import TowardsClass
from fastfip.worst_case.places import OfInputs
from fastfip.worst_case.store import DeltaStore
from fastfip.worst_case.universal import GradientSums, Perturbations

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks

__all__ = ["AddedPoints", "PointPlace"]

#: Places for each class. Three or four send clouds to the class of a trigger; sixteen send them to any class.
COUNT = 4
#: Share of a cloud's points that they take at most.
SHARE = 0.25
#: Sets of places that are tried at first, half of them spread over the box and half gathered within about this share of
#: its size, on so many clouds each.
STARTS, GATHERED, CLOUDS = 64, 0.1, 8
#: Sets of one pass.
TOGETHER = 8
#: A step of one radius moves a place by this share of the box's size (half of its longest side).
STRIDE = 1 / 3


@dataclass(frozen=True)
class PointPlace(OfInputs):
    """Some points of each cloud, drawn anew in every pass: points at given places take their places.

    Attributes:
        axis: of the points, 1 for clouds [N, P, 3], 2 for [N, 3, P].
        low, high: [3] corners of the box that places stay in.
        generator: on the CPU; points are drawn from it.
    """

    axis: int
    low: Tensor
    high: Tensor
    generator: torch.Generator

    @contextlib.contextmanager
    def moved(self, model: nn.Module, task: Task, batch: Batch, used: Tensor) -> Iterator[Batch]:
        """Give the batch with the points `used` [N, K, 3] in each cloud, in place of K of its own."""
        x = task.inputs(batch)
        first = x if self.axis == 1 else x.transpose(1, 2)
        drawn = torch.rand(first.shape[:2], generator=self.generator, device="cpu", dtype=torch.float32)
        gone = drawn.argsort(1)[:, : used.shape[1], None].to(x.device)
        out = first.scatter(1, gone.expand(-1, -1, 3), used)
        yield task.replace_inputs(batch, out if self.axis == 1 else out.transpose(1, 2).contiguous())


@dataclass
class AddedPoints(Perturbations):
    """A few places [K, 3] for each class, which some points of each cloud take; see `Perturbations` for the rest.

    The rows of `store` are the places themselves, in the units of the clouds. They are not small but few, and stay in
    the box of the clean clouds: `radius` bounds nothing, steps are measured by it.
    """

    place: PointPlace

    @classmethod
    def among(
        cls,
        model: nn.Module,
        task: Task,
        batches: Iterator[Batch],
        x: Tensor,
        axis: int,
        goal: TowardsClass,
        generator: torch.Generator,
        ranks: Ranks | None = None,
    ) -> AddedPoints:
        """Start, for each class, from the best of some drawn sets of places.

        Args:
            model: in eval mode; returns logits [N, C].
            task: how it takes a batch.
            batches: clean ones, without an end.
            x: clean clouds, for the box: [N, P, 3] or [N, 3, P].
            axis: of the points, see `points_axis`.
            goal: the classes.
            generator: on the CPU; nothing else is drawn from.
            ranks: the processes that share each batch.
        """
        first = (x if axis == 1 else x.transpose(1, 2)).detach().float()
        low, high = first.amin((0, 1)), first.amax((0, 1))
        place = PointPlace(axis, low, high, generator)
        size = float((high - low).max()) / 2 or 1.0
        drawn = drawn_sets(low, high, size, max(1, min(COUNT, int(SHARE * first.shape[1]))), generator)
        best = scores(model, task, batches, place, drawn, goal).argmax(0)
        zero = torch.zeros(goal.rows, device=x.device, dtype=torch.float32)
        none = torch.zeros(0, device=x.device, dtype=torch.int64)
        store = DeltaStore(drawn[best])
        return cls(store, place, goal, size, STRIDE * size, generator, zero, none, ranks=ranks)

    @torch.no_grad()
    def move(self, sums: GradientSums, step: float) -> None:
        """Move the places of the classes of `sums` along their gradients, and back into the box.

        The place with the longest gradient of its class moves by `step` radii, the others by less in proportion to the
        square root of theirs: a maximum over the points gives most of them none, and few much.
        """
        total = sums.total
        if self.ranks is not None:
            self.ranks.sum_([total], "perturbations")
        total = total.float()
        length = total.norm(dim=2, keepdim=True).clamp_min(1e-20)
        share = (length / length.amax(1, keepdim=True)).sqrt()
        rows = self.store.rows(sums.classes) - step * self.radius * share * total / length
        self.store.put(sums.classes, torch.minimum(torch.maximum(rows, self.place.low), self.place.high))


def drawn_sets(low: Tensor, high: Tensor, size: float, count: int, generator: torch.Generator) -> Tensor:
    """Return sets of places, [STARTS, K, 3], in the box: half of them spread, half each about a place of its own."""
    half = STARTS // 2
    spread = torch.rand(half, count, 3, generator=generator, device="cpu", dtype=torch.float32)
    about = torch.rand(half, 1, 3, generator=generator, device="cpu", dtype=torch.float32)
    noise = torch.randn(half, count, 3, generator=generator, device="cpu", dtype=torch.float32)
    where = torch.cat([spread, about.expand(half, count, 3)]).to(low.device)
    apart = torch.cat([torch.zeros_like(noise), noise]).to(low.device)
    return torch.minimum(torch.maximum(low + (high - low) * where + GATHERED * size * apart, low), high)


@torch.no_grad()
def scores(
    model: nn.Module, task: Task, batches: Iterator[Batch], place: PointPlace, sets: Tensor, goal: TowardsClass
) -> Tensor:
    """Return the mean log-probability of each class of `goal` on clouds of others with the places of sets [S, K, 3].

    Returns:
        [S, rows]; minus infinity where a set met no cloud of another class.
    """
    out = []
    for some in sets.split(TOGETHER):
        batch = next(batches)
        n = task.size(batch)
        few = torch.randint(0, n, (CLOUDS * len(some),), generator=place.generator, device="cpu")
        batch = take(batch, few, n)
        written = some.repeat_interleave(CLOUDS, 0).to(place.dtype(task, batch))
        with place.moved(model, task, batch, written) as moved:
            answers = task.forward(model, moved).float().log_softmax(1)
        classes = goal.class_of(torch.arange(goal.rows, device=answers.device))
        other = (task.labels(batch)[:, None] != classes).unflatten(0, (-1, CLOUDS))
        total = (answers[:, classes].unflatten(0, (-1, CLOUDS)) * other).sum(1)
        out.append(torch.where(other.any(1), total / other.sum(1), -torch.inf))
    return torch.cat(out)
