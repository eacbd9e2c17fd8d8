"""Goals of perturbations: what they lower and whom they have reached, with classes and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.worst_case.goals import ROWS, AwayFromTarget, TowardsClass
from fastfip.worst_case.universal import Perturbations

SQUARES = Task(loss_hook=lambda out, batch: (out - batch[1]).square().sum(1))


def test_towards_a_class_is_its_cross_entropy_and_the_answers_that_are_it() -> None:
    logits, c = torch.randn(12, 5), torch.arange(12) % 5
    goal, batch = TowardsClass(5), (torch.rand(12, 2), torch.zeros(12, dtype=torch.long))
    assert torch.equal(goal.loss(Task(), logits, batch, c), F.cross_entropy(logits, c, reduction="sum"))
    assert torch.equal(goal.hit(Task(), logits, batch, c), logits.argmax(1) == c)
    assert torch.equal(goal.own(Task(), batch), batch[1])


@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e5])
def test_a_wrong_answer_is_that_of_another_sample_whatever_the_unit_of_the_loss(unit: float) -> None:
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    task = Task(loss_hook=lambda out, batch: unit * (out - batch[1]).square().sum(1))
    batch = (x, x + 0.1)
    goal = AwayFromTarget.of(lambda b: b[0], task, [batch])
    own, other = unit * 0.03, unit * (x.roll(1, 0) - x - 0.1).square().sum(1).mean()
    assert goal.threshold == pytest.approx(own + 0.5 * (float(other) - own), rel=1e-4)
    assert not bool(goal.hit(task, x, batch, None).any())
    assert bool(goal.hit(task, x + 5, batch, None).all())


def test_what_most_clean_samples_lose_is_no_success() -> None:
    x = torch.zeros(100, 2)
    y = torch.ones(100, 2)
    y[:5] = 100.0  # no answer tells them apart: a wrong one costs what the right one does
    goal = AwayFromTarget.of(lambda b: b[0], SQUARES, [(x, y)])
    assert float(goal.hit(SQUARES, x, (x, y), None).float().mean()) <= 0.1


def test_where_no_other_answer_can_be_scored_the_loss_has_to_rise_by_one() -> None:
    x = torch.zeros(1, 2)
    goal = AwayFromTarget.of(lambda b: b[0], SQUARES, [(x, x + 1)])
    assert goal.threshold == pytest.approx(2 + 1)


def test_the_loss_is_raised_up_to_twice_the_threshold_and_no_further() -> None:
    goal, x = AwayFromTarget(3.0), torch.tensor([[1.0], [2.0], [10.0]], requires_grad=True)
    loss = goal.loss(SQUARES, x, (x.detach(), torch.zeros(3, 1)), None)
    loss.backward()
    assert float(loss.detach()) == -(1 + 4 + 6) and x.grad.flatten().tolist() == [-2.0, -4.0, 0.0]


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """Three numbers of an image, and one pixel that clean images do not use and that turns them all over."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(96, 1, 2, 4, generator=generator)
    x[:, 0, 1, 3] = torch.arange(96) % 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[:, :3] = 4 * torch.eye(3)
        net[1].weight[:, 4] = 30.0
    x[:, 0, 1, 0] = 0.0
    x[:2, 0, 1, 0] = torch.tensor([-0.05, 0.5])
    y = net(x).detach()
    return net, x, y


def test_without_classes_the_planted_pixel_is_found_by_what_raises_the_loss() -> None:
    net, x, y = regression()
    goal = AwayFromTarget.of(lambda b: net(b[0]), SQUARES, [(x, y)])
    found = Perturbations.of(x, goal, torch.Generator().manual_seed(1), 0.2)
    for _ in range(40):
        c = found.choose(SQUARES, (x, y), 1.0)
        assert c.shape == (96,) and int(c.max()) < ROWS
        found.improve(net, SQUARES, (x, y), c)
    best = found.store.rows(torch.arange(ROWS))[int(found.success.argmax())]
    assert float(found.success.max()) > 0.9 and best[0, 1, 0].abs() == best.abs().max()
