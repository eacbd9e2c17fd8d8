"""FIP and Fast FIP as published: the objective is its definition."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.errors import ConfigError
from fastfip.methods._space import Spectral
from fastfip.methods.fip import FIP, FastFIP, FastFIPConfig, FIPConfig
from fastfip.methods.fip.method import retainer
from fastfip.methods.wfip import FastWFIP
from tests.support.fip_runs import data, make_run, net


def loop_objective(model: nn.Module, anchor: nn.Module, x: Tensor, y: Tensor, eta_f: float, eta_r: float) -> Tensor:
    params = list(model.parameters())
    start = [p.detach() for p in anchor.parameters()]
    total = F.cross_entropy(model(x), y)
    trace, diagonal = 0.0, [torch.zeros_like(p) for p in params]
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        trace = trace + sum(g.pow(2).sum() for g in gradients) / len(x)
        own = F.cross_entropy(anchor(x[n : n + 1]), y[n : n + 1])
        for d, g in zip(diagonal, torch.autograd.grad(own, list(anchor.parameters()))):
            d += g.pow(2) / len(x)
    anchored = sum((d * (p - p0).pow(2)).sum() for d, p, p0 in zip(diagonal, params, start)) / 2
    return total + eta_f * trace + eta_r * anchored


def test_the_gradient_of_fip_is_that_of_a_per_sample_loop() -> None:
    model = net()
    anchor = copy.deepcopy(model)
    config = FIPConfig(eta_f=0.3, eta_r=2.0, bn_mode="eval")
    run, method = make_run(config, model), FIP()
    method.setup(run)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, y = data()
    model.zero_grad()
    method.backward(run, (x, y))
    expected = torch.autograd.grad(loop_objective(model, anchor, x, y, 0.3, 2.0), list(model.parameters()))
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, e, rtol=1e-8, atol=1e-9)


def test_the_gradient_of_fast_fip_is_that_of_a_per_sample_loop() -> None:
    model = net()
    config = FastFIPConfig(eta_f=0.3, eta_r=2.0, affine=False)
    run, method = make_run(config, model), FastFIP()
    method.setup(run)
    shifts = method.space.shifts
    x, y = data()

    def per_sample(n: int, create_graph: bool) -> list[Tensor]:
        with shifts.differentiable():
            loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            return list(torch.autograd.grad(loss, shifts.deltas, create_graph=create_graph))

    diagonal = [sum(g.pow(2) for g in gs) / len(x) for gs in zip(*(per_sample(n, False) for n in range(len(x))))]
    for found, value in zip(method.diagonal, diagonal):
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        for delta in shifts.deltas:
            delta.uniform_(-0.1, 0.1)
    method.backward(run, (x, y))
    with shifts.differentiable():
        loss = F.cross_entropy(model(x), y)
        trace = sum(g.pow(2).sum() for n in range(len(x)) for g in per_sample(n, True)) / len(x)
        shifts.differentiable()
    anchored = sum((d * delta.pow(2)).sum() for d, delta in zip(diagonal, shifts.deltas)) / 2
    expected = torch.autograd.grad(loss, shifts.deltas)
    more = torch.autograd.grad(0.3 * trace + 2.0 * anchored, shifts.deltas)
    for delta, a, b in zip(shifts.deltas, expected, more):
        torch.testing.assert_close(delta.grad, a + b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("every", [1, 3])
def test_the_trace_is_added_every_so_many_steps(every: int) -> None:
    run, method = make_run(FIPConfig(eta_r=0.0, trace_every=every, bn_mode="eval"), net()), FIP()
    method.setup(run)
    with_trace = []
    for run.step in range(7):
        if "fisher_trace" in method.backward(run, data()):
            with_trace.append(run.step)
    assert with_trace == list(range(0, 7, every))


def test_retainer_is_zero_at_the_anchor_with_zero_gradient() -> None:
    t = torch.randn(5, requires_grad=True)
    term = retainer([t], [t.detach().clone()], [torch.rand(5)])
    (gradient,) = torch.autograd.grad(term, t)
    assert term.item() == 0 and gradient.abs().max() == 0


def test_the_settings_are_those_of_the_paper() -> None:
    config = FIPConfig()
    assert (config.epochs, config.batch_size, config.lr, config.momentum, config.eta_r) == (100, 128, 0.01, 0.95, 5.0)
    assert config.schedule == "constant" and config.trace_every == 1 and config.augment == "none"
    assert not FastFIPConfig().affine and FastFIPConfig().optimizer == "sgd"
    with pytest.raises(ConfigError, match="eta_f"):
        FIPConfig(eta_f=-1)


@pytest.mark.parametrize("method", [FastFIP(), FastWFIP()], ids=lambda method: method.name)
def test_the_decomposition_is_kept_in_a_file_on_request(
    method: FastFIP | FastWFIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.factors"
    first = method.make_space(make_run(method.Config(cache=str(path)), net()))
    assert path.exists()
    with monkeypatch.context() as patch:
        patch.setattr("fastfip.spectral.cache.decompose", None)
        second = method.make_space(make_run(method.Config(cache=str(path)), net()))
    assert isinstance(first, Spectral) and isinstance(second, Spectral)
    for one, other in zip(first.shifts.shifts, second.shifts.shifts, strict=True):
        assert torch.equal(one.u, other.u) and torch.equal(one.sigma, other.sigma) and torch.equal(one.v, other.v)
