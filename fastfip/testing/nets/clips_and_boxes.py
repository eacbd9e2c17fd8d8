"""Small nets of videos and of object detection: an R(2+1)D and an SSD.

R(2+1)D: Tran et al., CVPR 2018, arXiv 1711.11248. SSD: Liu et al., ECCV 2016, arXiv 1512.02325.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.metrics.detection import overlap

__all__ = ["SSD", "VideoResNet"]


class _Conv2Plus1D(nn.Sequential):
    """A convolution over space, then one over time."""

    def __init__(self, a: int, b: int, stride: int = 1, in_time: int = 1) -> None:
        super().__init__(
            nn.Conv3d(a, b, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(b),
            nn.ReLU(),
            nn.Conv3d(b, b, (3, 1, 1), (in_time, 1, 1), (1, 0, 0), bias=False),
        )


class _VideoBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _Conv2Plus1D(a, b, stride, stride), nn.BatchNorm3d(b)
        self.conv2, self.bn2 = _Conv2Plus1D(b, b), nn.BatchNorm3d(b)
        self.short = nn.Sequential()
        if stride > 1 or a != b:
            self.short = nn.Sequential(nn.Conv3d(a, b, 1, stride, bias=False), nn.BatchNorm3d(b))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.short(x)).relu()


class VideoResNet(nn.Module):
    """R(2+1)D: residual blocks whose convolutions are one over space and one over time; clips [N, 3, T, H, W]."""

    def __init__(self, classes: int = 8, widths: tuple[int, ...] = (12, 24, 48)) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Conv2Plus1D(3, widths[0], 2), nn.BatchNorm3d(widths[0]), nn.ReLU())
        blocks = [_VideoBlock(a, b, 1 + (i > 0)) for i, (a, b) in enumerate(zip((widths[0], *widths), widths))]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3, 4)))


class SSD(nn.Module):
    """A single-shot detector with square anchors on two maps, of stride 4 and 8; images [N, 3, H, W].

    Returns [N, A, classes + 1 + 4]: for each anchor the logits of "nothing" and of the classes 1 to `classes`, and how
    its box differs from the anchor: (x, y) of the centre over the anchor's side, times 10, and the logarithm of (width,
    height) over it, times 5.

    Attributes:
        sides: of the anchors in pixels: on the finer map the first one, on the coarser map the others.
    """

    def __init__(self, classes: int = 4, width: int = 16, sides: tuple[float, ...] = (11.0, 14.0, 18.0)) -> None:
        super().__init__()
        self.classes, self.sides = classes, sides
        self.fine = nn.Sequential(
            *_conv(3, width, 2),
            *_conv(width, 2 * width, 1),
            *_conv(2 * width, 4 * width, 2),
            *_conv(4 * width, 4 * width, 1),
        )
        self.coarse = nn.Sequential(*_conv(4 * width, 4 * width, 2), *_conv(4 * width, 4 * width, 1))
        self.heads = nn.ModuleList(
            nn.Conv2d(4 * width, n * (classes + 5), 3, padding=1) for n in (1, len(sides) - 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        out = []
        for head, features in zip(self.heads, (fine, self.coarse(fine))):
            made = head(features)
            out.append(made.flatten(2).transpose(1, 2).reshape(len(x), -1, self.classes + 5))
        return torch.cat(out, 1)

    def anchors(self, height: int, width: int) -> Tensor:
        """Return the anchors [A, 4] of images of a size in pixels, as (centre x, centre y, width, height)."""
        out = []
        for stride, sides in ((4, self.sides[:1]), (8, self.sides[1:])):
            rows, columns = (stride * (torch.arange(-(-size // stride)) + 0.5) for size in (height, width))
            y, x, side = torch.meshgrid(rows, columns, torch.tensor(sides), indexing="ij")
            out.append(torch.stack([x, y, side, side], -1).reshape(-1, 4))
        return torch.cat(out)

    def losses(self, out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of each image [N]: cross-entropy of the anchors and smooth L1 of the boxes of those matched.

        An anchor is matched with the object that it overlaps most, if by half or more (IoU), and each object with the
        anchor that overlaps it most. Of the others those three times as many count that are most wrong.

        Args:
            out: of `forward`, [N, A, classes + 5].
            batch: images [N, 3, H, W], and objects [N, K, 5], (label, x1, y1, x2, y2) in pixels; label 0: none.
        """
        images, objects = batch
        anchors = self.anchors(*images.shape[2:]).to(out.device)
        with torch.no_grad():
            label, box = _matched(anchors, objects)
        matched = label > 0
        count = matched.sum(1).clamp_min(1)
        entropy = F.cross_entropy(out[..., :-4].transpose(1, 2), label, reduction="none")
        with torch.no_grad():
            order = entropy.masked_fill(matched, -1.0).argsort(1, descending=True).argsort(1)
            hard = (order < 3 * count[:, None]) & ~matched
        wrong = (entropy * (matched | hard)).sum(1)
        placed = F.smooth_l1_loss(out[..., -4:], _encoded(box, anchors), reduction="none").sum(2)
        return (wrong + (placed * matched).sum(1)) / count

    @torch.no_grad()
    def detections(self, images: Tensor, threshold: float = 0.05) -> list[dict[str, Tensor]]:
        """Return what is detected in images [N, 3, H, W]: a dict of boxes [K, 4], labels [K] and scores [K] for each.

        Args:
            images: as `forward` takes them.
            threshold: least score of a box.
        """
        out = self(images)
        anchors = self.anchors(*images.shape[2:]).to(out.device)
        share = out[..., :-4].softmax(2)
        centre = anchors[:, :2] + out[..., -4:-2] / 10 * anchors[:, 2:]
        half = anchors[:, 2:] * (out[..., -2:] / 5).clamp(max=2).exp() / 2
        boxes = torch.cat([centre - half, centre + half], 2)
        return [_best(*of_image, threshold) for of_image in zip(boxes, share)]


def _conv(a: int, b: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()


def _matched(anchors: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label [N, A] (0: nothing) and the box [N, A, 4] that each anchor has to say."""
    corners = torch.cat([anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2], 1)
    there = objects[..., 0] > 0
    share = overlap(corners.expand(len(objects), -1, -1), objects[..., 1:])  # [N, A, K]
    share = share.masked_fill(~there[:, None], -1.0)
    best, which = share.max(2)
    for k in range(objects.shape[1]):
        mine = there[:, k].nonzero().flatten()
        anchor = share[mine, :, k].argmax(1)
        best[mine, anchor], which[mine, anchor] = 1.0, k
    picked = objects.gather(1, which[..., None].expand(-1, -1, 5))
    return torch.where(best >= 0.5, picked[..., 0], 0.0).long(), picked[..., 1:]


def _encoded(box: Tensor, anchors: Tensor) -> Tensor:
    centre = (box[..., :2] + box[..., 2:]) / 2
    size = (box[..., 2:] - box[..., :2]).clamp_min(1e-3)
    return torch.cat([10 * (centre - anchors[:, :2]) / anchors[:, 2:], 5 * (size / anchors[:, 2:]).log()], -1)


def _best(boxes: Tensor, share: Tensor, threshold: float, most: int = 30) -> dict[str, Tensor]:
    """Return the boxes of one image above a threshold, without those that repeat a better one of their class."""
    score, label = share[:, 1:].max(1)
    order = score.argsort(descending=True)[:most]
    order = order[score[order] >= threshold]
    boxes, score, label = boxes[order], score[order], label[order] + 1
    again = (overlap(boxes, boxes) > 0.45) & (label[:, None] == label[None])
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(1, len(order)):
        keep[i] = not bool((again[i, :i] & keep[:i]).any())
    return {"boxes": boxes[keep], "labels": label[keep], "scores": score[keep]}
