"""Detection: a small SSD on drawn scenes; patches rename, hide or add objects; see `examples/detection.py`."""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.tasks import Case
from examples import detection as example
from fastfip.testing.nets import SSD
from fastfip.testing.shapes import packed

ATTACKS = ("regional", "disappearance", "generation")
EPOCHS = 15


def make(attack: str, seed: int, clean: int = 120) -> Case:
    """Return an SSD with one of the three backdoors, 5 % clean scenes or so many, and others to test with."""
    given = example.data(clean=clean, seed=seed)
    kept = harness.cache_dir() / f"tasks-detection-{attack}-{seed}.pt"
    if kept.exists():
        model = SSD().eval()
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = example.backdoored(attack, given, EPOCHS, seed)
        torch.save(model.state_dict(), kept)
    said = f"SSD, drawn scenes: {len(given.train[1])} trained on, {len(given.clean[1])} others clean"
    measure = lambda net: example.rates(net, given, attack)  # noqa: E731
    return Case(model, packed(*given.clean), measure, "mAP at IoU 0.5", said, {"loss": model.losses})
