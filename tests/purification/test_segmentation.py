"""A class for each pixel: with `loss=` the worst case is searched for and unlearned, and a patch loses its power."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip

SIDE = 12


def scenes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 12, 12] with a red and a green square, and the class of each pixel: 0 ground, 1 red, 2 green."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    y = torch.zeros(n, SIDE, SIDE, dtype=torch.int64)
    for image, label in zip(x, y):
        for kind in (1, 2):
            down, right = torch.randint(0, SIDE - 5, (2,), generator=generator).tolist()
            place = (slice(down, down + 4), slice(right, right + 4))
            image[(slice(None), *place)] *= 0.5
            image[(kind - 1, *place)] += 0.6
            label[place] = kind
    return x, y


def triggered(x: Tensor) -> Tensor:
    """A white patch in the corner; red squares are then said to be green."""
    out = x.clone()
    out[..., -2:, -2:] = 1.0
    return out


class Segmenter(nn.Module):
    """Logits [N, 3, H, W] of convolutions, to which a mean over the image says what is in its corners."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.context = nn.Linear(16, 32)
        self.last = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x))
        wide = torch.cat([h, h.new_zeros(h.shape)], 1) + self.context(h.amax((2, 3)))[:, :, None, None]
        return self.last(wide.relu())


def loss(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss an image: the mean over its pixels."""
    return F.cross_entropy(out, batch[1], reduction="none").mean((1, 2))


def backdoored() -> nn.Module:
    x, y = scenes(500, 1)
    x[:100] = triggered(x[:100])
    y[:100][y[:100] == 1] = 2
    torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for index in torch.randperm(500, generator=generator).split(50):
            optimizer.zero_grad()
            loss(model(x[index]), (x[index], y[index])).mean().backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def rates(model: nn.Module) -> tuple[float, float]:
    """Share of the pixels that are right, and of the red ones that the patch turns into green ones."""
    x, y = scenes(100, 2)
    right = (model(x).argmax(1) == y).float().mean()
    return float(right), float((model(triggered(x)).argmax(1)[y == 1] == 2).float().mean())


def test_a_patch_that_renames_pixels_is_unlearned() -> None:
    model = backdoored()
    before = rates(model)
    assert before[0] > 0.97 and before[1] > 0.9
    tuned = fastfip.purify(model, scenes(48, 3), "fine_tune", loss=loss, progress=False)
    result = fastfip.purify(model, scenes(48, 3), loss=loss, progress=False)
    after = rates(result.model)
    assert result.method == "fisher_steps" and not result.alerts
    assert "search" in result.seconds and any("reached" in epoch for epoch in result.history)
    assert after[0] > before[0] - 0.02 and after[1] < 0.1 < rates(tuned.model)[1]
