"""FT-SAM: the perturbation is its formula, the weights come back bit by bit, statistics are touched once a step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods.base import Run
from fastfip.methods.ft_sam import FTSAM, FTSAMConfig, adaptive_perturbation, frozen_statistics
from fastfip.testing import nets
from tests.support.small_nets import CLASSES, conv_net, data, plain_net, same


def make_run(model: nn.Module, classes: int = CLASSES, **options) -> Run:
    return Run(
        model=model,
        task=Task(),
        clean=CleanSet.of(data()),
        config=FTSAMConfig(**options),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=classes,
        total_steps=10,
    )


def started(model: nn.Module, **options) -> tuple[Run, FTSAM]:
    run, method = make_run(model, **options), FTSAM()
    method.setup(run)
    method.parameter_groups(run)
    run.train_mode()
    return run, method


@pytest.mark.parametrize("factor", [1.0, 2.0**12])
def test_the_perturbation_has_the_radius_in_the_weights_own_measure(factor: float) -> None:
    weights = [torch.randn(3, 5), torch.randn(7).double(), torch.randn(2, 2, 3)]
    gradients = [factor * torch.randn_like(w) for w in weights]
    eps = adaptive_perturbation(weights, gradients, rho=1.5)
    assert eps is not None and [e.dtype for e in eps] == [w.dtype for w in weights]
    length = sum(float((e.double() / w.double().abs()).square().sum()) for e, w in zip(eps, weights)) ** 0.5
    assert length == pytest.approx(1.5, rel=1e-5)
    norm = sum(float((w.double() * g.double()).square().sum()) for w, g in zip(weights, gradients)) ** 0.5
    for e, w, g in zip(eps, weights, gradients):
        torch.testing.assert_close(e, (1.5 * w * w * g / norm).to(e.dtype), rtol=1e-5, atol=1e-7)


def test_zero_weights_move_only_with_eta_and_bad_gradients_give_none() -> None:
    w, g = [torch.tensor([0.0, 2.0])], [torch.tensor([1.0, 1.0])]
    assert adaptive_perturbation(w, g, 1.0)[0].tolist() == [0.0, 2.0]
    assert adaptive_perturbation(w, g, 1.0, eta=0.5)[0][0] > 0
    assert adaptive_perturbation(w, [torch.tensor([float("inf"), 1.0])], 1.0) is None
    assert adaptive_perturbation(w, [torch.zeros(2)], 1.0)[0].tolist() == [0.0, 0.0]


def test_the_gradient_is_that_at_the_perturbed_weights() -> None:
    model = plain_net().double()
    x, y = data(12)
    run, method = started(model, rho=0.7, label_smoothing=0.2)
    values = method.backward(run, (x.double(), y))
    got = [p.grad.clone() for p in model.parameters()]
    other = copy.deepcopy(model)
    params = list(other.parameters())
    g = torch.autograd.grad(F.cross_entropy(other(x.double()), y, label_smoothing=0.2), params)
    norm = torch.cat([(p.abs() * d).flatten() for p, d in zip(params, g)]).norm()
    with torch.no_grad():
        for p, d in zip(params, g):
            p.add_(0.7 * p.square() * d / norm)
    there = F.cross_entropy(other(x.double()), y, label_smoothing=0.2)
    assert float(values["loss"] + values["sharpness"]) == pytest.approx(there.item(), rel=1e-9)
    for a, b in zip(got, torch.autograd.grad(there, params)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    model = plain_net().to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = data(12)
    run, method = started(model, rho=8.0)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
    method.backward(run, (x.to(dtype), y))
    assert same(model.state_dict(), before)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_the_weights_come_back_after_an_interruption_in_the_second_pass() -> None:
    model = plain_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run, method = started(model)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        method.backward(run, data(6))
    assert same(model.state_dict(), before)


def test_statistics_are_those_of_one_pass_at_the_weights_themselves() -> None:
    model, twin = conv_net(), None
    twin = copy.deepcopy(model)
    run, method = started(model, rho=8.0)
    x, y = data(12)
    method.backward(run, (x, y))
    twin[1].train()
    twin[:2](x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(twin[1], name)), name
    assert model[1].track_running_stats


def test_frozen_statistics_still_normalise_by_the_batch() -> None:
    layer = nn.BatchNorm1d(3).train()
    x = torch.randn(8, 3) * 5 + 2
    with frozen_statistics(layer):
        out = layer(x)
    assert out.mean(0).abs().max() < 1e-5 and float(layer.running_mean.abs().max()) == 0
    assert int(layer.num_batches_tracked) == 0
    layer.eval()
    with frozen_statistics(layer):  # a layer in eval mode keeps its running statistics
        assert torch.equal(layer(x), layer(x)) and layer.track_running_stats


def test_the_papers_settings_by_the_number_of_classes() -> None:
    for classes, rho, smoothing in ((10, 2.0, 0.1), (43, 8.0, 0.0), (200, 8.0, 0.0)):
        run, method = started(plain_net(), classes=classes)
        assert (method.rho, run.config.label_smoothing) == (rho, smoothing)
    run, method = started(plain_net(), rho=0.5, label_smoothing=0.0)
    assert (method.rho, run.config.label_smoothing) == (0.5, 0.0)
    defaults = FTSAMConfig()
    assert (defaults.epochs, defaults.batch_size, defaults.lr, defaults.weight_decay) == (100, 256, 0.01, 5e-4)


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    x, y = data(12)
    steps = []

    def loss(logits: torch.Tensor, batch: tuple) -> torch.Tensor:
        out = F.cross_entropy(logits, batch[1], reduction="none")
        steps.append(1)
        return out * float("inf") if len(steps) == 3 else out

    result = fastfip.purify(plain_net(), (x, y), "ft_sam", steps=5, loss=loss, holdout=0.0, progress=False)
    assert all(bool(torch.isfinite(v).all()) for v in result.state_dict().values())


def test_a_transformer() -> None:
    model = nets.ViT(classes=CLASSES, size=8, dim=16, depth=1, heads=2, fused=False)
    x, y = torch.rand(12, 3, 8, 8), torch.arange(12) % CLASSES
    result = fastfip.purify(model, (x, y), "ft_sam", steps=3, progress=False)
    assert list(result.state_dict()) == list(model.state_dict())
    assert not same(result.state_dict(), model.state_dict())
