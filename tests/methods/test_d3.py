"""D3: the objective, the norm and the distance, and a planted backdoor taken out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastfip
from fastfip.methods.d3 import D3, D3Config
from tests.support.departures import make_run, planted, rows, vit


@pytest.mark.parametrize("epsilon", [0.01, 50.0])
def test_loss_and_gradient_are_the_definition(epsilon: float) -> None:
    model, batch = planted()
    head = model[-1]
    received, bias = head.weight.detach().clone(), head.bias.detach().clone()
    run = make_run(D3Config(epsilon=epsilon, weight=3.0), model, batch)
    method = D3()
    method.setup(run)
    values = method.backward(run, batch)
    assert torch.equal(head.bias, bias) and not torch.allclose(head.weight, received, atol=0.01)
    clean = F.cross_entropy(model(batch[0]), batch[1])
    distance = (head.weight - received).pow(2).sum().sqrt()
    loss = (3 * torch.relu(clean - epsilon) - distance) / 4
    assert float(values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for p, expected in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    ):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_far_from_the_received_classifier_at_its_norm() -> None:
    model, batch = planted()
    seen = []

    class Watched(D3):
        def after_step(self, run):
            super().after_step(run)
            seen.append(float(torch.linalg.vector_norm(run.model[-1].weight.detach())))

    received = model[-1].weight.detach()
    size = float(received.norm())
    distances = []
    for epsilon in (0.0, 50.0):  # the second allows every clean loss: nothing is left but the distance
        result = fastfip.purify(
            model, batch, Watched, steps=120, batch_size=16, epsilon=epsilon, lr=0.1, progress=False
        )
        distances.append(float((result.model[-1].weight.detach() - received).norm()) / size)
    assert seen == pytest.approx([size] * 240, rel=1e-5)
    assert distances[0] < 1.82 < 1.87 < distances[1] <= 2.0001  # -w is the farthest


def test_a_planted_backdoor_goes() -> None:
    model, batch = planted()
    result = fastfip.purify(model, batch, "d3", epochs=30, batch_size=16, augment="none", progress=False)
    acc, asr = rows(result.model)
    assert rows(model)[1] > 0.9 and asr < 0.2 and acc > 0.9
    again = fastfip.purify(model, batch, "d3", epochs=30, batch_size=16, augment="none", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(result.state_dict().values(), again.state_dict().values()))


def test_it_runs_on_attention() -> None:
    model, batch = vit()
    result = fastfip.purify(model, batch, "d3", epochs=2, progress=False)
    assert all(torch.isfinite(v).all() for v in result.state_dict().values())
    assert list(result.state_dict()) == list(model.state_dict())
