"""What an attack that trains something is given in tests: a small net that knows four classes of small images."""

import functools

import torch
from torch import nn

from fastfip.attacks import Ground
from fastfip.nets.state import copied

CLASSES = 4
MEAN, STD = 0.4, 0.3


def squares(n: int = 160, size: int = 16, channels: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [n, channels, size, size] in [0, 1] with a brighter quarter, another for each class; labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.6 * torch.rand(n, channels, size, size, generator=generator), torch.arange(n) % CLASSES
    half = size // 2
    for c in range(CLASSES):
        top, left = half * (c // 2), half * (c % 2)
        x[y == c, :, top : top + half, left : left + half] += 0.3
    return x, y


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN) / STD


@functools.cache
def _trained(size: int, channels: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, CLASSES),
        )  # fmt: skip
        x, y = squares(size=size, channels=channels)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(normalise(x)), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        return net.eval()


def ground(target=2, size: int = 16, channels: int = 3, effort: float = 0.05, seed: int = 0) -> Ground:
    """Return the ground of an attack: a copy of the trained net, 160 images [160, channels, size, size], 4 classes."""
    x, y = squares(size=size, channels=channels)
    net = copied(_trained(size, channels), "")
    return Ground(net, x, y, target, CLASSES, normalise, torch.Generator().manual_seed(seed), effort)
