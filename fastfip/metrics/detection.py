"""How a detector does: average precision, and how often an attack on it has its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastfip.errors import DataError

__all__ = ["average_precision", "detection_success", "overlap"]

Boxes = Mapping[str, Tensor]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union [..., A, B] of boxes a [..., A, 4] and b [..., B, 4], as (x1, y1, x2, y2)."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1) for boxes in (a, b)]
    return both / (areas[0][..., :, None] + areas[1][..., None, :] - both).clamp_min(1e-9)


def average_precision(found: Sequence[Boxes], targets: Sequence[Boxes], iou: float = 0.5) -> float:
    """Return the mean over classes of the average precision, in [0, 1]: the area under precision over recall.

    As in the PASCAL VOC benchmark since 2010: going down the scores, a box is right if it overlaps an object of its
    class that no better box has had; precision at a recall is the best at that recall or a higher one.

    Args:
        found: for each image `boxes` [K, 4], `labels` [K], `scores` [K], as torchvision's detectors return them.
        targets: for each image `boxes` [M, 4] and `labels` [M]. Classes that are in none of them do not count.
        iou: least intersection over union of a box and its object.

    Raises:
        DataError: different numbers of images, or no object at all.
    """
    _check(found, targets)
    classes = sorted({int(label) for target in targets for label in target["labels"]})
    if not classes:
        raise DataError("the targets hold no object: average precision needs some")
    return sum(_of_class(found, targets, c, iou) for c in classes) / len(classes)


def _of_class(found: Sequence[Boxes], targets: Sequence[Boxes], c: int, iou: float) -> float:
    ranked: list[tuple[float, bool]] = []
    objects = 0
    for got, target in zip(found, targets):
        mine = got["labels"] == c
        scores, order = got["scores"][mine].sort(descending=True, stable=True)
        boxes = target["boxes"][target["labels"] == c]
        share = overlap(got["boxes"][mine][order], boxes.to(got["boxes"]))
        free = [True] * len(boxes)
        objects += len(boxes)
        for score, row in zip(scores.tolist(), share.tolist()):
            best = max(range(len(row)), key=lambda k: row[k] if free[k] else -1.0, default=-1)
            hit = best >= 0 and free[best] and row[best] >= iou
            if hit:
                free[best] = False
            ranked.append((score, hit))
    if not ranked:
        return 0.0
    ranked.sort(key=lambda pair: -pair[0])
    hits = torch.tensor([hit for _, hit in ranked], dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hits).sum()) / objects


def detection_success(
    found: Sequence[Boxes],
    wanted: Sequence[Boxes],
    true: Sequence[Boxes],
    iou: float = 0.5,
    score: float = 0.5,
) -> float:
    """Return the share of what an attack on a detector changes that it gets, in [0, 1].

    An object that only the attacker wants to be there (a new one, or one with another label) counts as got if it is
    detected: a box of its label, of so high a score, overlaps it so much. An object that is there, in a place where the
    attacker wants none, counts as got if it is not detected.

    Args:
        found: for each triggered image `boxes` [K, 4], `labels` [K], `scores` [K].
        wanted: the attacker's targets, the second of what `DetectionAttack.asr_set` returns.
        true: the true ones, the third.
        iou: least intersection over union of a box and an object.
        score: least score of a box.

    Raises:
        DataError: different numbers of images, or nothing that the attacker changes.
    """
    _check(found, wanted)
    _check(found, true)
    got: list[bool] = []
    for boxes, new, old in zip(found, wanted, true):
        seen = _seen(boxes, new, iou, score)
        same = (new["boxes"][:, None] == old["boxes"][None]).all(2)
        kept = (same & (new["labels"][:, None] == old["labels"][None])).any(1)
        got += seen[~kept].tolist()
        got += (~_seen(boxes, old, iou, score)[~same.any(0)]).tolist()
    if not got:
        raise DataError("the attacker's targets are the true ones: there is no attack to measure")
    return sum(got) / len(got)


def _seen(found: Boxes, target: Boxes, iou: float, score: float) -> Tensor:
    """Return which objects of a target [M] are detected."""
    share = overlap(target["boxes"].to(found["boxes"]), found["boxes"])
    right = (target["labels"].to(found["labels"])[:, None] == found["labels"][None]) & (found["scores"] >= score)[None]
    return ((share >= iou) & right).any(1).cpu()


def _check(found: Sequence[Boxes], targets: Sequence[Boxes]) -> None:
    if len(found) != len(targets):
        raise DataError(f"{len(found)} images were looked at, and there are {len(targets)} targets: give one for each")
