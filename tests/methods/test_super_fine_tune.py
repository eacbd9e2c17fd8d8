"""`super_fine_tune`: the course of its step size, and that it is plain SGD along it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.methods.super_fine_tune import cycled


def test_a_cycle_rises_straight_to_the_highest_step_and_falls_back() -> None:
    assert [round(cycled(t, 0.1, 0.9, 8), 6) for t in range(9)] == [0.1, 0.3, 0.5, 0.7, 0.9, 0.7, 0.5, 0.3, 0.1]
    assert [round(cycled(t, 0.0, 1.0, 5), 6) for t in range(6)] == [0.0, 0.5, 1.0, 0.666667, 0.333333, 0.0]


def test_it_is_sgd_with_the_steps_of_both_phases() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    model = nn.Linear(5, 3)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    result = fastfip.purify(
        model, (x, y), "super_fine_tune", steps=10, batch_size=12, lr=0.01, lr_first=0.5, lr_second=0.1, first=0.6,
        cycle=4, force=True, progress=False,
    )  # fmt: skip
    shares = [0, 0.5, 1, 0.5]
    for t in range(10):
        lr = 0.01 + ((0.5 if t < 6 else 0.1) - 0.01) * shares[t % 4]
        gradients = torch.autograd.grad(F.cross_entropy(x @ weights[0].T + weights[1], y), weights)
        weights = [(w - lr * g).detach().requires_grad_() for w, g in zip(weights, gradients)]
    for p, w in zip(result.model.parameters(), weights):
        assert torch.allclose(p, w, atol=1e-5)
