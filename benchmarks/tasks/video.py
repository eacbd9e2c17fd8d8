"""Video: R(2+1)D on drawn clips with a patch in every frame; see `examples/video.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.tasks import Case
from examples import video as example
from fastfip.attacks.frame_patch import FramePatch
from fastfip.testing.nets import VideoResNet

ATTACKS = ("white_patch", "moving_dot")
EPOCHS = 8


@dataclass(frozen=True)
class MovingDot(FramePatch):
    """A white dot that goes along the diagonal, from the upper left corner, two pixels a frame."""

    size: int = 2

    def trigger(self, x: Tensor) -> Tensor:
        """Put the dot on clips x [N, 3, T, H, W] in [0, 1]."""
        out = x.clone()
        for t in range(x.shape[2]):
            out[:, :, t, 2 * t : 2 * t + self.size, 2 * t : 2 * t + self.size] = 1
        return out


#: The example's functions take attacks by name.
example.ATTACKS["moving_dot"] = (MovingDot(), 3)


def make(attack: str, seed: int, clean: int = 100) -> Case:
    """Return R(2+1)D with one of the triggers, 5 % clean clips or so many, and others to test with."""
    given = example.data(clean=clean, seed=seed)
    kept = harness.cache_dir() / f"tasks-video-{attack}-{seed}.pt"
    if kept.exists():
        model = VideoResNet(example.CLASSES).eval()
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = example.backdoored(attack, given, EPOCHS, seed)
        torch.save(model.state_dict(), kept)
    said = f"R(2+1)D, drawn clips: {len(given.train[1])} trained on, {len(given.clean[1])} others clean"
    return Case(model, given.clean, lambda net: example.rates(net, given, attack), "accuracy", said)
