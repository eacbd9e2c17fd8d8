"""Random changes of point clouds that leave what they show, and how a point cloud is told from other inputs.

Points are jittered, the cloud is stretched, turned a little, thinned out, or some of its points gather in a small ball
somewhere. As for images, the kinds are those that triggers are made of; places and sizes are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.worst_case.pixels import perturbable

__all__ = ["POINT_KINDS", "changed_points", "moved_points", "points_axis", "shaped_as_clouds"]

#: `change(clouds [N, P, 3], generator)`.
PointChange = Callable[[Tensor, torch.Generator], Tensor]
#: Share of the clouds of a batch that are changed; the others are seen as they are.
SHARE = 0.75
#: Fewer points than that are no cloud.
FEWEST = 16
#: Points in another order change the logits of a model by less than this share of how they differ between samples.
SAME = 0.1
#: Bounds of the jitter and of the radius of a ball, over the radius of a cloud; of the stretching of each axis; of the
#: angle of a turn; of the shares of points that are left out, and that gather in a ball.
JITTER, BALL, STRETCH, TURN = (0.005, 0.04), (0.02, 0.2), 0.2, math.pi / 9
DROP, GATHER = (0.1, 0.6), (0.01, 0.12)


def shaped_as_clouds(x: Tensor) -> bool:
    """Return whether inputs are [N, P, 3] or [N, 3, P] with at least 16 points, as clouds are, and series may be."""
    return x.dim() == 3 and 3 in x.shape[1:] and max(x.shape[1:]) >= FEWEST


@torch.no_grad()
def points_axis(model: nn.Module, task: Task, batch: Batch, generator: torch.Generator) -> int | None:
    """Return the axis of the points, 1 or 2, of inputs that are clouds [N, P, 3] or [N, 3, P]; None: they are none.

    A cloud has no order: they are clouds if the model answers the same when the points come in another one. A model of
    series, whose inputs may have the same shape, does not.

    Args:
        model: in eval mode; returns logits [N, C].
        task: how it takes a batch.
        batch: some clean samples.
        generator: on the CPU; draws the other order.
    """
    if not perturbable(task, batch):
        return None
    x = task.inputs(batch)
    if not shaped_as_clouds(x):
        return None
    axis = 1 if x.shape[2] == 3 else 2
    order = torch.randperm(x.shape[axis], generator=generator).to(x.device)
    other = task.replace_inputs(batch, x.index_select(axis, order))
    answers, after = (task.forward(model, of).float() for of in (batch, other))
    spread = (answers - answers.mean(0)).square().mean()
    return axis if bool((after - answers).square().mean() <= SAME**2 * spread) else None


def changed_points(task: Task, batch: Batch, axis: int, generator: torch.Generator) -> Batch:
    """Return the batch with three quarters of its clouds changed at random, each by one of `POINT_KINDS`.

    Args:
        task: where the clouds are in the batch.
        batch: left as it is.
        axis: of the points, see `points_axis`.
        generator: on the CPU; nothing else is drawn from.
    """
    x = _points_first(task, batch, axis)
    kind = torch.randint(0, len(POINT_KINDS), (len(x),), generator=generator)
    kind[torch.rand(len(x), generator=generator) >= SHARE] = len(POINT_KINDS)
    out = x.clone()
    for number, change in enumerate(POINT_KINDS):
        index = torch.nonzero(kind == number).flatten().to(x.device)
        if len(index):
            out[index] = change(x[index].float(), generator).to(x.dtype)
    return task.replace_inputs(batch, out if axis == 1 else out.transpose(1, 2).contiguous())


def moved_points(task: Task, batch: Batch, axis: int, generator: torch.Generator) -> Batch:
    """Return the batch with all of its clouds turned a little, stretched and jittered at random.

    For clouds it is what moving by a few pixels is for images; see `changed_points` for what it takes.
    """
    x = _points_first(task, batch, axis)
    out = x.float()
    for change in (_turned, _stretched, _jittered):
        out = change(out, generator)
    out = out.to(x.dtype)
    return task.replace_inputs(batch, out if axis == 1 else out.transpose(1, 2).contiguous())


def _points_first(task: Task, batch: Batch, axis: int) -> Tensor:
    x = task.inputs(batch)
    return x if axis == 1 else x.transpose(1, 2)


def _jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with every point moved by noise of its own."""
    return x + _uniform((len(x), 1, 1), generator, x, *JITTER) * _size(x) * _normal(tuple(x.shape), generator, x)


def _stretched(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x stretched or shrunk along each axis, about its middle."""
    middle = x.mean(1, keepdim=True)
    return middle + (x - middle) * _uniform((len(x), 1, 3), generator, x, 1 - STRETCH, 1 + STRETCH)


def _turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x turned about an axis of any direction through its middle."""
    way = nn.functional.normalize(_normal((len(x), 3), generator, x), dim=1)
    way = way * _uniform((len(x), 1), generator, x, -TURN, TURN)
    zero = torch.zeros_like(way[:, 0])
    a, b, c = way.unbind(1)
    turn = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], 1).reshape(-1, 3, 3)
    middle = x.mean(1, keepdim=True)
    return middle + (x - middle) @ torch.matrix_exp(turn).transpose(1, 2)


def _thinned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with some of its points in the place of others."""
    n, p, _ = x.shape
    gone = _chosen(x, DROP, generator)
    other = torch.randint(0, p, (n, p), generator=generator).to(x.device)
    return torch.where(gone[..., None], x.gather(1, other[..., None].expand(-1, -1, 3)), x)


def _gathered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with a few of its points in a small ball, in or about the box around the cloud."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, half = (low + high) / 2, (high - low).clamp_min(1e-6).amax(2, keepdim=True) / 2
    place = middle + half * _uniform((len(x), 1, 3), generator, x, -1.0, 1.0)
    radius = _uniform((len(x), 1, 1), generator, x, *BALL) * _size(x)
    ball = place + radius * nn.functional.normalize(_normal(tuple(x.shape), generator, x), dim=2)
    return torch.where(_chosen(x, GATHER, generator)[..., None], ball, x)


#: See the first lines of this file.
POINT_KINDS: tuple[PointChange, ...] = (_jittered, _stretched, _turned, _thinned, _gathered)


def _size(x: Tensor) -> Tensor:
    """Return the radius of each cloud about its middle, [N, 1, 1]."""
    return (x - x.mean(1, keepdim=True)).norm(dim=2).amax(1)[:, None, None].clamp_min(1e-6)


def _chosen(x: Tensor, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Return a mask [N, P] of a random share of the points, at least one of them on average."""
    wanted = _uniform((len(x), 1), generator, x, *share).clamp_min(1 / x.shape[1])
    return _uniform(tuple(x.shape[:2]), generator, x) < wanted


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator, like: Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator).to(like.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator).to(like.device)
