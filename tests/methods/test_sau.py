"""SAU: shared adversarial examples are bounded, fool both nets alike, and are unlearned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.methods.sau import SAU, SAUConfig, jensen_shannon, unshared
from tests.support.departures import make_run, planted, rows, vit


def test_divergence_and_unlearning_are_their_definitions() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = a.softmax(1), b.softmax(1)
    m = (p + q) / 2
    by_hand = 0.5 * ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1))
    assert torch.allclose(jensen_shannon(a, b), by_hand, rtol=1e-12)
    c = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(unshared(a, c), -(1 - p.gather(1, c[:, None])[:, 0]).log(), rtol=1e-12)
    wide = torch.tensor([[0.0, 100.0], [100.0, 0.0]], requires_grad=True)
    loss = unshared(wide, torch.tensor([0, 0]))
    assert loss.isfinite().all() and loss[1] == 100  # 1 - p is 4e-44: no float32, its logarithm is one
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    assert torch.equal(gradient[0], torch.zeros(2)) and torch.allclose(gradient[1], torch.tensor([1.0, -1.0]))


class Unscale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (x + 2) / self.scale


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_shared_examples_stay_in_the_box_and_fool_both_nets(scale: float) -> None:
    """In units four times as wide (another normalisation) the same pixels are found."""
    inner, (x, y) = planted()
    model, batch = nn.Sequential(Unscale(scale), inner).eval(), (x * scale - 2, y)
    config = SAUConfig(radius=0.5, inner=20, inner_step=0.1, start="zero", low=-2.0, high=scale - 2)
    run = make_run(config, model, batch)
    method = SAU()
    method.setup(run)
    delta = method.search(run, batch)
    assert delta.abs().max() <= 0.5
    moved, _ = method.range.moved(run.task, batch, delta)
    assert moved.min() >= -2 and moved.max() <= scale - 2
    assert ((moved - batch[0]).abs() <= 0.5 * scale + 1e-6).all()
    with torch.no_grad():
        mine, theirs = run.model(moved).argmax(1), method.received(moved).argmax(1)
    fooled = (mine != y) & (theirs != y) & (mine == theirs)
    assert fooled.float().mean() > 0.9
    assert (run.model(batch[0]).argmax(1) == y).float().mean() > 0.9
    assert all(p.requires_grad for p in model.parameters())


def test_the_gradient_is_that_of_the_objective() -> None:
    model, (x, y) = planted()
    config = SAUConfig(radius=0.4, clean_weight=0.7, adversarial_weight=0.2, shared_weight=1.5)
    run = make_run(config, model, (x, y))
    method = SAU()
    method.setup(run)
    with torch.no_grad():
        model[-1].bias.add_(0.1 * torch.randn(len(model[-1].bias)))
    generator = run.generator.get_state()
    moved, _ = method.range.moved(run.task, (x, y), method.search(run, (x, y)))
    run.generator.set_state(generator)
    method.backward(run, (x, y))
    logits = model(moved)
    with torch.no_grad():
        said, before = method.received(moved).argmax(1), method.received(x).argmax(1)
    fooled = (said != y) & (said != before)
    assert int(fooled.sum()) > 0
    p = logits.softmax(1).gather(1, said[:, None])[:, 0]
    unlearned = torch.where(fooled & (p > 1e-3), -(1 - p).log(), torch.zeros(())).sum() / len(y)
    loss: Tensor = 0.7 * F.cross_entropy(model(x), y) + 0.2 * F.cross_entropy(logits, y) + 1.5 * unlearned
    for parameter, expected in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_shared_examples_are_unlearned() -> None:
    model, (x, y) = planted()
    options = {"radius": 0.4, "lr": 2e-3, "batch_size": 32, "epochs": 30}
    result = fastfip.purify(model, (x, y), "sau", progress=False, **options)
    shares = []
    for net in (model, result.model):
        run = make_run(SAUConfig(radius=0.4), net, (x, y))
        method = SAU()
        method.setup(run)
        method.received = model
        moved, _ = method.range.moved(run.task, (x, y), method.search(run, (x, y)))
        with torch.no_grad():
            mine, theirs = net(moved).argmax(1), model(moved).argmax(1)
        shares.append(float(((mine != y) & (mine == theirs)).float().mean()))
    acc, asr = rows(result.model)
    assert shares[0] > 0.5 and shares[1] < 0.1
    assert acc > 0.95 and asr < rows(model)[1]


def test_it_runs_on_attention() -> None:
    model, batch = vit()
    result = fastfip.purify(model, batch, "sau", epochs=2, progress=False)
    assert all(torch.isfinite(v).all() for v in result.state_dict().values())
