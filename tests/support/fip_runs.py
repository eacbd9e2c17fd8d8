"""A small net, images for it and a run: what the tests of FIP and worst-case FIP share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods import MethodConfig
from fastfip.methods.base import Run


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]
    model = nn.Sequential(*layers).to(dtype)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def data(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 4


def make_run(config: MethodConfig, model: nn.Module, classes: int | None = 4) -> Run:
    x, y = data()
    return Run(
        model=model,
        task=Task(),
        clean=CleanSet.of((x, y)),
        config=config,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=classes,
        total_steps=10,
    )
