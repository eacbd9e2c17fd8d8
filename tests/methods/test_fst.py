"""FST: the objective, the norm after every step, and a planted backdoor taken out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.errors import ModelError
from fastfip.methods._classifier import Classifier
from fastfip.methods.fst import FST, FSTConfig
from tests.support.departures import make_run, planted, rows, vit


def norm(layer: nn.Linear) -> float:
    return float(torch.linalg.vector_norm(layer.weight.detach()))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_loss_and_gradient_are_the_definition(alpha: float | None) -> None:
    model, batch = planted()
    head, received = model[-1], model[-1].weight.detach().clone()
    run = make_run(FSTConfig(alpha=alpha), model, batch)
    method = FST()
    method.setup(run)
    assert method.classifier.module is head
    values = method.backward(run, batch)
    assert not torch.allclose(head.weight, received, atol=0.01)
    assert norm(head) == pytest.approx(float(received.norm()), rel=1e-5)
    a = min(0.2, 1 / float(received.norm()) ** 2) if alpha is None else alpha
    loss = F.cross_entropy(model(batch[0]), batch[1]) + a * (head.weight * received).sum()
    assert float(values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for p, expected in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parametrised", [False, True])
def test_the_norm_holds_after_each_step(parametrised: bool) -> None:
    model, batch = planted()
    head = model[-1]
    if parametrised:
        nn.utils.parametrizations.weight_norm(head)
    expected, seen = norm(head), []

    class Watched(FST):
        def after_step(self, run):
            super().after_step(run)
            layer = run.model[-1]
            seen.append((norm(layer), float((layer.weight.detach() * self.classifier.received).sum())))

    fastfip.purify(model, batch, Watched, steps=8, lr=0.1, alpha=5.0, progress=False)
    assert len(seen) == 8 and [n for n, _ in seen] == pytest.approx([expected] * 8, rel=1e-5)
    assert min(product for _, product in seen) < 0


def test_a_planted_backdoor_goes() -> None:
    model, batch = planted()
    result = fastfip.purify(model, batch, "fst", epochs=30, batch_size=16, alpha=0.2, progress=False)
    acc, asr = rows(result.model)
    assert rows(model)[1] > 0.9 and asr < 0.2 and acc > 0.9
    again = fastfip.purify(model, batch, "fst", epochs=30, batch_size=16, alpha=0.2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(result.state_dict().values(), again.state_dict().values()))
    assert list(result.state_dict()) == list(model.state_dict())


def test_interrupted_before_the_first_epoch_the_net_is_as_given() -> None:
    model, batch = planted()

    class Stopped(FST):
        def after_step(self, run):
            raise KeyboardInterrupt

    result = fastfip.purify(model, batch, Stopped, progress=False)
    assert result.interrupted
    assert all(torch.equal(a, b) for a, b in zip(result.state_dict().values(), model.state_dict().values()))


class Backwards(nn.Module):
    """The classifier comes first among the modules, and last in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(5, 4), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


def test_the_classifier_is_the_last_layer_that_is_called() -> None:
    _, batch = planted()
    model = Backwards()
    assert Classifier.of(make_run(FSTConfig(), model, batch)).module is model.head
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Conv2d(4, 4, 1), nn.Flatten())
    assert Classifier.of(make_run(FSTConfig(), convolutions, batch)).module is convolutions[1]
    with pytest.raises(ModelError, match="no Linear or convolution"):
        Classifier.of(make_run(FSTConfig(), nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), batch))


def test_it_runs_on_attention() -> None:
    model, batch = vit()
    result = fastfip.purify(model, batch, "fst", epochs=2, progress=False)
    assert not torch.equal(result.model.head.weight, model.head.weight)
    assert norm(result.model.head) == pytest.approx(norm(model.head), rel=1e-5)
