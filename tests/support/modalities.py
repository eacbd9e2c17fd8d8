"""Samples of each modality that an attack may be for, and the settings that an attack cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip import attacks
from fastfip.attacks import Attack
from tests.support.attack_ground import squares

VOCABULARY, PADDING = 50, 0


def texts(n: int, width: int = 12, seed: int = 0) -> Tensor:
    """Token ids [n, width] from 10 on, of 5 tokens to all, padded at the right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(10, VOCABULARY, (n, width), generator=generator)
    lengths = torch.randint(5, width + 1, (n, 1), generator=generator)
    return torch.where(torch.arange(width) < lengths, x, PADDING)


def clouds(n: int, points: int = 64, seed: int = 0) -> Tensor:
    """Points [n, points, 3] in a cube about 0."""
    return 2 * torch.rand(n, points, 3, generator=torch.Generator().manual_seed(seed)) - 1


def clips(n: int, seed: int = 0) -> Tensor:
    """Clips [n, 3, 2, 28, 28] in [0, 1]."""
    return torch.rand(n, 3, 2, 28, 28, generator=torch.Generator().manual_seed(seed))


MODALITIES = {"images": lambda n: squares(n)[0], "tokens": texts, "points": clouds, "clips": clips}
SETTINGS = {"words": {"ids": (3, 4, 5)}, "sentence": {"ids": (6, 7, 8)}}


def made(name: str) -> Attack:
    """Return an attack with its usual settings, and those that it needs."""
    return attacks.get(name)(**SETTINGS.get(name, {}))
