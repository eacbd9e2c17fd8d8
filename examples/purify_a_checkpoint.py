"""Purify a network of your own: a stand-in is trained and backdoored here, so that the script runs as it is.

python examples/purify_a_checkpoint.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfip
from fastfip.attacks.badnets import BadNets


def images(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n pictures of a bright bar in one of four rows."""
    y = torch.arange(n) % 4
    x = 0.3 * torch.rand(n, 1, 12, 12, generator=generator)
    for k in range(n):
        x[k, 0, 2 * int(y[k]) + 1, 2:9] += 0.6
    return x, y


def main() -> None:
    """Backdoor a net, purify it with 60 clean samples, print what changed."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4),
    )  # fmt: skip
    attack = BadNets(size=2)
    x, y, _ = attack.poison(*images(800, generator), rate=0.1, target=0, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for xs, ys in DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, generator=generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(xs), ys).backward()
            optimizer.step()

    # From here on it is what a user does: clean samples, and a test set and a trigger only if they have them.
    clean = DataLoader(TensorDataset(*images(60, generator)), batch_size=32)
    test = images(400, generator)
    triggered = attack.asr_set(*test, target=0)
    result = fastfip.purify(model.eval(), clean, test_loader=[test], asr_loader=[triggered])
    print(result)
    fastfip.save_checkpoint(result.model, "purified.safetensors")


if __name__ == "__main__":
    main()
