"""Universal perturbations: within their bounds, and they find a planted shortcut without seeing it."""

from __future__ import annotations

import torch
from torch import nn

from fastfip.data import Task
from fastfip.worst_case.pixels import perturbable
from fastfip.worst_case.universal import Perturbations


def planted() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear net on 3 classes that goes to class 2 along one direction that clean data does not use."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 1, 2, 4, generator=generator) * 0.1
    y = torch.arange(90) % 3
    x[:, 0, 0, :3] += nn.functional.one_hot(y, 3).float()
    x[:, 0, 1, 3] = 0.5 + 0.5 * (torch.arange(90) % 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[:, :3] = 4 * torch.eye(3)
        net[1].weight[2, 4] = 30.0  # the shortcut: pixel (1, 0)
    return net, x, y


def test_the_planted_class_is_the_easiest_to_reach_and_bounds_hold() -> None:
    net, x, y = planted()
    generator = torch.Generator().manual_seed(1)
    found = Perturbations.of(x, 3, generator, radius=0.2)
    for _ in range(40):
        c = found.draw(y, 0.0)
        assert bool((c != y).all())
        found.improve(net, Task(), (x, y), c)
    norms = found.delta.flatten(1).norm(dim=1)
    assert bool((norms <= found.radius * 1.0001).all())
    assert int(found.success.argmax()) == 2 and float(found.success[2]) > 0.9
    assert float(found.success[:2].max()) < 0.5
    assert found.delta[2, 0, 1, 0].abs() == found.delta[2].abs().max()
    moved = found.apply(x, torch.full((90,), 2))
    assert float(moved.max()) <= float(x.max()) and float(moved.min()) >= float(x.min())


def test_improving_leaves_the_net_alone_and_draws_follow_success() -> None:
    net, x, y = planted()
    net[1].weight.requires_grad_(True)
    before = net[1].weight.detach().clone()
    found = Perturbations.of(x, 3, torch.Generator().manual_seed(1))
    found.improve(net, Task(), (x, y), found.draw(y, 0.0))
    assert torch.equal(net[1].weight, before) and net[1].weight.grad is None and net[1].weight.requires_grad
    found.success = torch.tensor([0.0, 0.0, 1.0])
    drawn = found.draw(torch.zeros(200, dtype=torch.long), 2.0)
    assert (drawn == 2).float().mean() > 0.95 and not bool((drawn == 0).any())


def test_same_generator_same_perturbations() -> None:
    net, x, y = planted()
    results = []
    for _ in range(2):
        torch.rand(3)
        found = Perturbations.of(x, 3, torch.Generator().manual_seed(4))
        for _ in range(3):
            found.improve(net, Task(), (x, y), found.draw(y, 1.0))
        results.append(found.delta)
    assert torch.equal(*results)


def test_what_can_be_perturbed() -> None:
    assert perturbable(Task(), (torch.rand(2, 3), torch.zeros(2)))
    assert not perturbable(Task(), (torch.ones(2, 3, dtype=torch.long), torch.zeros(2)))
    assert not perturbable(Task(), {"text": "none"})
