"""Remove a backdoor from a classifier of point clouds: PointNet on ModelNet10.

    python examples/point_clouds.py --data modelnet10.npz

`--data` is a file with `train_x` [N, P, 3], `train_y` [N], `test_x` and `test_y`; without it FASTFIP_DATA is looked in,
and where there is none either, clouds of five solids are drawn instead, which is said. Of a tenth of the training
clouds, twelve points are moved onto a small ball beside the object, and the label becomes 0. The model is then purified
with clean clouds that it was not trained on, a twentieth as many. One to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastfip
from fastfip.attacks.point_cluster import PointCluster
from fastfip.testing.nets import PointNet
from fastfip.testing.shapes import solid_clouds

POINTS = 256
WIDTHS, HIDDEN = (64, 64, 64, 128, 256), 128
Clouds = tuple[Tensor, Tensor]
#: The triggers: how many points lie where, and the class that they lead to.
ATTACKS = {
    "cluster": (PointCluster(points=12), 0),
    "low_cluster": (PointCluster(points=16, radius=0.08, centre=(-0.6, 0.0, 0.5), seed=3), 1),
}


@dataclass
class Data:
    """Clouds [N, 256, 3] in a ball of radius 1 and classes [N]: to train with, to purify with, to test with."""

    train: Clouds
    clean: Clouds
    test: Clouds
    classes: int
    said: str


def data(file: Path | None = None, seed: int = 0, clean: int | None = None) -> Data:
    """Read ModelNet10, or draw solids; a twentieth of the training clouds, or so many, is for purification alone."""
    if file is None and "FASTFIP_DATA" in os.environ:
        file = Path(os.environ["FASTFIP_DATA"]) / "modelnet10.npz"
    generator = torch.Generator().manual_seed(seed)
    if file is not None and file.exists():
        with np.load(file) as found:
            x, test_x = (_fitted(torch.from_numpy(found[f"{part}_x"][:, :POINTS])) for part in ("train", "test"))
            y, test_y = (torch.from_numpy(found[f"{part}_y"]).long() for part in ("train", "test"))
        said = "ModelNet10"
    else:
        (x, y), (test_x, test_y) = (solid_clouds(n, generator, POINTS) for n in (800, 300))
        said = "clouds of five solids, drawn here (no file with ModelNet10 was given)"
    order = torch.randperm(len(y), generator=generator)
    kept, rest = order.tensor_split([len(y) // 20 if clean is None else clean])
    return Data((x[rest], y[rest]), (x[kept], y[kept]), (test_x, test_y), int(y.max()) + 1, said)


def _fitted(x: Tensor) -> Tensor:
    """Return clouds moved and scaled into the ball of radius 1 about 0."""
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=2).amax(1)[:, None, None]


def backdoored(attack: str, given: Data, epochs: int, seed: int = 0, rate: float = 0.1) -> nn.Module:
    """Train PointNet on clouds of which the share `rate` carries the trigger; 0: a clean model."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trigger, target = ATTACKS[attack]
    x, y = given.train
    if rate > 0:
        x, y, _ = trigger.poison(x, y, rate=rate, target=target, classes=given.classes, generator=generator)
    model = PointNet(given.classes, widths=WIDTHS, hidden=HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    steps = epochs * (len(y) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator)[: len(y) // 32 * 32].split(32):
            noise = 0.01 * torch.randn(x[index].shape, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index] + noise), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def rates(model: nn.Module, given: Data, attack: str) -> tuple[float, float]:
    """Return accuracy and attack success on the test set, in percent."""
    trigger, target = ATTACKS[attack]
    found = fastfip.evaluate(model, [given.test], [trigger.asr_set(*given.test, target=target)])
    return 100 * (found.acc or 0), 100 * (found.asr or 0)


def main(words: list[str] | None = None) -> None:
    """Train, purify, and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--attack", choices=sorted(ATTACKS), default="cluster")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few seconds, with hardly any training")
    args = parser.parse_args(words)
    given = data(args.data)
    if args.quick:
        given.train, given.clean, given.test = (
            (x[:256, :64], y[:256]) for x, y in (given.train, given.clean, given.test)
        )
    print(f"data: {given.said}; {len(given.train[1])} clouds to train with, {len(given.clean[1])} clean ones to purify")
    model = backdoored(args.attack, given, 1 if args.quick else args.epochs)
    before = rates(model, given, args.attack)
    result = fastfip.purify(model, given.clean, steps=4 if args.quick else None, force=args.quick, progress=False)
    after = rates(result.model, given, args.attack)
    print(f"as received: {before[0]:.1f} % of the clouds are right; the trigger works on {before[1]:.1f} %")
    print(f"purified:    {after[0]:.1f} % of the clouds are right; the trigger works on {after[1]:.1f} %")
    for alert in result.alerts:
        print(alert)


if __name__ == "__main__":
    main()
