"""backward_with_fisher: the gradients are those of backward(), the diagonal that of fisher_diagonal, in one pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip.fisher.backward as module
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.testing import nets
from fastfip.testing.definitions import worst_error
from tests.fisher.test_whole_nets import NETS
from tests.fisher.test_whole_nets import problem as whole_net
from tests.support.fisher_problems import N, build
from tests.support.fisher_uses import USES


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def compare(model, losses_of, floor=1e-12):
    reference = copy.deepcopy(model)
    losses_of(reference).mean().backward()
    want = gradients(reference)
    fisher = backward_with_fisher(losses_of(model), model)
    got = gradients(model)
    assert {k for k, g in got.items() if g is None} == {k for k, g in want.items() if g is None}
    keep = [k for k, g in want.items() if g is not None]
    assert worst_error({k: got[k] for k in keep}, {k: want[k] for k in keep}, floor) < 1e-10
    return fisher


@pytest.mark.parametrize("name", NETS)
def test_whole_nets(name):
    model, (x, y) = whole_net(name)
    fisher = compare(model, lambda m: F.cross_entropy(m(x), y, reduction="none"))
    assert worst_error(fisher, fisher_diagonal(model, (x, y)), 1e-12) < 1e-10


@pytest.mark.parametrize(
    "name", ["tied-language-model", "unknown-operation", "checkpoint", "unused-part", "no-grad-part", "bert-positions"]
)
def test_slower_ways(name):
    problem = build(USES[name])
    model, task, batch = problem.model, problem.task, problem.batch
    backward_reference = copy.deepcopy(model)
    task.loss(task.forward(backward_reference, batch), batch).mean().backward()
    fisher = backward_with_fisher(task.loss(task.forward(model, batch), batch), model)
    want = fisher_diagonal(model, batch, loss=task.loss_hook)
    assert worst_error(fisher, want, 1e-10) < 1e-10 and fisher.n == N
    for (k, p), q in zip(model.named_parameters(), backward_reference.parameters()):
        assert (p.grad is None) == (q.grad is None), k
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-10 * q.grad.norm() + 1e-14, k


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nets.MLP(6, 5, 4).double()
    return model, torch.randn(N, 6, dtype=torch.float64), torch.randint(0, 4, (N,))


def test_adds_to_what_is_there_and_to_every_leaf(small):
    model, x, y = small
    x.requires_grad_()
    first = model.layers[0].weight
    first.grad = torch.ones_like(first)
    losses = F.cross_entropy(model(x), y, reduction="none")
    want = torch.autograd.grad(losses.mean(), [first, x], retain_graph=True)
    backward_with_fisher(losses, model, params=["layers.2.weight"])
    torch.testing.assert_close(first.grad, want[0] + 1)
    torch.testing.assert_close(x.grad, want[1])


def test_reduction_and_selection(small):
    model, x, y = small
    losses = F.cross_entropy(model(x), y, reduction="none")
    want = torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
    fisher = backward_with_fisher(losses, model, params=["layers.0.bias"], reduction="sum", retain_graph=True)
    assert list(fisher) == ["layers.0.bias"]
    for p, g in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, g)
    again = backward_with_fisher(losses, model)  # the graph was kept
    torch.testing.assert_close(again["layers.0.bias"], fisher["layers.0.bias"])


def test_one_pass(small, monkeypatch):
    """After the verification there is a single walk through the graph."""
    model, x, y = small
    backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)
    assert len(calls) == 1


def test_refusals(small):
    model, x, y = small
    with pytest.raises(ConfigError):
        backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model, reduction="max")
    with pytest.raises(DataError, match=r"\[N\]"):
        backward_with_fisher(F.cross_entropy(model(x), y), model)
    with pytest.raises(ModelError, match="no graph"):
        backward_with_fisher(torch.zeros(3), model)
    with pytest.raises(ModelError, match="train mode"):
        net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
        backward_with_fisher(F.cross_entropy(net(x), y, reduction="none"), net)
    assert all(p.grad is None for p in model.parameters())
    assert module.backward_with_fisher is backward_with_fisher
