"""FIP and Fast FIP: each variant is its definition, and the default takes a planted backdoor out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError
from fastfip.methods._objective import WorstCase, retainer
from fastfip.methods._released import surrogate
from fastfip.methods.base import Run
from fastfip.methods.fast_fip import FastFIP, FastFIPConfig
from fastfip.methods.fip import FIP, FIPConfig
from fastfip.worst_case.universal import Perturbations


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]
    model = nn.Sequential(*layers).to(dtype)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def data(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 4


def make_run(config: FIPConfig, model: nn.Module) -> Run:
    x, y = data()
    return Run(
        model=model,
        task=Task(),
        clean=CleanSet.of((x, y)),
        config=config,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=4,
        total_steps=10,
    )


# -------------------------------------------------------------------------------- the released code


def test_released_surrogate_is_its_definition() -> None:
    model, (x, y) = net(), data()
    tensors = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    probes = [[torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors] for _ in range(3)]
    found = surrogate(model(x).log_softmax(1), y, tensors, probes)

    # In words: the gradient of the mean of the N x N matrix log_p[i, y_j]; after every tensor the running sum of the
    # products with the Gaussians is appended to a list; the list's sum is divided by the number of probes.
    log_p = model(x).log_softmax(1)
    mean = torch.stack([log_p[i, y[j]] for i in range(len(x)) for j in range(len(x))]).mean()
    gradients = torch.autograd.grad(mean, tensors)
    appended = []
    for probe in probes:
        running = 0.0
        for g, v in zip(gradients, probe):
            running += float((g * v).sum())
            appended.append(running)
    assert found.item() == pytest.approx(sum(appended) / len(probes), rel=1e-10)


def test_released_surrogate_sees_the_label_histogram_only() -> None:
    model, (x, y) = net(), data()
    tensors = list(model.parameters())
    probes = [[torch.ones_like(t) for t in tensors]]
    one = surrogate(model(x).log_softmax(1), y, tensors, probes)
    other = surrogate(model(x).log_softmax(1), y.flip(0), tensors, probes)
    assert one.item() == pytest.approx(other.item(), rel=1e-9)


def test_released_step_adds_the_gradient_of_both_terms() -> None:
    model = net()
    config = FIPConfig(variant="released", probes=2)
    assert (config.steps, config.lr, config.momentum, config.eta_f, config.trace_every) == (2000, 0.005, 0.95, 0.5, 5)
    run, method = make_run(config, model), FIP()
    x, y = data()
    for step in (0, 1):
        run.step = step
        model.zero_grad()
        run.generator.manual_seed(7)
        method.setup(run)
        run.train_mode()
        method.backward(run, (x, y))
        got = [p.grad.clone() for p in model.parameters()]
        logits = model(x)  # BatchNorm in train mode, as released
        loss = F.cross_entropy(logits, y)
        if step % 5 == 0:
            generator = torch.Generator().manual_seed(7)
            probes = [[torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()] for _ in range(2)]
            loss = loss + 0.5 * surrogate(logits.log_softmax(1), y, list(model.parameters()), probes)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------- the published objective


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


def test_paper_gradient_is_that_of_a_per_sample_loop() -> None:
    model = net()
    anchor = copy.deepcopy(model)
    config = FIPConfig(variant="paper", eta_f=0.3, eta_r=2.0, bn_mode="eval")
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


def test_fast_paper_gradient_is_that_of_a_per_sample_loop() -> None:
    model = net()
    config = FastFIPConfig(variant="paper", eta_f=0.3, eta_r=2.0, affine=False)
    run, method = make_run(config, model), FastFIP()
    method.setup(run)
    shifts = method.space.shifts
    x, y = data()

    def per_sample(n: int, create_graph: bool) -> list[Tensor]:
        with shifts.differentiable():
            loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            return list(torch.autograd.grad(loss, shifts.deltas, create_graph=create_graph))

    diagonal = [sum(g.pow(2) for g in gs) / len(x) for gs in zip(*(per_sample(n, False) for n in range(len(x))))]
    for found, value in zip(method.objective.diagonal, diagonal):
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


def test_retainer_is_zero_at_the_anchor_with_zero_gradient() -> None:
    t = torch.randn(5, requires_grad=True)
    term = retainer([t], [t.detach().clone()], [torch.rand(5)])
    (gradient,) = torch.autograd.grad(term, t)
    assert term.item() == 0 and gradient.abs().max() == 0


# -------------------------------------------------------------------------------- settings


def test_a_variant_brings_its_own_settings_and_keeps_what_was_given() -> None:
    assert FIPConfig().variant == "worst_case"
    paper = FIPConfig().replace(variant="paper")
    assert paper == FIPConfig(variant="paper") and (paper.epochs, paper.steps, paper.eta_r) == (100, None, 5.0)
    assert FIPConfig(lr=0.5).replace(variant="paper").lr == 0.5
    assert FIPConfig(variant="paper", steps=7).epochs is None
    assert FastFIPConfig.from_dict({"variant": "released"}).steps == 2000
    assert FastFIPConfig.from_json(FastFIPConfig(variant="paper").to_json()) == FastFIPConfig(variant="paper")
    with pytest.raises(ConfigError, match="variant"):
        FIPConfig(variant="original")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eta_f"):
        FIPConfig(eta_f=-1)


# -------------------------------------------------------------------------------- the default


def test_trust_bounds_every_step_by_the_fisher() -> None:
    model = net(torch.float32)
    x, y = data(40, torch.float32)
    config = FastFIPConfig(steps=1, lr=5.0, trust=0.01, warmup=0.0, unlearn=0.0, grad_clip=None, schedule="constant")
    run = make_run(config, model)
    run.clean = CleanSet.of((x, y))
    method = FastFIP()
    method.setup(run)
    diagonal = [d.clone() for d in method.objective.diagonal]
    before = [t.detach().clone() for t in method.space.tensors]
    optimizer = method.make_optimizer(run, method.parameter_groups(run))
    for t in method.space.tensors:
        t.requires_grad_(True)
    method.backward(run, (x, y))
    optimizer.step()
    method.after_step(run)
    moved = [((t - b).abs() * d.sqrt()).max() for t, b, d in zip(method.space.tensors, before, diagonal)]
    assert max(moved) <= 0.01 * 1.01 and max(moved) > 0.005
    method.fold(run)


def digits_like(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=generator)
    for k in range(n):
        x[k, 0, 1 + y[k], 1:5] += 0.6
    return x, y


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    """A small net trained on stripes, a tenth of them with a bright corner labelled 0."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x, y = digits_like(400, generator)
    poisoned = torch.rand(400, generator=generator) < 0.15
    x[poisoned, :, 5, 5] = 1.0
    y[poisoned] = 0
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(288, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        pick = torch.randint(0, 400, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
def test_the_default_removes_a_backdoor_that_fine_tuning_leaves(backdoored: nn.Module, method: str) -> None:
    generator = torch.Generator().manual_seed(9)
    x, y = digits_like(200, generator)
    triggered = x[y != 0].clone()
    triggered[:, :, 5, 5] = 1.0

    def rates(model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            clean = (model(x).argmax(1) == y).float().mean()
            return float(clean), float((model(triggered).argmax(1) == 0).float().mean())

    clean = digits_like(60, generator)
    assert rates(backdoored)[0] > 0.97 and rates(backdoored)[1] > 0.9
    left = fastfip.purify(backdoored, [clean], "fine_tune", epochs=10, progress=False)
    assert rates(left.model)[1] > 0.5
    result = fastfip.purify(backdoored, [clean], method, progress=False)
    acc, asr = rates(result.model)
    assert asr < 0.1 and acc > 0.95, (acc, asr)
    assert list(result.model.state_dict()) == list(backdoored.state_dict())
    assert result.settings["best_epoch"] is not None


def test_only_states_of_the_recovery_can_be_kept() -> None:
    run = make_run(FIPConfig(), net())
    objective = WorstCase(run, FIP().make_space(run), run.config)  # type: ignore[arg-type]
    run.step = 0
    assert not objective.is_candidate()
    run.step = run.total_steps
    assert objective.is_candidate()


def test_inputs_that_cannot_be_perturbed_leave_the_clean_terms() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(18, 3))
    tokens, y = torch.randint(0, 10, (24, 3)), torch.arange(24) % 3
    result = fastfip.purify(model, (tokens, y), "fast_fip", steps=4, progress=False)
    assert any("no worst-case inputs" in note for note in result.notes)


def clean_gradient(step: int, **settings: object) -> tuple[list[Tensor], dict[str, object]]:
    """The gradient of the clean terms at a recovery step, without mixtures' chance: every mixture is the batch."""
    torch.manual_seed(4)
    model = net(torch.float64)
    config = FIPConfig(unlearn=0.0, steps=10, kl=0.25, **settings)  # type: ignore[arg-type]
    run = make_run(config, model)
    x, y = data(12, torch.float64)
    objective = WorstCase(run, FIP().make_space(run), config)
    objective.teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    objective.mixable = False
    run.step = step
    for p in model.parameters():
        p.grad = None
    values = objective._clean((x, y))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], values


def test_two_steps_in_turns_have_the_gradient_of_two_whole_ones() -> None:
    whole, values = clean_gradient(0, turns=False)
    first, one = clean_gradient(0, turns=True)
    second, other = clean_gradient(1, turns=True)
    assert set(values) == {"loss", "kl"} and set(one) == {"loss"} and set(other) == {"kl"}
    assert max(g.abs().max() for g in second) > 1e-6
    for a, b, c in zip(first, second, whole):
        torch.testing.assert_close((a + b) / 2, c, rtol=1e-10, atol=1e-12)


def test_the_last_state_is_the_mean_of_the_last_ones() -> None:
    run = make_run(FIPConfig(steps=10, average=0.3), net())
    objective = WorstCase(run, FIP().make_space(run), run.config)  # type: ignore[arg-type]
    run.total_steps = 10
    for run.step in range(10):
        for t in objective.space.tensors:
            t.data.fill_(float(run.step))
        objective.average()
        if run.step < 9:
            assert all((t == run.step).all() for t in objective.space.tensors)
    for t in objective.space.tensors:
        torch.testing.assert_close(t.data, torch.full_like(t, 8.0))


@pytest.mark.parametrize("every", [1, 3])
def test_perturbations_are_improved_in_every_so_many_steps(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    improved = []
    step = Perturbations.step

    def counted(self: Perturbations, *args: object, **kw: object) -> Tensor:
        if kw.get("retain_graph"):
            improved.append(1)
        return step(self, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(Perturbations, "step", counted)
    fastfip.purify(net(torch.float32), data(40, torch.float32), "fast_fip", steps=6, unlearn=1.0, improve_every=every)
    assert len(improved) == 6 / every
