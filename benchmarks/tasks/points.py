"""Point clouds: PointNet on ModelNet10 with a ball of points beside the object; see `examples/point_clouds.py`."""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.purification.real_data import data_dir
from benchmarks.tasks import Case
from examples import point_clouds as example
from fastfip.testing.nets import PointNet

ATTACKS = ("cluster", "low_cluster")
EPOCHS = 5


def make(attack: str, seed: int) -> Case:
    """Return PointNet with one of the two triggers, 5 % clean clouds, and the test set of ModelNet10."""
    given = example.data(data_dir() / "modelnet10.npz", seed)
    if given.said != "ModelNet10":
        raise SystemExit("FASTFIP_DATA has to be a folder with modelnet10.npz")
    kept = harness.cache_dir() / f"tasks-points-{attack}-{seed}.pt"
    if kept.exists():
        model = PointNet(given.classes, widths=example.WIDTHS, hidden=example.HIDDEN).eval()
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = example.backdoored(attack, given, EPOCHS, seed)
        torch.save(model.state_dict(), kept)
    said = f"PointNet, ModelNet10: {len(given.train[1])} clouds trained on, {len(given.clean[1])} others clean"
    return Case(model, given.clean, lambda net: example.rates(net, given, attack), "accuracy", said)
