"""Random changes of point clouds, and which inputs are taken for clouds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.testing.nets import PointNet
from fastfip.worst_case.points import POINT_KINDS, changed_points, moved_points, points_axis


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(n: int = 64, points: int = 128) -> Tensor:
    return nn.functional.normalize(torch.randn(n, points, 3, generator=generator(0)), dim=2)


class Series(nn.Module):
    """Answers hang on the order: a convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv1d(3, 32, 5), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean(2))


def test_clouds_are_told_by_answers_that_the_order_of_points_does_not_change() -> None:
    torch.manual_seed(0)
    net = PointNet(10, (16, 32), 16).eval()
    x = clouds() * torch.rand(64, 1, 1, generator=generator(2))
    y = torch.zeros(64, dtype=torch.int64)
    assert points_axis(net, Task(), (x, y), generator()) == 1
    turned = Task(lambda model, batch: model(batch[0].transpose(1, 2)))
    assert points_axis(net, turned, (x.transpose(1, 2), y), generator()) == 2
    assert points_axis(Series().eval(), Task(), (torch.randn(64, 3, 128), y), generator()) is None
    assert points_axis(net, Task(), (x[:, :8], y), generator()) is None  # too few points
    assert points_axis(net, Task(), (torch.zeros(64, 3, 8, 8), y), generator()) is None


@pytest.mark.parametrize("axis", [1, 2])
def test_three_quarters_of_the_clouds_are_changed_and_the_rest_is_as_it_was(axis: int) -> None:
    x = clouds(200) if axis == 1 else clouds(200).transpose(1, 2)
    before = x.clone()
    out, y = changed_points(Task(), (x, torch.arange(200)), axis, generator())
    assert torch.equal(x, before) and out.shape == x.shape and bool(torch.isfinite(out).all())
    share = float((out != x).flatten(1).any(1).float().mean())
    assert 0.65 < share < 0.85 and torch.equal(y, torch.arange(200))
    again, _ = changed_points(Task(), (x, y), axis, generator())
    assert torch.equal(out, again)


@pytest.mark.parametrize("kind", POINT_KINDS)
def test_each_kind_moves_the_cloud_less_than_another_object_would_be(kind) -> None:
    x = clouds()
    out = kind(x, generator())
    assert float((out != x).flatten(1).any(1).float().mean()) > 0.9
    # The distance of each point of x to the nearest one of the changed cloud: what is shown is still there.
    gap = torch.cdist(x, out).amin(2).mean(1)
    assert float(gap.mean()) < 0.2 and float((out - x.mean(1, keepdim=True)).norm(dim=2).max()) < 2.0


def test_gathered_points_are_few_and_in_one_small_ball() -> None:
    x = clouds(100)
    out = POINT_KINDS[-1](x, generator())
    moved = (out != x).any(2)
    assert 0.01 <= float(moved.float().mean()) <= 0.12
    for cloud, where in zip(out, moved):
        if int(where.sum()) > 1:
            assert float(torch.cdist(cloud[where], cloud[where]).max()) <= 2 * 0.2 * 1.2


@pytest.mark.parametrize("axis", [1, 2])
def test_all_clouds_are_moved_a_little(axis: int) -> None:
    x = clouds(50) if axis == 1 else clouds(50).transpose(1, 2)
    before = x.clone()
    out, _ = moved_points(Task(), (x, torch.arange(50)), axis, generator())
    assert torch.equal(x, before) and out.shape == x.shape
    moved = (out - x).norm(dim=3 - axis).mean(1)
    assert float(moved.min()) > 0.01 and float(moved.mean()) < 0.4
