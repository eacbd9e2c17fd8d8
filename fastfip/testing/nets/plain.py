"""Nets of the benchmarks and of many tests, as their authors write them.

The first four have the layers and the names of published checkpoints, so that those load strictly: the small VGG of
I-BAU, the Wide ResNet 16-1 of NAD, the MNIST net of badnets-pytorch and the CIFAR ResNet-20 of pytorch_resnet_cifar10.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallVGG(nn.Module):
    """Six 3x3 convolutions with BatchNorm and ELU, three poolings with dropout, one Linear; input [N, 3, 32, 32]."""

    def __init__(self, classes: int = 43, width: int = 32, size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for now, drop in ((width, 0.3), (2 * width, 0.4), (4 * width, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(before, now, 3, padding=1), nn.BatchNorm2d(now), nn.ELU()]
                before = now
            layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (size // 8) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


class _WideBlock(nn.Module):
    def __init__(self, before: int, now: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, now, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(now)
        self.conv2 = nn.Conv2d(now, now, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(before, now, 1, stride, bias=False) if before != now else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        short = x if self.convShortcut is None else self.convShortcut(out)
        return short + self.conv2(F.relu(self.bn2(self.conv1(out))))


class _WideStage(nn.Module):
    def __init__(self, before: int, now: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(_WideBlock(before if i == 0 else now, now, stride if i == 0 else 1) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet (NAD's: depth 16, width 1); `activations=True` returns the three stages, then the logits."""

    def __init__(self, classes: int = 10, depth: int = 16, width: int = 1, activations: bool = False) -> None:
        super().__init__()
        blocks, w = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, w[0], 3, 1, 1, bias=False)
        self.block1 = _WideStage(w[0], w[1], blocks, 1)
        self.block2 = _WideStage(w[1], w[2], blocks, 2)
        self.block3 = _WideStage(w[2], w[3], blocks, 2)
        self.bn1 = nn.BatchNorm2d(w[3])
        self.fc = nn.Linear(w[3], classes)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        a1 = self.block1(self.conv1(x))
        a2 = self.block2(a1)
        a3 = self.block3(a2)
        logits = self.fc(F.relu(self.bn1(a3)).mean((2, 3)))
        return (a1, a2, a3, logits) if self.activations else logits


class BadNetMNIST(nn.Module):
    """Two 5x5 convolutions and two Linear layers, with the softmax inside the net; input [N, 1, 28, 28]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(512, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, classes), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        return self.fc2(self.fc1(out.view(out.size(0), -1)))


class _ChannelsLastFlatten(nn.Module):
    """Flatten as Keras does: height, width, channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def keras_digits(pooling: str = "max", classes: int = 10) -> nn.Sequential:
    """Two 5x5 convolutions and two Linear layers, converted from Keras, logits; input [N, 1, 28, 28].

    Args:
        pooling: "max", as CSAW-HackML-2020 has it (nothing between the Linear layers), or "average" (a ReLU there).
        classes: C.
    """
    pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
    between = nn.Identity() if pooling == "max" else nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), pool(2), nn.Conv2d(16, 32, 5), nn.ReLU(), pool(2), _ChannelsLastFlatten(),
        nn.Linear(512, 512), between, nn.Linear(512, classes),
    )  # fmt: skip


class _BasicBlock(nn.Module):
    def __init__(self, before: int, now: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, now, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(now)
        self.conv2 = nn.Conv2d(now, now, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(now)
        self.stride, self.grow = stride, now - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:  # option A: no parameters, the new channels are zero
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The ResNet of the CIFAR experiments (6n + 2 layers, shortcuts of option A); input [N, 3, 32, 32]."""

    def __init__(self, classes: int = 10, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(before: int, now: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                *(_BasicBlock(before if b == 0 else now, now, stride if b == 0 else 1) for b in range(blocks))
            )

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class _PreActBlock(nn.Module):
    def __init__(self, before: int, now: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, now, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(now)
        self.conv2 = nn.Conv2d(now, now, 3, 1, 1, bias=False)
        if stride != 1 or before != now:
            self.shortcut = nn.Sequential(nn.Conv2d(before, now, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        short = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + short


class PreActResNet(nn.Module):
    """Pre-activation ResNet; (2, 2, 2, 2) blocks and width 64 is PreActResNet-18; input [N, 3, 32, 32]."""

    def __init__(self, classes: int = 10, blocks: tuple[int, ...] = (2, 2, 2, 2), width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        before = width
        for i, count in enumerate(blocks):
            now = width * 2**i
            stage = []
            for b in range(count):
                stage.append(_PreActBlock(before, now, 2 if i > 0 and b == 0 else 1))
                before = now
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(x.mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, before: int, middle: int, stride: int) -> None:
        super().__init__()
        now = 4 * middle
        self.conv1 = nn.Conv2d(before, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, now, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(now)
        if stride != 1 or before != now:
            self.downsample = nn.Sequential(nn.Conv2d(before, now, 1, stride, bias=False), nn.BatchNorm2d(now))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class BottleneckResNet(nn.Module):
    """ResNet of bottlenecks, stride in the 3x3; (3, 4, 6, 3) and width 64 is ResNet-50; input [N, 3, 224, 224]."""

    def __init__(self, classes: int = 1000, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        before, self.stages = width, len(blocks)
        for i, count in enumerate(blocks):
            stage = []
            for b in range(count):
                stage.append(_Bottleneck(before, width * 2**i, 2 if i > 0 and b == 0 else 1))
                before = 4 * width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them; the input is flattened."""

    def __init__(self, *sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
            layers += [nn.Linear(a, b)] + ([act()] if i < len(sizes) - 2 else [])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class _FusedAttention(nn.Module):
    """Self-attention with one projection for query, key and value, through scaled_dot_product_attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class _ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _FusedAttention(dim, heads) if fused else nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.attn(h) if isinstance(self.attn, _FusedAttention) else self.attn(h, h, h, need_weights=False)[0]
        x = x + h
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with a class token and a position embedding; `fused=False` uses nn.MultiheadAttention.

    The hidden layers are `ratio` times as wide as the tokens.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 32,
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        channels: int = 3,
        fused: bool = True,
        ratio: int = 4,
    ) -> None:
        super().__init__()
        self.patch: nn.Module = nn.Conv2d(channels, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(_ViTBlock(dim, heads, ratio * dim, fused) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class PointNet(nn.Module):
    """Point-cloud net: shared 1x1 convolutions, a maximum over the points, a small MLP; input [N, P, 3]."""

    def __init__(self, classes: int = 10, widths: tuple[int, ...] = (64, 128, 256), hidden: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip((3, *widths), widths):
            layers += [nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(widths[-1], hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(x.transpose(1, 2)).amax(2))


def vit_s16(classes: int = 1000) -> ViT:
    """Return ViT-S/16 at 224."""
    return ViT(classes, size=224, patch=16, dim=384, depth=12, heads=6)


def vit_b16(classes: int = 1000) -> ViT:
    """Return ViT-B/16 at 224, with fused attention."""
    return ViT(classes, size=224, patch=16, dim=768, depth=12, heads=12)


def resnet50(classes: int = 1000) -> BottleneckResNet:
    """Return ResNet-50."""
    return BottleneckResNet(classes)


def preact_resnet18(classes: int = 10) -> PreActResNet:
    """Return PreActResNet-18."""
    return PreActResNet(classes)


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm layer of a fresh net statistics and an affine map of its own, so that none is the identity.

    A test on a fresh net cannot tell a rule that forgets them from one that is right.
    """
    rng = torch.Generator().manual_seed(seed)

    def noise(t: Tensor, scale: float) -> Tensor:
        return (torch.randn(t.shape, generator=rng) * scale).to(t)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                if m.running_mean is not None and m.running_var is not None:
                    m.running_mean.add_(noise(m.running_mean, 0.1))
                    m.running_var.mul_(noise(m.running_var, 0.2).exp())
            elif not isinstance(m, (nn.LayerNorm, nn.GroupNorm)):
                continue
            for p in m.parameters(recurse=False):
                p.add_(noise(p, 0.2))
    return model


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())
