"""fisher_trace: its parts for training loops, its gradient by other ways, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip.data import Task
from fastfip.errors import ModelError
from fastfip.fisher import draw_labels, fisher_diagonal, fisher_trace, squared_norms, trace_and_logits
from fastfip.testing import nets
from fastfip.testing.definitions import loop_gradients, loop_trace, worst_error

N, C = 6, 4


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nets.randomize_norms(nets.ViT(C, size=8, dim=8, depth=1, heads=2)).double().eval()
    return model, torch.randn(N, 3, 8, 8, dtype=torch.float64), torch.randint(0, C, (N,))


def test_the_gradient_is_the_difference_quotient(problem):
    """Not a comparison of two double backward passes: torch.func's, for one, is wrong for affine LayerNorm."""
    model, x, y = problem
    params = list(model.parameters())
    got = torch.autograd.grad(fisher_trace(model, x, y), params)
    direction = [torch.randn_like(p) for p in params]
    slope, h = sum((g * d).sum() for g, d in zip(got, direction)), 1e-5

    def at(step):
        with torch.no_grad():
            for p, d in zip(params, direction):
                p.add_(d, alpha=step)
            value = fisher_trace(model, x, y)
            for p, d in zip(params, direction):
                p.sub_(d, alpha=step)
        return value

    quotient = (at(h) - at(-h)) / (2 * h)
    assert abs(slope - quotient) <= 2e-6 * abs(quotient)


def test_differentiable_in_the_inputs(problem):
    model, x, y = problem
    x.requires_grad_()
    got = torch.autograd.grad(fisher_trace(model, x, y), x)[0]
    want = torch.autograd.grad(loop_trace(model, (x, y), N), x)[0]
    assert got.any() and (got - want).norm() <= 1e-9 * want.norm()


def test_closed_form_of_a_linear_layer():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, C).double(), torch.randn(N, 5, dtype=torch.float64), torch.randint(0, C, (N,))
    e = F.one_hot(y, C) - model(x).softmax(1)
    want = (e.square().sum(1) * (x.square().sum(1) + 1)).mean()
    torch.testing.assert_close(fisher_trace(model, x, y), want)


def test_one_forward_pass_gives_trace_losses_and_logits(problem):
    model, x, y = problem
    calls = []
    task = Task.of(forward=lambda m, b: calls.append(1) or m(b[0]))
    trace_and_logits(model, (x, y), task)  # the first batch of a model is tried twice more: is it random?
    assert len(calls) == 3
    out = trace_and_logits(model, (x, y), task)
    assert len(calls) == 4
    torch.testing.assert_close(out.logits, model(x))
    torch.testing.assert_close(out.losses, F.cross_entropy(model(x), y, reduction="none"))
    want = loop_trace(model, (x, y), N)
    params = dict(model.named_parameters())
    objective = out.losses.mean() + 0.3 * out.trace
    got = dict(zip(params, torch.autograd.grad(objective, list(params.values()))))
    reference = F.cross_entropy(model(x), y) + 0.3 * want
    assert worst_error(got, dict(zip(params, torch.autograd.grad(reference, list(params.values())))), 1e-12) < 1e-8


def test_norms_of_each_sample_from_losses_of_ones_own(problem):
    model, x, y = problem
    losses = F.cross_entropy(model(x), y, reduction="none")
    got = squared_norms(losses, dict(model.named_parameters()), create_graph=False)
    each = loop_gradients(model, (x, y), N)
    want = torch.stack([sum(v.square().sum() for v in g.values()) for g in each])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    losses.sum().backward()  # the graph is still there


def test_parameters_outside_the_model():
    """Fisher in delta-space: weights that a function makes of other parameters, handed in by name."""
    torch.manual_seed(0)
    model, delta = nn.Linear(4, C).double(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, C, (N,))
    u, s, vh = torch.linalg.svd(model.weight.detach(), full_matrices=False)

    def forward(m, batch):
        weight = u @ torch.diag(torch.relu(s + delta)) @ vh
        return F.linear(batch[0], weight, m.bias)

    got = fisher_diagonal(model, (x, y), forward=forward, params={"delta": delta})
    want, total = torch.zeros(4, dtype=torch.float64), 0
    for n in range(N):
        loss = F.cross_entropy(forward(model, (x[n : n + 1],)), y[n : n + 1])
        g = torch.autograd.grad(loss, delta, create_graph=True)[0]
        want += g.detach().square() / N
        total = total + g.square().sum() / N
    torch.testing.assert_close(got["delta"], want, rtol=1e-10, atol=0)
    trace = fisher_trace(model, x, y, forward=forward, params={"delta": delta})
    torch.testing.assert_close(trace, total, rtol=1e-10, atol=0)
    grads = (torch.autograd.grad(v, delta, retain_graph=True)[0] for v in (trace, total))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_it_is_not_the_norm_of_the_mean_gradient(problem):
    model, x, y = problem
    mean = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert fisher_trace(model, x, y) > 1.5 * sum(g.square().sum() for g in mean)


def test_labels_from_the_model(problem):
    model, x, _ = problem
    drawn = draw_labels(model(x), torch.Generator().manual_seed(1))
    assert fisher_trace(model, x, drawn) > 0


def test_no_graph_when_none_is_wanted(problem):
    model, x, y = problem
    assert fisher_trace(model, x, y).requires_grad
    assert not fisher_trace(model, x, y, create_graph=False).requires_grad
    with torch.no_grad():
        assert not fisher_trace(model, x, y).requires_grad
        assert fisher_trace(model, x, y, create_graph=True).requires_grad


def test_value_of_fused_attention_is_that_of_the_mathematical_form(problem):
    model, x, y = problem
    torch.testing.assert_close(fisher_trace(model, x, y, create_graph=False), fisher_trace(model, x, y).detach())


def test_batch_norm_in_train_mode_is_refused():
    model = nets.SmallVGG(C, width=2, size=8)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ModelError, match=r"train mode.*model.eval\(\)"):
        fisher_trace(model, x, y)
    with pytest.raises(ModelError, match="statistics of the batch"):
        squared_norms(F.cross_entropy(model(x), y, reduction="none"), dict(model.named_parameters()))


def test_gradients_of_parameters_are_not_touched(problem):
    model, x, y = problem
    fisher_trace(model, x, y)
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_runs_eagerly():
    torch.manual_seed(0)
    model = nets.MLP(5, 6, C).double()
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(0, C, (N,))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(fisher_trace(compiled, x, y), fisher_trace(model, x, y))
