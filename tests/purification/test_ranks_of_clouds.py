"""Several processes purify a model of point clouds: both worst cases and the held answers are shared by all."""

import os

import pytest
import torch
import torch.distributed as dist

import fastfip
from fastfip.testing.nets import PointNet
from tests.purification.test_ranks import furthest
from tests.support.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.usefixtures("short_search"),
]


def run():
    torch.manual_seed(0)
    x = torch.randn(50, 20, 3) * torch.arange(1, 51)[:, None, None] / 25
    done = fastfip.purify(
        PointNet(4, (8, 16), 8), (x, torch.arange(50) % 4), steps=6, batch_size=15, force=True, progress=False
    )
    return dict(done.state_dict()), done.method, done.history, done.settings


def test_both_processes_end_with_the_same_weights(tmp_path):
    answers = in_processes(2, tmp_path, lambda rank: run())
    assert all(isinstance(answer, tuple) for answer in answers), answers
    (first, method, history, settings), (second, *_) = answers
    assert method == "fisher_steps" and settings["ranks"]["world"] == 2, "few clouds, and each process says so"
    assert furthest(first, second) == 0.0
    torch.manual_seed(0)
    assert furthest(first, PointNet(4, (8, 16), 8).state_dict()) > 1e-3
    assert settings["config"]["hold"] == 1.0 and all(record["divergence"] > 0 for record in history)
    assert any(record.get("reached_by_points") is not None for record in history)
