"""Random changes of inputs that leave what they show.

Images are mixed with a pattern, warped, patched, posterised or recoloured, clips alike in all their frames. Point
clouds have changes of their own, see `fastfip.worst_case.points`.

A backdoor answers to a change that the label does not depend on. Images that were changed at random and keep their
label teach a model that no such change counts, whatever the trigger is: no pattern, place or target is looked for.
The kinds are those that triggers are made of (methods of docs/attacks.md), the patterns are none of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.worst_case.pixels import PixelRange, perturbable

__all__ = ["KINDS", "LOCAL_KINDS", "changed", "random_change"]

#: `change(images to change, all images of the batch, generator)`, images in [0, 1].
ImageChange = Callable[[Tensor, Tensor, torch.Generator], Tensor]
#: Share of the images of a batch that are changed; the others are seen as they are.
SHARE = 0.75
#: Images smaller than this are not changed: there is no room for a pattern.
SMALLEST = 4
#: Bounds of the share of a pattern in a mixture, and of what it adds to an image, in [0, 1] of the pixels' range.
MIX, ADD = (0.05, 0.4), (0.03, 0.25)
#: Bounds of the mean length of a warp, as a share of half the image.
WARP = (0.02, 0.125)


def changed(
    task: Task, batch: Batch, known: PixelRange, generator: torch.Generator, moved: bool = True
) -> Batch | None:
    """Return the batch with three quarters of its images [N, ch, H, W] changed at random.

    Of clips, [N, ch, T, H, W] or [N, T, ch, H, W], all frames are changed alike.

    Args:
        task: where the images are in the batch.
        batch: left as it is.
        known: range of each channel of the clean images; changed ones stay in it.
        generator: on the CPU; nothing else is drawn from.
        moved: whether what is seen may move a little (warps); not where labels speak of places.

    Returns:
        None where inputs are no images or clips, or smaller than 4 pixels.
    """
    if not perturbable(task, batch):
        return None
    x = task.inputs(batch)
    if x.dim() not in (4, 5) or min(x.shape[-2:]) < SMALLEST or not len(x) or known.low.dim() != x.dim():
        return None
    kinds = KINDS if moved else tuple(kind for kind in KINDS if kind is not _warped)
    change = random_change if x.dim() == 4 else _all_frames
    return task.replace_inputs(batch, change(x, known, generator, kinds))


def _all_frames(x: Tensor, known: PixelRange, generator: torch.Generator, kinds: tuple[ImageChange, ...]) -> Tensor:
    """Return clips with three quarters of them changed, each alike in all its frames: these see the same draws.

    The axis of the frames is the third one where the second can be that of channels, 1 or 3 of them; else the second.
    """
    axis = 2 if x.shape[1] in (1, 3) else 1
    state = generator.get_state()
    frames = []
    for t, frame in enumerate(x.unbind(axis)):
        generator.set_state(state)
        low, high = (
            bound.expand_as(x[:1]).select(axis, t).amin((2, 3), keepdim=True) for bound in (known.low, known.high)
        )
        frames.append(random_change(frame, PixelRange(low, high), generator, kinds))
    return torch.stack(frames, axis)


def random_change(
    x: Tensor, known: PixelRange, generator: torch.Generator, kinds: tuple[ImageChange, ...] | None = None
) -> Tensor:
    """Return images x [N, ch, H, W] with three quarters of them changed, each by one of `kinds`; see `changed`.

    Args:
        x: as the model takes them.
        known: range of each channel.
        generator: on the CPU.
        kinds: None: `KINDS`.
    """
    kinds = KINDS if kinds is None else kinds
    low, span = known.low.to(x.dtype), known.span.clamp_min(1e-6).to(x.dtype)
    pixels = ((x - low) / span).clamp(0, 1).float()
    kind = torch.randint(0, len(kinds), (len(x),), generator=generator, device="cpu")
    kind[torch.rand(len(x), generator=generator, device="cpu", dtype=torch.float32) >= SHARE] = len(kinds)
    out = pixels.clone()
    for number, change in enumerate(kinds):
        index = torch.nonzero(kind == number).flatten().to(x.device)
        if len(index):
            out[index] = change(pixels[index], pixels, generator)
    out = out.clamp(0, 1).to(x.dtype) * span + low
    plain = (kind == len(kinds)).to(x.device)[:, None, None, None]
    return torch.where(plain, x, out)


def _mixed(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return (1 - a) x + a pattern."""
    a = _uniform((len(x), 1, 1, 1), generator, x, *MIX)
    return (1 - a) * x + a * _patterns(x, others, generator)


def _added(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with a pattern about zero added."""
    return x + _uniform((len(x), 1, 1, 1), generator, x, *ADD) * (2 * _patterns(x, others, generator) - 1)


def _warped(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return x read at places that a smooth field moves."""
    n, _, height, width = x.shape
    coarse = _integer(2, max(3, min(height, width) // 4), generator)
    field = torch.randn(n, 2, coarse, coarse, generator=generator, device="cpu", dtype=torch.float32).to(x.device)
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True)
    field = field / field.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
    field = field * _uniform((n, 1, 1, 1), generator, x, *WARP)
    rows, columns = (torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)[None] + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=True, padding_mode="border")


def _patched(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with a small rectangle of one colour, or of a pattern, somewhere."""
    n, channels, height, width = x.shape
    inside = torch.ones(n, 1, 1, 1, dtype=torch.bool, device=x.device)
    for axis, size in ((2, height), (3, width)):
        length = torch.randint(1, max(3, size // 4) + 1, (n,), generator=generator, device="cpu")
        start = (torch.rand(n, generator=generator, device="cpu", dtype=torch.float32) * (size - length + 1)).floor()
        shape = [1, 1, 1, 1]
        shape[axis] = size
        place = torch.arange(size, device="cpu").reshape(shape)
        start, end = start.reshape(-1, 1, 1, 1), (start + length).reshape(-1, 1, 1, 1)
        inside = inside & ((place >= start) & (place < end)).to(x.device)
    colour = _uniform((n, channels, 1, 1), generator, x).round()
    plain = _uniform((n, 1, 1, 1), generator, x) < 0.5
    return torch.where(inside, torch.where(plain, colour, _patterns(x, others, generator)), x)


def _toned(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with 2 to 16 levels in each channel, or with another gamma."""
    n, channels = x.shape[:2]
    levels = 2 ** torch.randint(1, 5, (n, 1, 1, 1), generator=generator, device="cpu").to(x.device) - 1
    gamma = torch.exp(_uniform((n, channels, 1, 1), generator, x, -0.5, 0.5))
    coarse = _uniform((n, 1, 1, 1), generator, x) < 0.5
    return torch.where(coarse, (x * levels).round() / levels, x.pow(gamma))


KINDS: tuple[ImageChange, ...] = (_mixed, _added, _warped, _patched, _toned)
#: Those that leave most of an image as it is, so that several at once show a model more in the same pass.
LOCAL_KINDS: tuple[ImageChange, ...] = (_patched,)


def _patterns(x: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return a pattern in [0, 1] for each image: another image, smooth noise, noise, or a wave."""
    kind = torch.randint(0, 4, (len(x), 1, 1, 1), generator=generator, device="cpu").to(x.device)
    n, channels, height, width = x.shape
    other = others[torch.randint(0, len(others), (n,), generator=generator, device="cpu").to(x.device)]
    coarse = _integer(2, max(3, min(height, width) // 2), generator)
    smooth = _uniform((n, channels, coarse, coarse), generator, x)
    smooth = F.interpolate(smooth, (height, width), mode="bilinear", align_corners=True)
    noise = _uniform(x.shape, generator, x)
    if _integer(0, 2, generator):
        noise = noise.round()
    up, across = (_uniform((n, 1, 1, 1), generator, x, 0, size / 3) for size in (height, width))
    phase = _uniform((n, channels, 1, 1), generator, x, 0, 2 * math.pi)
    rows = torch.arange(height, device=x.device, dtype=x.dtype).reshape(1, 1, -1, 1) / height
    columns = torch.arange(width, device=x.device, dtype=x.dtype).reshape(1, 1, 1, -1) / width
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * (up * rows + across * columns) + phase)
    return torch.where(kind == 0, other, torch.where(kind == 1, smooth, torch.where(kind == 2, noise, wave)))


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator, like: Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32).to(like.device)
    return low + (high - low) * drawn


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Return a whole number from low to high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device="cpu"))
