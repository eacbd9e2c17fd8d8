"""NGF: both solvers against dense linear algebra, features against the net, and what the classifier is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ModelError
from fastfip.methods._classifier import LastLayer
from fastfip.methods._natural import Exact, Kronecker
from fastfip.methods.base import Run
from fastfip.methods.ngf import NGF, NGFConfig
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal
from tests.support.small_nets import CLASSES, TiedNet, conv_net, data, plain_net, same


class Pooled(nn.Module):
    """A 1x1 convolution gives the logits of each place; their mean is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 5, 3)
        self.head = nn.Conv2d(5, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x))).mean((2, 3))


class Tail(nn.Module):
    """What follows the last layer is more than a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.inner(x)


class OutOfOrder(nn.Module):
    """The classifier is registered first and another layer of as many outputs is run before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)
        self.body = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.flatten(1))))


def started(model: nn.Module, clean: object = None, **options) -> tuple[Run, NGF]:
    run = Run(
        model=model.eval(),
        task=Task(),
        clean=CleanSet.of(data() if clean is None else clean),
        config=NGFConfig(**options),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        total_steps=10,
    )
    method = NGF()
    method.setup(run)
    method.make_optimizer(run, method.parameter_groups(run))
    return run, method


def dense_fisher(e: Tensor, h: Tensor) -> Tensor:
    g = torch.stack([torch.outer(a, b).flatten() for a, b in zip(e, h)])
    return g.T @ g / len(g)


# -------------------------------------------------------------------------------- the solvers


@pytest.mark.parametrize(("n", "c", "m"), [(7, 3, 5), (40, 3, 5), (1, 2, 4), (6, 1, 1)])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_the_exact_solver_is_the_dense_one(n: int, c: int, m: int, damping: float) -> None:
    e, h, g = (torch.randn(s, dtype=torch.float64) for s in ((n, c), (n, m), (c, m)))
    solver = Exact(h, damping)
    solver.refresh(e)
    matrix = dense_fisher(e, h) + damping * torch.eye(c * m, dtype=torch.float64)
    want = torch.linalg.solve(matrix, g.flatten()).reshape(c, m)
    torch.testing.assert_close(solver.solve(g), want, rtol=1e-8, atol=1e-9)


def test_the_exact_solver_in_float32_with_errors_that_have_nearly_vanished() -> None:
    e, h, g = 1e-4 * torch.randn(30, 4), 10 * torch.randn(30, 6), 1e-4 * torch.randn(4, 6)
    solver = Exact(h, 1e-3)
    solver.refresh(e)
    matrix = dense_fisher(e.double(), h.double()) + 1e-3 * torch.eye(24, dtype=torch.float64)
    want = torch.linalg.solve(matrix, g.double().flatten()).reshape(4, 6)
    torch.testing.assert_close(solver.solve(g).double(), want, rtol=1e-5, atol=1e-7)
    assert solver.solve(g).dtype == torch.float32


def test_the_kronecker_solver_is_its_definition() -> None:
    e, h, g = (torch.randn(s, dtype=torch.float64) for s in ((20, 3), (20, 5), (3, 5)))
    solver = Kronecker(h, 0.1)
    solver.refresh(e)
    _, qa = torch.linalg.eigh(h.T @ h / 20)
    _, qg = torch.linalg.eigh(e.T @ e / 20)
    scale = torch.stack([(qg.T @ torch.outer(a, b) @ qa).square() for a, b in zip(e, h)]).mean(0)
    want = qg @ ((qg.T @ g @ qa) / (scale + 0.1)) @ qa.T
    torch.testing.assert_close(solver.solve(g), want, rtol=1e-8, atol=1e-10)


def test_the_kronecker_solver_is_exact_where_the_fisher_is_a_kronecker_product() -> None:
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    e, h = a.repeat_interleave(6, 0), b.repeat(4, 1)  # every error with every feature: independent
    g = torch.randn(3, 5, dtype=torch.float64)
    exact, kronecker = Exact(h, 0.01), Kronecker(h, 0.01)
    exact.refresh(e), kronecker.refresh(e)
    torch.testing.assert_close(kronecker.solve(g), exact.solve(g), rtol=0.5, atol=0.5)
    # In the eigenbasis the factors' product is the diagonal, and nothing is left beside it.
    full = torch.kron(kronecker.qg, kronecker.qa).T @ dense_fisher(e, h) @ torch.kron(kronecker.qg, kronecker.qa)
    torch.testing.assert_close(full, torch.diag(kronecker.moments.flatten()), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(kronecker.solve(g), exact.solve(g), rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (conv_net, "6"),
        (plain_net, "3"),
        (TiedNet, "head"),
        (Pooled, "head"),
        (OutOfOrder, "head"),
        (lambda: nn.Sequential(plain_net(), nn.Softmax(1)), "0.3"),
    ],
)
def test_the_classifier_is_found_and_its_features_give_the_logits(make, name: str) -> None:
    model = make().eval()
    with_log = isinstance(model[-1], nn.Softmax) if isinstance(model, nn.Sequential) else False
    run = Run(
        model=model,
        task=Task.of(lambda net, b: net(b[0]).log()) if with_log else Task(),
        clean=CleanSet.of(data()),
        config=NGFConfig(),
        device=torch.device("cpu"),
        generator=torch.Generator(),
        classes=CLASSES,
    )
    found = LastLayer.of(run)
    assert found.name == name
    assert LastLayer.of(run, name).layer is found.layer
    method = NGF()
    method.setup(run)
    x, y = data()
    batch = next(iter(run.clean.batches(24)))
    got = run.forward(batch)
    want = model(x).log() if with_log else model(x)
    torch.testing.assert_close(got.log_softmax(1), want.log_softmax(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch[1], y)


def test_nets_without_a_classifier_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x[:, 0, 0, :CLASSES])))

    tied = OutOfOrder()
    tied.more = nn.Linear(CLASSES, CLASSES)
    tied.more.weight = tied.head.weight
    for model, options, words in (
        (Tail(), {}, "gives the logits directly"),
        (Twice(), {}, "gives the logits directly"),
        (tied, {}, "used in other layers"),
        (plain_net(), {"layer": "0"}, "layer='0' is no Linear or 1x1 convolution of the model: the last ones are 3"),
        (OutOfOrder(), {"layer": "body"}, "'body' does not give"),
    ):
        with pytest.raises(ModelError, match=words):
            started(model, **options)
    with pytest.raises(ModelError, match="another method"):
        fastfip.purify(Tail(), data(), "ngf", steps=2, progress=False)


# -------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("make", [conv_net, Pooled])
def test_the_retainers_diagonal_is_the_layers_own_fisher(make) -> None:
    model = make().eval()
    _, method = started(model)
    want = loop_diagonal(model, data(), 24)
    head = method.classifier.name
    torch.testing.assert_close(method.diagonal[:, :-1], want[f"{head}.weight"].flatten(1), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(method.diagonal[:, -1], want[f"{head}.bias"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("solver", ["exact", "kronecker"])
def test_a_step_is_the_damped_natural_gradient_of_the_objective(solver: str) -> None:
    model = conv_net().double().eval()
    x, y = data()
    x = x.double()
    run, method = started(model, (x, y), kl_clip=None, eta=0.7, solver=solver, damping=0.05)
    with torch.no_grad():
        method.theta += 0.1 * torch.randn_like(method.theta)
    h = torch.cat([model[:6](x), torch.ones(24, 1, dtype=torch.float64)], 1).detach()
    method.backward(run, (h[:8], y[:8]))

    theta = method.theta.detach().clone().requires_grad_(True)
    moved = theta - method.anchor
    total = F.cross_entropy(h[:8] @ theta.T, y[:8]) + 0.35 * (method.diagonal * moved.square()).sum()
    (g,) = torch.autograd.grad(total, theta)
    e = (h @ theta.T).softmax(1).detach() - F.one_hot(y, CLASSES)
    if solver == "exact":
        matrix = dense_fisher(e, h) + 0.05 * torch.eye(g.numel(), dtype=torch.float64)
        want = torch.linalg.solve(matrix, g.flatten()).reshape(g.shape)
    else:
        reference = Kronecker(h, 0.05)
        reference.refresh(e)
        want = reference.solve(g)
    torch.testing.assert_close(method.theta.grad, want, rtol=1e-6, atol=1e-9)


def test_the_clip_bounds_the_step() -> None:
    run, method = started(conv_net(), kl_clip=1e-6)
    batch = next(iter(run.clean.batches(24)))
    method.backward(run, batch)
    clipped = method.theta.grad.clone()
    run, free = started(copy.deepcopy(run.model), kl_clip=None)
    free.backward(run, batch)
    lr = 0.01
    gradient = free.errors(run, batch)[0].T @ batch[0] / 24
    ratio = clipped / free.theta.grad
    assert float(ratio.std()) < 1e-3 * float(ratio.mean()) and float(ratio.mean()) < 1
    # <V, g> before the clip times lr^2 and the factor squared is the bound.
    bound = lr**2 * float((free.theta.grad * gradient).sum()) * float(ratio.mean()) ** 2
    assert bound == pytest.approx(1e-6, rel=1e-3)


def test_only_the_classifier_moves_and_the_net_is_run_once_a_view() -> None:
    model = conv_net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    result = fastfip.purify(model, data(), "ngf", epochs=20, progress=False)
    few = len(calls)
    calls.clear()
    more = fastfip.purify(model, data(), "ngf", epochs=60, progress=False)
    assert len(calls) == few
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, result.state_dict()[name])
        assert moved == name.startswith("6."), name
    assert more.settings["clean_samples"] == 24 and more.history[-1]["loss"] < more.history[0]["loss"]
    assert more.history[-1]["lr"] == pytest.approx(1e-4) and more.history[0]["lr"] == pytest.approx(1e-2)


class Shifted(Dataset):
    """Images that are drawn with new noise each time."""

    def __init__(self) -> None:
        self.x, self.y = data(12)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i] + torch.rand(2, 6, 6), int(self.y[i])


def test_views_of_augmented_samples_take_turns() -> None:
    run, method = started(plain_net(), DataLoader(Shifted(), batch_size=6), views=3)
    assert run.clean.n == 12 and len(run.clean.order(6)) == 2
    passes = [torch.cat([h for h, _ in run.clean.batches(6, shuffle=True, generator=run.generator)]) for _ in range(4)]
    sums = [p.sum(0) for p in passes]
    assert not torch.allclose(sums[0], sums[1]) and not torch.allclose(sums[1], sums[2])
    torch.testing.assert_close(sums[0], sums[3], rtol=1e-4, atol=1e-4)
    run, _ = started(plain_net(), data(12), views=3)
    assert len(run.clean.views) == 1


def test_the_run_gets_its_samples_back() -> None:
    run, method = started(conv_net())
    method.fold(run)
    assert run.clean.n == 24 and next(iter(run.clean.batches(4)))[0].shape == (4, 2, 6, 6)
    assert run.task == Task()


def test_a_transformer_in_bfloat16() -> None:
    model = nets.ViT(classes=CLASSES, size=8, dim=16, depth=1, heads=2, fused=False).bfloat16()
    x, y = torch.rand(12, 3, 8, 8).bfloat16(), torch.arange(12) % CLASSES
    result = fastfip.purify(model, (x, y), "ngf", epochs=5, progress=False)
    assert {v.dtype for v in result.state_dict().values()} == {torch.bfloat16}
    assert not same(result.state_dict(), model.state_dict())
