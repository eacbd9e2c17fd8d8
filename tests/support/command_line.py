"""A folder to run commands in: an architecture, a checkpoint, images; and how a command is seen to fail."""

import sys

import numpy as np
import pytest
import torch

from fastfip.cli import main

ARCH = """
from torch import nn
def net(classes=3, channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes))
def probabilities():
    return nn.Sequential(*net(), nn.Softmax(1))
def nothing():
    return None
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with an architecture, a checkpoint, and images whose brightest channel is their class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FASTFIP_DEBUG", raising=False)
    (tmp_path / "tiny_arch.py").write_text(ARCH)
    scope: dict = {}
    exec(ARCH, scope)
    torch.manual_seed(0)
    model = scope["net"]()
    torch.save({"net": model.state_dict(), "acc": 0.5, "optimizer": {"m": torch.ones(3)}}, "in.pth")
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 100, (60, 6, 6, 3), dtype=np.uint8)
    for i, c in enumerate(y):
        x[i, :, :, c] += 120
    np.savez("data.npz", clean_x=x, clean_y=y, test_x=x[:30], test_y=y[:30])
    yield tmp_path
    sys.modules.pop("tiny_arch", None)


NET = ["--arch", "tiny_arch:net"]
PURIFY = ["purify", "in.pth", "out.pth", *NET, "--data", "data.npz", "--method", "fine_tune"]
TRIGGER = ["--attack", "badnets:size=2,margin=1", "--target", "1"]


def fails(capsys, code, *arguments):
    """The command ends with this code and one line on stderr, which is returned; nothing on stdout."""
    assert main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastfip: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err
