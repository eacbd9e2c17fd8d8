"""A tiny net with a planted backdoor, one with attention, and runs without the loop, for the tests of methods."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods.base import Run
from fastfip.methods.config import MethodConfig

CLASSES = 4
TARGET = 0


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in [0, 1]: the class is the bright quadrant."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.rand(n, 1, 8, 8, generator=generator)
    y = torch.arange(n) % CLASSES
    for k in range(n):
        r, c = divmod(int(y[k]), 2)
        x[k, 0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 0.3
    return x, y


def trigger(x: Tensor) -> Tensor:
    """A white corner."""
    x = x.clone()
    x[:, :, 6:, 6:] = 1.0
    return x


@functools.cache
def _trained(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, padding=1), *([nn.BatchNorm2d(12)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    x, y = images(256, 1)
    bad = trigger(x[:64])
    inputs, labels = torch.cat([x, bad]), torch.cat([y, torch.full((64,), TARGET)])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval()


def planted(norm: bool = False) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """Return a net that sends images with the trigger to TARGET, and clean images for its purification."""
    return copy.deepcopy(_trained(norm)), images(96, 2)


@torch.no_grad()
def rows(model: nn.Module) -> tuple[float, float]:
    """Return accuracy and attack success rate on other images."""
    x, y = images(200, 3)
    model.eval()
    acc = float((model(x).argmax(1) == y).float().mean())
    keep = y != TARGET
    return acc, float((model(trigger(x[keep])).argmax(1) == TARGET).float().mean())


def vit() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Patches, attention, LayerNorm, no BatchNorm."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.block, self.norm = nn.Conv2d(1, 8, 4, 4), block, nn.LayerNorm(8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.block(self.patch(x).flatten(2).mT)).mean(1))

    return Tiny(), images(24, 0)


def make_run(config: MethodConfig, model: nn.Module, batch: tuple[Tensor, Tensor], heldout: bool = False) -> Run:
    """Return a run on one batch, as `purify` makes it."""
    return Run(
        model=model,
        task=Task(),
        clean=CleanSet.of(batch),
        heldout=CleanSet.of(batch) if heldout else None,
        config=config,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        epoch=1,
        total_steps=10,
    )
