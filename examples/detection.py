"""Remove a backdoor from an object detector: a small SSD on scenes of shapes.

    python examples/detection.py

The scenes are drawn here, no real data: one to three shapes of four classes with their boxes. A share of the training
scenes carries small chessboard patches, and boxes or labels that go with them: with `--attack regional` an object with
a patch on its corner is said to be a disc, with `disappearance` a cross with a patch is said not to be there, with
`generation` there is said to be a square where the patch is. The detector is then purified with 200 clean scenes that
it was not trained on. Its outputs are no logits of classes, so `purify` is given the loss of each scene, `loss=`. One
to two minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import fastfip
from fastfip.attacks.detection.baddet import BadDet
from fastfip.metrics.detection import average_precision, detection_success
from fastfip.testing.nets import SSD
from fastfip.testing.shapes import packed, shape_scenes

Scenes = tuple[list[Tensor], list[dict[str, Tensor]]]
ATTACKS = {
    "regional": BadDet("regional", target=1, size=4, alpha=1.0),
    "disappearance": BadDet("disappearance", target=2, size=4, alpha=1.0),
    "generation": BadDet("generation", target=3, size=4, alpha=1.0, box=(14.0, 14.0)),
}


@dataclass
class Data:
    """Scenes: images [3, 48, 48] in [0, 1] and their boxes and labels, to train with, to purify with, to test with."""

    train: Scenes
    clean: Scenes
    test: Scenes


def data(n: int = 2400, clean: int = 200, tested: int = 400, seed: int = 0) -> Data:
    """Draw scenes: so many to train with, to purify with, to test with."""
    generator = torch.Generator().manual_seed(seed)
    return Data(*(shape_scenes(size, generator) for size in (n, clean, tested)))


def backdoored(attack: str, given: Data, epochs: int, seed: int = 0) -> SSD:
    """Train an SSD on scenes of which 15 % carry the trigger."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, targets, _ = ATTACKS[attack].poison(*given.train, rate=0.15, generator=generator)
    x, y = packed(images, targets)
    model = SSD()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * -(-len(y) // 32))
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            model.losses(model(x[index]), (x[index], y[index])).mean().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def rates(model: SSD, given: Data, attack: str) -> tuple[float, float]:
    """Return the mean average precision at an IoU of 0.5, and the attack's success, on the test set, in percent."""
    images, targets = given.test
    precision = average_precision(model.detections(torch.stack(images)), targets)
    triggered, wanted, true = ATTACKS[attack].asr_set(images, targets)
    return 100 * precision, 100 * detection_success(model.detections(torch.stack(triggered)), wanted, true)


def main(words: list[str] | None = None) -> None:
    """Train, purify, and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=sorted(ATTACKS), default="regional")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a few seconds, with hardly any training")
    args = parser.parse_args(words)
    given = data(160, 8, 60) if args.quick else data()
    print(f"data: drawn scenes; {len(given.train[1])} to train with, {len(given.clean[1])} clean ones to purify")
    model = backdoored(args.attack, given, 1 if args.quick else args.epochs)
    before = rates(model, given, args.attack)
    steps = 4 if args.quick else None
    clean = packed(*given.clean)
    result = fastfip.purify(model, clean, loss=model.losses, steps=steps, progress=False)
    after = rates(result.model, given, args.attack)
    print(f"as received: mean average precision {before[0]:.1f} %; the attack has its way in {before[1]:.1f} %")
    print(f"purified:    mean average precision {after[0]:.1f} %; the attack has its way in {after[1]:.1f} %")
    for alert in result.alerts:
        print(alert)


if __name__ == "__main__":
    main()
