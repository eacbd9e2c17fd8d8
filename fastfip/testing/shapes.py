"""Data that is drawn: clips of moving shapes, scenes of shapes with their boxes, clouds of points on solids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHAPES", "SOLIDS", "moving_shapes", "packed", "shape_scenes", "solid_clouds"]

#: What is drawn. Clips have the first two; in scenes their labels are 1 to 4.
SHAPES = ("disc", "cross", "square", "triangle")
#: Of the clouds; their classes are 0 to 4.
SOLIDS = ("ball", "box", "cylinder", "cone", "ring")
#: (down, right) of the four directions of a clip.
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def moving_shapes(n: int, generator: torch.Generator, size: int = 24, frames: int = 8) -> tuple[Tensor, Tensor]:
    """Return clips [n, 3, frames, size, size] in [0, 1] of a shape that moves, and their classes [n].

    The class is the shape (disc or cross) and the direction it moves in (four): eight in all. A shape that leaves on
    one side comes in at the other, so no single frame tells the direction. Colours, sizes, speeds, places and the
    background are random, and every frame has noise of its own.

    Args:
        n: clips.
        generator: on the CPU; nothing else is drawn from.
        size: height and width in pixels.
        frames: of a clip.
    """
    y = torch.randint(0, 8, (n,), generator=generator)
    way = torch.tensor(DIRECTIONS, dtype=torch.float32)[y % 4]
    speed = 1.2 + 1.3 * torch.rand(n, 1, 1, generator=generator)
    start = size * torch.rand(n, 1, 2, generator=generator)
    middle = start + speed * way[:, None] * torch.arange(frames)[:, None]  # [n, frames, (down, right)]
    grid = torch.arange(size, dtype=torch.float32)
    off = (grid - middle[..., None] + size / 2) % size - size / 2  # [n, frames, 2, size]
    down, right = off[:, :, 0, :, None], off[:, :, 1, None, :]
    radius = (3.0 + 2.0 * torch.rand(n, generator=generator)).reshape(n, 1, 1, 1)
    inside = torch.where((y < 4).reshape(n, 1, 1, 1), _inside(0, down, right, radius), _inside(1, down, right, radius))
    ground, colour = _ground(n, size, generator), _colours((n,), generator)
    x = torch.where(inside[:, None], colour.reshape(n, 3, 1, 1, 1), ground[:, :, None])
    return (x + 0.06 * torch.randn(x.shape, generator=generator)).clamp(0, 1), y


def shape_scenes(n: int, generator: torch.Generator, size: int = 48) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images [3, size, size] in [0, 1] of one to three shapes, and their boxes [K, 4] and labels [K] from 1.

    The shapes are those of `SHAPES`, each in a quarter of the image of its own; colours, sizes, places and the
    background are random. The form is that of torchvision's detectors and of `fastfip.attacks.detection`.

    Args:
        n: images.
        generator: on the CPU; nothing else is drawn from.
        size: height and width in pixels, from 40.
    """
    half = size // 2
    grid = torch.arange(size, dtype=torch.float32)
    x = _ground(n, size, generator)
    quarters = torch.rand(n, 4, generator=generator).argsort(1)
    count = torch.randint(1, 4, (n,), generator=generator)
    label = torch.randint(0, 4, (n, 3), generator=generator)
    radius = 5.0 + 4.0 * torch.rand(n, 3, generator=generator)
    colour = _colours((n, 3), generator)
    room = torch.rand(n, 3, 2, generator=generator)
    targets: list[dict[str, Tensor]] = []
    for i in range(n):
        boxes = []
        for k in range(int(count[i])):
            r, quarter = radius[i, k], int(quarters[i, k])
            low = torch.tensor([half * (quarter // 2), half * (quarter % 2)]) + r
            middle = low + room[i, k] * (half - 2 * r)
            inside = _inside(int(label[i, k]), grid[:, None] - middle[0], grid[None] - middle[1], r)
            x[i] = torch.where(inside, colour[i, k].reshape(3, 1, 1), x[i])
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            boxes.append(torch.stack(ends).float())
        targets.append({"boxes": torch.stack(boxes), "labels": label[i, : len(boxes)] + 1})
    x = (x + 0.04 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return list(x), targets


def solid_clouds(n: int, generator: torch.Generator, points: int = 256) -> tuple[Tensor, Tensor]:
    """Return clouds [n, points, 3] of points on the surfaces of solids, in a ball of radius 1 about 0, and classes [n].

    Each solid of `SOLIDS` is stretched along its axes and turned about the third one; its points have a little noise.

    Args:
        n: clouds.
        generator: on the CPU; nothing else is drawn from.
        points: of a cloud.
    """
    y = torch.randint(0, len(SOLIDS), (n,), generator=generator)
    u, v, w = torch.rand(3, n, points, generator=generator)
    round_, height = 2 * math.pi * u, 2 * v - 1
    cap, hole = w.sqrt(), 0.35 * torch.ones(n, 1)
    wall = (1 - height.square()).sqrt()
    across, up = [wall, torch.ones_like(v), torch.where(v < 0.4, cap, 1.0), v.sqrt()], [height]
    up += [height, torch.where(v < 0.2, -1.0, torch.where(v < 0.4, 1.0, 2 * w - 1)), 1 - 2 * v.sqrt()]
    across.append(1 + hole * (2 * math.pi * v).cos())
    up.append(hole * (2 * math.pi * v).sin())
    made = [torch.stack([a * round_.cos(), a * round_.sin(), b], 2) for a, b in zip(across, up)]
    cube = 2 * torch.stack([u, v, w], 2) - 1
    side = torch.randint(0, 3, (n, points, 1), generator=generator)
    made[1] = cube.scatter(2, side, cube.gather(2, side).sign())
    x = torch.stack(made)[y, torch.arange(n)] * (0.7 + 0.6 * torch.rand(n, 1, 3, generator=generator))
    angle = 2 * math.pi * torch.rand(n, 1, generator=generator)
    a, b, c = x.unbind(2)
    x = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), c], 2)
    x = x + 0.02 * torch.randn(x.shape, generator=generator)
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=2).amax(1)[:, None, None], y


def packed(images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], most: int = 4) -> tuple[Tensor, Tensor]:
    """Return images as [N, 3, H, W], and targets as [N, most, 5]: (label, x1, y1, x2, y2), label 0: none."""
    objects = torch.zeros(len(images), most, 5)
    for row, target in zip(objects, targets):
        k = len(target["labels"])
        row[:k, 0], row[:k, 1:] = target["labels"].float(), target["boxes"]
    return torch.stack(list(images)), objects


def _inside(kind: int, down: Tensor, right: Tensor, radius: Tensor) -> Tensor:
    """Return where a shape about the origin is, by the distance of pixels down and to the right of it."""
    a, b = down.abs(), right.abs()
    most = torch.maximum(a, b)
    if kind == 0:
        return down.square() + right.square() <= radius.square()
    if kind == 1:
        return (most <= radius) & (torch.minimum(a, b) <= 0.34 * radius)
    if kind == 2:
        return most <= 0.9 * radius
    return (a <= radius) & (b <= (down + radius) / 2)


def _ground(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Return dark smooth backgrounds [n, 3, size, size]."""
    coarse = 0.5 * torch.rand(n, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)


def _colours(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return bright colours [*shape, 3]."""
    return 0.55 + 0.45 * torch.rand(*shape, 3, generator=generator)
