"""Video: R(2+1)D on drawn clips with a patch in every frame; see `examples/video.py`."""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.tasks import Case
from examples import video as example
from fastfip.testing.nets import VideoResNet

ATTACKS = ("white_patch", "checker_patch")
EPOCHS = 8


def make(attack: str, seed: int) -> Case:
    """Return R(2+1)D with one of the two triggers, 5 % clean clips, and others to test with."""
    given = example.data(clean=100, seed=seed)
    kept = harness.cache_dir() / f"tasks-video-{attack}-{seed}.pt"
    if kept.exists():
        model = VideoResNet(example.CLASSES).eval()
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = example.backdoored(attack, given, EPOCHS, seed)
        torch.save(model.state_dict(), kept)
    said = f"R(2+1)D, drawn clips: {len(given.train[1])} trained on, {len(given.clean[1])} others clean"
    return Case(model, given.clean, lambda net: example.rates(net, given, attack), "accuracy", said)
