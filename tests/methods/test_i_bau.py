"""I-BAU: the hypergradient against exact ones in float64, the ball, and what a step does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastfip
from fastfip.methods.i_bau import IBAU, IBAUConfig, hypergradient
from tests.support.departures import make_run, planted, vit


class Problem:
    """inner = |A(theta) delta - b|^4-ish + ridge: strictly convex in delta, its minimiser moves with theta."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.theta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        self.bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
        self.target = torch.randn(5, dtype=torch.float64)

    def inner(self, d: Tensor) -> Tensor:
        out = torch.tanh(self.theta) @ d + self.bias
        return torch.nn.functional.softplus(out).sum() + 0.5 * d.square().sum()

    def outer(self, d: Tensor) -> Tensor:
        return (d - self.target).square().sum() + (self.theta.sum(1) * self.bias).sum() * d.sum()

    def minimise(self, steps: int, graph: bool) -> Tensor:
        d = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            (g,) = torch.autograd.grad(self.inner(d), d, create_graph=graph)
            d = d - 0.3 * g
            d = d if graph else d.detach().requires_grad_(True)
        return d

    @property
    def params(self) -> list[Tensor]:
        return [self.theta, self.bias]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    error = sum(float((a - b).square().sum()) for a, b in zip(found, expected))
    return (error / sum(float(b.square().sum()) for b in expected)) ** 0.5


def test_against_the_linear_system_and_a_long_inner_loop() -> None:
    problem = Problem()
    delta = problem.minimise(300, graph=False).detach().requires_grad_(True)
    # By the implicit function theorem, the system solved densely.
    slope = torch.autograd.grad(problem.inner(delta), delta, create_graph=True)[0]
    h = torch.stack([torch.autograd.grad(s, delta, retain_graph=True)[0] for s in slope])
    g, *direct = torch.autograd.grad(problem.outer(delta), [delta, *problem.params])
    mixed = torch.autograd.grad(slope, problem.params, torch.linalg.solve(h, g))
    dense = [a - b for a, b in zip(direct, mixed)]
    unrolled = list(torch.autograd.grad(problem.outer(problem.minimise(300, graph=True)), problem.params))
    assert relative(dense, unrolled) < 1e-9
    assert relative(list(direct), dense) > 0.1  # the implicit part matters here

    def found(terms: int, solver: str) -> float:
        out = hypergradient(problem.inner, problem.outer, delta, problem.params, terms, 0.3, solver)
        assert float(out[0]) == float(problem.outer(delta).detach())
        return relative(out[1], dense)

    assert found(300, "fixed_point") < 1e-9
    assert found(5, "conjugate_gradient") < 1e-9
    errors = [found(k, "fixed_point") for k in (1, 2, 5, 10)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.2


def test_the_series_is_the_truncated_one() -> None:
    """terms = K: step * sum_{k<K} (I - step H)^k, as K steps of the fixed-point iteration from zero give it."""
    problem = Problem()
    delta = problem.minimise(3, graph=False).detach().requires_grad_(True)
    slope = torch.autograd.grad(problem.inner(delta), delta, create_graph=True)[0]
    h = torch.stack([torch.autograd.grad(s, delta, retain_graph=True)[0] for s in slope])
    g, *direct = torch.autograd.grad(problem.outer(delta), [delta, *problem.params])
    v = torch.zeros_like(g)
    for _ in range(4):
        v = v - 0.3 * h @ v + g
    mixed = torch.autograd.grad(slope, problem.params, 0.3 * v)
    _, found = hypergradient(problem.inner, problem.outer, delta, problem.params, 4, 0.3)
    assert relative(found, [a - b for a, b in zip(direct, mixed)]) < 1e-12


def test_the_series_ends_where_it_diverges() -> None:
    """Curvature 50 and step 0.3: the first factor is -14. With one term v is step * g."""
    w, delta = torch.ones(1, requires_grad=True), torch.zeros(1)
    inner = lambda d: 25 * (d - w).square().sum()  # noqa: E731
    found = [hypergradient(inner, lambda d: 3 * d.sum(), delta, [w], terms, 0.3)[1][0] for terms in (1, 5, 50)]
    assert found[0] == found[1] == found[2] == pytest.approx(50 * 0.3 * 3)


def test_an_outer_loss_that_ignores_delta_and_curvature_that_overflows() -> None:
    problem = Problem()
    delta = torch.zeros(5, dtype=torch.float64)
    _, found = hypergradient(problem.inner, lambda d: problem.theta.square().sum(), delta, problem.params)
    assert torch.equal(found[0], 2 * problem.theta) and torch.equal(found[1], torch.zeros(3))
    w = torch.ones(2, requires_grad=True)

    def steep(d: Tensor) -> Tensor:  # the second derivative of log at 1e-30 is no float32
        return (w * (d + 1e-30).log()).sum()

    _, (gradient,) = hypergradient(steep, lambda d: (w * (d + 1)).sum(), torch.zeros(2), [w])
    assert torch.equal(gradient, torch.ones(2))


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_the_perturbation_stays_in_the_ball_in_pixels(radius: float) -> None:
    model, (x, y) = planted()
    config = IBAUConfig(radius=radius, low=0.0, high=2.0, batch_size=32)
    run = make_run(config, model, (x, y))
    method = IBAU()
    method.setup(run)
    method.ascend(run)
    (delta,) = method.deltas.values()
    assert delta.shape == (1, 1, 8, 8) and 0.5 * radius < float(delta.norm()) <= radius * 1.0001
    with torch.no_grad():
        before, after = (float(method.at(run, (x, y), d)) for d in (torch.zeros_like(delta), delta))
        assert method.at(run, (x, y), torch.zeros_like(delta)) == run.loss(model(x), (x, y)).mean()
        seen = []
        model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        method.at(run, (x, y), delta)
    assert after > before + 1e-3
    assert torch.allclose(seen[0], (x + 2 * delta).clamp(0, 2), atol=1e-6)


def test_a_step_is_the_hypergradient_of_the_batch() -> None:
    model, (x, y) = planted()
    model = model.double()
    batch = (x.double(), y)
    run = make_run(IBAUConfig(share=0.25, terms=3), model, batch)
    method = IBAU()
    method.setup(run)
    method.backward(run, batch)
    run.generator.manual_seed(0)
    method.round = 0
    method.ascend(run)
    (delta,) = method.deltas.values()
    rows = torch.zeros(len(y), 1, 1, 1, dtype=torch.float64)
    rows[torch.randperm(len(y), generator=run.generator)[: len(y) // 4]] = 1
    params = list(model.parameters())
    low, high = batch[0].amin(), batch[0].amax()
    loss = lambda d: torch.nn.functional.cross_entropy(  # noqa: E731
        model((batch[0] + d * (high - low)).clamp(low, high)), y
    )
    _, expected = hypergradient(
        lambda d: 1e-3 * d.square().sum() - loss(d), lambda d: loss(rows * d), delta, params, 3, 0.1
    )
    assert relative([p.grad for p in params], expected) < 1e-6


def test_shared_perturbation_is_unlearned_reproducibly() -> None:
    model, batch = planted()
    options = {"epochs": 15, "batch_size": 32, "radius": 2.0, "progress": False}
    first, second = (fastfip.purify(model, batch, "i_bau", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    worst = []
    for net in (model, first.model):
        run = make_run(IBAUConfig(radius=2.0, batch_size=32), net, batch)
        method = IBAU()
        method.setup(run)
        method.ascend(run)
        with torch.no_grad():
            worst.append(float(method.at(run, batch, next(iter(method.deltas.values())))))
    assert worst[1] < 0.5 * worst[0]
    assert list(first.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("solver", ["fixed_point", "conjugate_gradient"])
def test_it_runs_on_attention(solver: str) -> None:
    model, batch = vit()
    result = fastfip.purify(model, batch, "i_bau", epochs=2, solver=solver, progress=False)
    assert all(torch.isfinite(v).all() for v in result.state_dict().values())
    assert not torch.equal(result.model.head.weight, model.head.weight)
