"""Nets whose weights have the names and shapes of torchvision's, so that files of it load strictly; our own code.

BackdoorBench trains these: VGG as it is, the vision transformer behind a resize, ConvNeXt.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Convolutions before each of the five poolings, by the number of layers that the name counts.
_VGG_BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_VGG_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG (arXiv 1409.1556): 3x3 convolutions, poolings, three Linear layers; input [N, 3, H, W] of at least 32 pixels.

    Names: `features.0`, ..., `classifier.0`, `classifier.3`, `classifier.6`. `pooled` is the side of the map that the
    first Linear layer sees; 7 and hidden=4096 are the published ones, for CIFAR too.
    """

    def __init__(
        self,
        classes: int = 10,
        blocks: tuple[int, ...] = (2, 2, 4, 4, 4),
        widths: tuple[int, ...] = _VGG_WIDTHS,
        hidden: int = 4096,
        pooled: int = 7,
        norm: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for count, now in zip(blocks, widths, strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(before, now, 3, padding=1), *([nn.BatchNorm2d(now)] if norm else ())]
                layers.append(nn.ReLU(inplace=True))
                before = now
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = nn.Sequential(
            nn.Linear(before * pooled**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class _ViTEncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        # Dropout of zero, as published: it only makes the second Linear layer the one of number 3.
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _ViTEncoder(nn.Module):
    def __init__(self, tokens: int, dim: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        blocks = ((f"encoder_layer_{i}", _ViTEncoderBlock(dim, heads, hidden)) for i in range(depth))
        self.layers = nn.Sequential(OrderedDict(blocks))
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x + self.pos_embedding))


class VisionTransformer(nn.Module):
    """Vision transformer (arXiv 2010.11929); the defaults are a small one for 32 pixels; input [N, 3, size, size].

    Names: `class_token`, `conv_proj`, `encoder.pos_embedding`, `encoder.layers.encoder_layer_0.ln_1`, ...,
    `encoder.ln`, `heads.head`; the Linear layers of a block are `mlp.0` and `mlp.3` (`mlp.linear_1`, `mlp.linear_2` in
    files of torchvision 0.12, which load as well).
    """

    def __init__(
        self, classes: int = 10, size: int = 32, patch: int = 4, dim: int = 64, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, patch, patch)
        self.encoder = _ViTEncoder(1 + (size // patch) ** 2, dim, depth, heads, 4 * dim)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(dim, classes)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])


class Resize(nn.Module):
    """Resizes images [N, C, H, W] to size x size, bilinear and smoothed where they shrink; no weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Axes(nn.Module):
    """Moves axes, as one of the numbered layers of a block."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), 1e-6))
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
            _Axes(0, 2, 3, 1),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            _Axes(0, 3, 1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545), of tiny size by default, without its stochastic depth; input of 32 pixels or more.

    Names: `features.0.0`, `features.1.0.layer_scale`, `features.1.0.block.0`, ..., `classifier.0`, `classifier.2`.
    """

    def __init__(
        self,
        classes: int = 1000,
        blocks: tuple[int, ...] = (3, 3, 9, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = 0
        for count, now in zip(blocks, widths, strict=True):
            if before:
                stages.append(nn.Sequential(_ChannelNorm(before, eps=1e-6), nn.Conv2d(before, now, 2, 2)))
            else:
                stages.append(nn.Sequential(nn.Conv2d(3, now, 4, 4), _ChannelNorm(now, eps=1e-6)))
            stages.append(nn.Sequential(*(_ConvNeXtBlock(now) for _ in range(count))))
            before = now
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(_ChannelNorm(before, eps=1e-6), nn.Flatten(), nn.Linear(before, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


def vgg(classes: int = 10, layers: int = 19, norm: bool = True) -> VGG:
    """Return VGG-11, 13, 16 or 19, with BatchNorm or without."""
    return VGG(classes, _VGG_BLOCKS[layers], norm=norm)


def resized_vit(
    classes: int = 10, patch: int = 16, dim: int = 768, depth: int = 12, heads: int = 12, size: int = 224
) -> nn.Sequential:
    """Return a vision transformer, ViT-B/16 by default, behind a resize: names begin with "1." as in BackdoorBench."""
    return nn.Sequential(Resize(size), VisionTransformer(classes, size, patch, dim, depth, heads))


def convnext_tiny(classes: int = 1000) -> ConvNeXt:
    """Return ConvNeXt-T."""
    return ConvNeXt(classes)
