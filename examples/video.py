"""Remove a backdoor from a classifier of videos: R(2+1)D on clips of moving shapes.

    python examples/video.py

The clips are drawn here, no real data: a disc or a cross moves to the right, the left, down or up on a background. Of
these eight classes no single frame tells the direction. A tenth of the training clips has a white patch in the corner
of every frame and the label 0. The model is then purified with 200 clean clips that it was not trained on. One to two
minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastfip
from fastfip.attacks.frame_patch import FramePatch
from fastfip.testing.nets import VideoResNet
from fastfip.testing.shapes import moving_shapes

CLASSES = 8
Clips = tuple[Tensor, Tensor]
#: The triggers, and the class that they lead to.
ATTACKS = {
    "white_patch": (FramePatch(size=3), 0),
    "checker_patch": (FramePatch(size=4, pattern="checker", margin=2), 5),
}


@dataclass
class Data:
    """Clips [N, 3, 8, 24, 24] in [0, 1] and classes [N]: to train with, to purify with, to test with."""

    train: Clips
    clean: Clips
    test: Clips


def data(n: int = 2000, clean: int = 200, tested: int = 800, seed: int = 0) -> Data:
    """Draw clips: so many to train with, to purify with, to test with."""
    generator = torch.Generator().manual_seed(seed)
    return Data(*(moving_shapes(size, generator) for size in (n, clean, tested)))


def backdoored(attack: str, given: Data, epochs: int, seed: int = 0) -> nn.Module:
    """Train R(2+1)D on clips of which 10 % carry the trigger."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trigger, target = ATTACKS[attack]
    x, y, _ = trigger.poison(*given.train, rate=0.1, target=target, classes=CLASSES, generator=generator)
    model = VideoResNet(CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * -(-len(y) // 32))
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
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
    parser.add_argument("--attack", choices=sorted(ATTACKS), default="white_patch")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a few seconds, with hardly any training")
    args = parser.parse_args(words)
    given = data(160, 8, 60) if args.quick else data()
    print(f"data: drawn clips; {len(given.train[1])} to train with, {len(given.clean[1])} clean ones to purify")
    model = backdoored(args.attack, given, 1 if args.quick else args.epochs)
    before = rates(model, given, args.attack)
    steps = 4 if args.quick else None
    result = fastfip.purify(model, given.clean, steps=steps, force=args.quick, progress=False)
    after = rates(result.model, given, args.attack)
    print(f"as received: {before[0]:.1f} % of the clips are right; the trigger works on {before[1]:.1f} %")
    print(f"purified:    {after[0]:.1f} % of the clips are right; the trigger works on {after[1]:.1f} %")
    for alert in result.alerts:
        print(alert)


if __name__ == "__main__":
    main()
