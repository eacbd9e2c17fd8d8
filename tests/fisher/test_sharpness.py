"""sharpness against the full Hessian of small nets."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip.data import Task
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.fisher.sharpness import lanczos, sharpness
from fastfip.testing import nets
from fastfip.testing.definitions import loop_trace

N, C = 9, 3


def net():
    torch.manual_seed(0)
    model = nets.randomize_norms(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(5), nn.Linear(5, C))
    )
    return model.double(), torch.randn(N, 4, dtype=torch.float64), torch.randint(0, C, (N,))


def full_hessian(model, x, y):
    params = dict(model.named_parameters())
    loss = F.cross_entropy(model(x), y)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params.values()), create_graph=True)])
    rows = [torch.autograd.grad(s, list(params.values()), retain_graph=True, allow_unused=True) for s in slope]
    return torch.stack(
        [
            torch.cat(
                [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(row, params.values())]
            )
            for row in rows
        ]
    )


@pytest.fixture
def problem():
    model, x, y = net()
    return model.train(), x, y, full_hessian(copy.deepcopy(model).eval(), x, y)


def test_largest_eigenvalue_trace_and_fisher(problem):
    model, x, y, hessian = problem
    values = torch.linalg.eigvalsh(hessian)
    got = sharpness(model, [(x[:4], y[:4]), (x[4:], y[4:])], probes=400, tolerance=1e-10)
    assert abs(got.lambda_max - values[-1]) <= 1e-6 * values[-1]
    assert got.residual <= 1e-8 * got.lambda_max and got.n == N and got.parameters == hessian.shape[0]
    assert abs(got.trace_hessian - hessian.trace()) <= 4 * got.trace_hessian_error
    assert got.trace_hessian_error <= 0.1 * hessian.trace()
    want = loop_trace(copy.deepcopy(model).eval(), (x, y), N)
    assert abs(got.trace_fisher - want) <= 1e-10 * want


def test_the_stated_error_is_the_spread_of_the_estimates(problem):
    model, x, y, _ = problem
    runs = [sharpness(model, (x, y), probes=10, seed=s, iterations=1) for s in range(30)]
    spread = torch.tensor([r.trace_hessian for r in runs]).std()
    stated = torch.tensor([r.trace_hessian_error for r in runs]).mean()
    assert 0.5 < spread / stated < 2


def test_stops_when_it_has_converged_and_says_how_far_it_got(problem):
    model, x, y, hessian = problem
    top = torch.linalg.eigvalsh(hessian)[-1]
    loose = sharpness(model, (x, y), probes=0, tolerance=0.05)
    assert loose.iterations < 15 and abs(loose.lambda_max - top) <= loose.residual <= 0.05 * loose.lambda_max
    assert math.isnan(loose.trace_hessian)
    one = sharpness(model, (x, y), probes=0, iterations=1)
    assert one.iterations == 1 and one.residual > 0.1 * abs(one.lambda_max)


def test_lanczos_finds_the_largest_not_the_most_negative():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    values = torch.linspace(-100, 7, 30, dtype=torch.float64)
    matrix = q @ torch.diag(values) @ q.T
    value, residual, used = lanczos(lambda v: [matrix @ v[0]], [torch.randn(30, dtype=torch.float64)], 60, 1e-9)
    assert abs(value - 7) < 1e-6 and residual < 1e-6 and used <= 60


def test_lanczos_of_nothing_stops():
    value, residual, used = lanczos(lambda v: [torch.zeros_like(v[0])], [torch.randn(5)], 10, 1e-3)
    assert (value, residual, used) == (0.0, 0.0, 1)


def test_seed_and_model(problem):
    model, x, y, _ = problem
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    a, b = (sharpness(model, (x, y), seed=3) for _ in range(2))
    assert a == b and a != sharpness(model, (x, y), seed=4)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].weight.grad.eq(1).all() and model[0].bias.grad is None


def test_linear_net_has_no_curvature_in_the_bias_of_a_linear_loss():
    model = nn.Linear(3, 1).double()
    task = Task.of(loss=lambda z, b: z[:, 0])
    got = sharpness(model, (torch.randn(4, 3).double(), torch.zeros(4).long()), loss=task.loss_hook)
    assert got.lambda_max == 0 and got.trace_hessian == 0


def test_selected_parameters_and_batches(problem):
    model, x, y, hessian = problem
    got = sharpness(model, [(x, y), (x * 0, y)], params=["5.weight"], max_batches=1, tolerance=1e-10)
    assert got.parameters == 15 and got.n == N
    first = sum(p.numel() for name, p in model.named_parameters() if name < "5")
    block = hessian[first : first + 15, first : first + 15]
    assert abs(got.lambda_max - torch.linalg.eigvalsh(block)[-1]) <= 1e-6 * got.lambda_max


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)
    model = nets.ViT(C, size=8, dim=8, depth=1, heads=2)
    got = sharpness(model, (torch.randn(4, 3, 8, 8), torch.randint(0, C, (4,))), probes=2, iterations=5)
    assert math.isfinite(got.lambda_max) and got.lambda_max != 0


def test_refusals(problem):
    model, x, y, _ = problem
    with pytest.raises(ConfigError):
        sharpness(model, (x, y), iterations=0)
    with pytest.raises(DataError):
        sharpness(model, [])
    with pytest.raises(ModelError):
        sharpness(copy.deepcopy(model).requires_grad_(False), (x, y))
    assert sharpness(model, (x, y), probes=1).to_dict()["n"] == N
