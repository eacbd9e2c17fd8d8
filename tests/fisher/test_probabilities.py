"""A softmax inside the model is noticed at every door: what goes into it is taken as logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.errors import ModelError
from fastfip.fisher import backward_with_fisher, fisher_diagonal, fisher_trace
from fastfip.fisher.sharpness import sharpness
from fastfip.testing.definitions import worst_error


@pytest.fixture
def pair():
    """A net, the same net with a softmax behind it, and a batch."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 4, (6,))
    return net, nn.Sequential(*copy.deepcopy(net), nn.Softmax(1)), x, y


def test_the_diagonal(pair):
    net, ends, x, y = pair
    for options in ({}, {"label_smoothing": 0.1}, {"temperature": 2.0}, {"kind": "mc"}):
        assert worst_error(fisher_diagonal(ends, (x, y), **options), fisher_diagonal(net, (x, y), **options)) < 1e-12


def test_the_trace_and_its_gradient(pair):
    net, ends, x, y = pair
    a, b = fisher_trace(net, x, y), fisher_trace(ends, x, y)
    torch.testing.assert_close(a, b)
    for g, h in zip(torch.autograd.grad(a, net.parameters()), torch.autograd.grad(b, ends.parameters())):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("way", ["exact", "perturb", "signs"])
def test_the_penalty(pair, way):
    net, ends, x, y = pair
    a, b = (fastfip.FisherPenalty(m, way)(x, y) for m in (net, ends))
    torch.testing.assert_close(a, b)


def test_sharpness(pair):
    net, ends, x, y = pair
    a, b = (sharpness(m, (x, y), iterations=5, probes=2) for m in (net, ends))
    assert a.trace_fisher == pytest.approx(b.trace_fisher) and a.lambda_max == pytest.approx(b.lambda_max)


def test_a_cross_entropy_of_probabilities_is_refused_by_the_backward_pass(pair):
    net, ends, x, y = pair
    with pytest.raises(ModelError, match="softmax inside the model"):
        backward_with_fisher(F.cross_entropy(ends(x), y, reduction="none"), ends)
    own = backward_with_fisher(F.nll_loss(ends(x).log(), y, reduction="none"), ends)
    assert worst_error(own, fisher_diagonal(net, (x, y))) < 1e-12


def test_a_loss_of_the_users_gets_the_outputs_as_they_are(pair):
    net, ends, x, y = pair

    def loss(p, batch):
        return F.nll_loss(p.log(), batch[1], reduction="none")

    assert worst_error(fisher_diagonal(ends, (x, y), loss=loss), fisher_diagonal(net, (x, y))) < 1e-12
    torch.testing.assert_close(fisher_trace(ends, x, y, loss=loss), fisher_trace(net, x, y))
