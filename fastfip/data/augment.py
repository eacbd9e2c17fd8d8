"""Augmentation of clean images, a batch at a time, on their device: the crops and flips of the released codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import DataError

__all__ = ["augmented", "crop_flip", "mirrored", "movable", "pieced", "shifted"]

#: Share of the height and width that a crop moves by, at most: 4 pixels of 32.
REACH = 1 / 8


def augmented(task: Task, batch: Batch, flip: bool, generator: torch.Generator) -> Batch | None:
    """Return the batch with each of its images [N, ch, H, W] moved at random, and mirrored if `flip` in half the cases.

    Clips, [N, ch, T, H, W] or [N, T, ch, H, W], are moved and mirrored alike in all their frames.

    A crop of a padded image moves it: by up to an eighth of its height and width, on a ground of each channel's lowest
    value in the batch, which is black however images are normalised.

    Args:
        task: where the images are in the batch.
        batch: left as it is.
        flip: whether images may be mirrored.
        generator: on the CPU.

    Returns:
        None where inputs are no images or clips.
    """
    x = _images(task, batch)
    return None if x is None else task.replace_inputs(batch, crop_flip(x, flip, generator))


def mirrored(task: Task, batch: Batch, which: Tensor) -> Batch | None:
    """Return the batch with those of its images [N, ch, H, W] mirrored left to right that `which` [N] (bool) names.

    Returns:
        None where inputs are no images or clips.
    """
    x = _images(task, batch)
    if x is None:
        return None
    which = which.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
    return task.replace_inputs(batch, torch.where(which, x.flip(-1), x))


def pieced(task: Task, batch: Batch, generator: torch.Generator) -> Batch:
    """Return the batch with a rectangle of the next image written over each of its images (CutMix, arXiv 1905.04899).

    The rectangle's area, any share of the image with the same probability, and its place are drawn for each image; its
    place is the same in both images. Labels are those of the image written over. Clips get it in all their frames.

    Args:
        task: where the images are in the batch.
        batch: left as it is; the same is returned where inputs are no images or clips.
        generator: on the CPU.
    """
    x = _images(task, batch)
    if x is None:
        return batch
    n = len(x)

    def span(length: int, share: Tensor) -> Tensor:
        """Return bool [N, length], true in a row of `share` of the columns."""
        width = (share * length).round()
        start = (torch.rand(n, generator=generator, device="cpu", dtype=torch.float32) * (length - width + 1)).floor()
        column = torch.arange(length, device="cpu")
        return (column >= start[:, None]) & (column < (start + width)[:, None])

    side = torch.rand(n, generator=generator, device="cpu", dtype=torch.float32).sqrt()
    inside = span(x.shape[-2], side)[:, :, None] & span(x.shape[-1], side)[:, None, :]
    inside = inside.reshape(n, *[1] * (x.dim() - 3), *inside.shape[1:]).to(x.device)
    return task.replace_inputs(batch, torch.where(inside, x.roll(1, 0), x))


def movable(task: Task, batch: Batch, classes: int | None) -> bool:
    """Return whether labels hold when an image is moved: class indices, or 0 and 1 for each of several labels.

    With `loss=` they may be boxes, masks or positions, which would have to move with the image.
    """
    if classes is not None:
        return True
    try:
        y = task.labels(batch)
    except DataError:
        return False
    return y.dim() == 2 and bool(((y == 0) | (y == 1)).all())


def _images(task: Task, batch: Batch) -> Tensor | None:
    """Return the images [N, ch, H, W], or the clips with one axis more, of a batch; None: it has none."""
    try:
        x = task.inputs(batch)
    except DataError:
        return None
    return x if x.dim() in (4, 5) and x.is_floating_point() and x.numel() else None


def crop_flip(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Return images or clips x [N, ..., H, W], not empty, moved and mirrored at random, see `augmented`."""
    n, height, width = len(x), *x.shape[-2:]
    down, right = (
        torch.randint(-reach, reach + 1, (n,), generator=generator, device="cpu")
        for reach in (max(1, round(REACH * height)), max(1, round(REACH * width)))
    )
    mirrored = torch.zeros(n, dtype=torch.bool, device="cpu")
    if flip:
        mirrored = torch.rand(n, generator=generator, device="cpu", dtype=torch.float32) < 0.5
    moves = (down.to(x.device), right.to(x.device), mirrored.to(x.device))
    return shifted(x, *moves) if x.dim() == 4 else shifted(x.flatten(1, -3), *moves).reshape(x.shape)


def shifted(x: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Return images x [N, ch, H, W], mirrored left to right where `mirrored` [N], moved by `down` and `right` [N]."""
    n, _, height, width = x.shape
    rows = torch.arange(height, device=x.device) - down[:, None]
    columns = torch.arange(width, device=x.device) - right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    sample = torch.arange(n, device=x.device)[:, None, None]
    moved = x[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    ground = x.detach().amin((0, 2, 3)).reshape(1, -1, 1, 1)
    moved = torch.where(inside[:, None], moved, ground)
    return moved.contiguous() if x.is_contiguous() else moved  # a model may flatten with a view
