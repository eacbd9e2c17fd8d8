"""`fisher_steps`: each part is its definition, and a planted backdoor goes that fine-tuning leaves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.methods._relative import SMALLEST_VECTOR, SMALLEST_WEIGHT, RelativeSGD, fisher_length
from fastfip.methods.fisher_steps import FisherSteps, FisherStepsConfig
from tests.methods.test_wfip import backdoored, digits_like  # noqa: F401  (a fixture)
from tests.support.fip_runs import data, make_run, net


def test_a_step_is_a_share_of_each_tensors_norm_along_its_momentum() -> None:
    w, b = torch.randn(4, 3).requires_grad_(), torch.full((5,), 1e-4).requires_grad_()
    zero = torch.zeros(2, 2).requires_grad_()
    optimizer = RelativeSGD([{"params": [w, b, zero]}], 0.01, 0.9)
    momentum = [torch.zeros_like(t) for t in (w, b, zero)]
    for _ in range(3):
        before = [t.detach().clone() for t in (w, b, zero)]
        for k, t in enumerate((w, b, zero)):
            t.grad = torch.randn_like(t)
            momentum[k] = 0.9 * momentum[k] + t.grad
        optimizer.step()
        for t, old, m in zip((w, b, zero), before, momentum):
            floor = (SMALLEST_VECTOR if t.dim() < 2 else SMALLEST_WEIGHT) * math.sqrt(t.numel())
            expected = old - 0.01 * max(float(old.norm()), floor) * m / m.norm()
            assert torch.allclose(t.detach(), expected, atol=1e-6)


def test_the_scale_of_the_gradient_does_not_matter_and_no_gradient_moves_nothing() -> None:
    ends = []
    for scale in (1.0, 1e6):
        w, still = torch.ones(3, 3).requires_grad_(), torch.ones(2).requires_grad_()
        w.grad = scale * torch.arange(9.0).reshape(3, 3)
        RelativeSGD([w, still], 0.1, 0.9).step()
        assert torch.equal(still, torch.ones(2))
        ends.append(w.detach())
    assert torch.allclose(*ends, atol=1e-6)
    w = torch.ones(3, 3).requires_grad_()
    for vanished in (0.0, 1e-23, 1e-27, 1e-40):  # squares of such entries underflow
        w.grad = torch.full((3, 3), vanished)
        RelativeSGD([w], 0.1, 0.9).step()
        assert torch.equal(w.detach(), torch.ones(3, 3))


def test_half_the_square_of_the_fisher_length_is_what_a_step_changes_in_nats() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(4000, 3, dtype=torch.float64)
    model.weight.data.mul_(0.1)
    fisher = fastfip.fisher_diagonal(model, [(x, torch.zeros(4000, dtype=torch.int64))], kind="exact")
    total, second = 0.0, 0.0
    for _ in range(40):  # directions of random signs: what is off the diagonal averages out
        d = [1e-3 * torch.randn_like(p) for p in model.parameters()]
        second += 0.5 * fisher_length(d, [fisher["weight"], fisher["bias"]]) ** 2
        moved = F.linear(x, model.weight + d[0], model.bias + d[1])
        p, q = F.log_softmax(model(x), 1), F.log_softmax(moved, 1)
        total += float(F.kl_div(q, p, reduction="batchmean", log_target=True).detach())
    assert total == pytest.approx(second, rel=0.15)


def _one_step(nats: float | None, lr: float = 0.5) -> tuple[float, float]:
    """Return the Fisher length of one step, and the largest share of a tensor's norm that it moves."""
    model = net(torch.float32)
    x, y = data(40, torch.float32)
    config = FisherStepsConfig(
        steps=1, lr=lr, nats=nats, warmup=0.0, schedule="constant", changes=0.0, weight=0.0, augment="none"
    )
    run = make_run(config, model)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = method.make_optimizer(run, method.parameter_groups(run))
    method.backward(run, (x, y))
    optimizer.step()
    d = [p.detach() - b for p, b in zip(model.parameters(), before)]
    diagonal = [] if method.diagonal is None else [method.diagonal[n] for n, _ in model.named_parameters()]
    share = max(float(step.norm() / b.norm()) for step, b in zip(d, before) if b.dim() > 1)
    return (fisher_length(d, diagonal) if diagonal else math.nan), share


def test_the_whole_step_is_no_longer_than_its_bound_in_the_fisher_metric() -> None:
    length, share = _one_step(0.02)
    assert length == pytest.approx(0.02, rel=1e-3) and share < 0.5
    length, share = _one_step(1e6)
    assert length < 1e6 and share == pytest.approx(0.5, rel=1e-4)
    assert _one_step(None)[1] == pytest.approx(0.5, rel=1e-4)


def test_the_fisher_follows_the_model_by_labels_drawn_from_it() -> None:
    model = net(torch.float32)
    x, _ = data(32, torch.float32)
    with torch.no_grad():
        wrong = model(x).argmin(1)  # the empirical Fisher of such labels is larger
    run = make_run(FisherStepsConfig(steps=100, weight=0.0, changes=0.0), model)
    method = FisherSteps()
    method.setup(run)
    exact = fastfip.fisher_diagonal(model, [(x, wrong)], kind="exact")
    empirical = fastfip.fisher_diagonal(model, [(x, wrong)], kind="empirical")
    total = {"drawn": 0.0, "exact": 0.0, "empirical": 0.0}
    for run.step in range(0, 800, 4):
        method._renew(run, (x, wrong))
        if run.step >= 400:
            total["drawn"] += float(sum(value.sum() for value in method.diagonal.values())) / 100
    total["exact"], total["empirical"] = (float(sum(v.sum() for v in f.values())) for f in (exact, empirical))
    assert total["drawn"] == pytest.approx(total["exact"], rel=0.1)
    assert total["empirical"] > 1.2 * total["exact"]
    old = float(method.diagonal["0.weight"].sum())
    with torch.no_grad():
        model[-1].weight.mul_(0.0)
    for run.step in range(800, 880, 4):
        method._renew(run, (x, wrong))
    assert float(method.diagonal["0.weight"].sum()) < 0.1 * old


def test_the_radius_grows_until_a_class_is_reached(backdoored: nn.Module) -> None:  # noqa: F811
    x, y = digits_like(60, torch.Generator().manual_seed(9))
    radii = []
    for radius in (0.01, 0.3):
        run = make_run(FisherStepsConfig(radius=radius), backdoored)
        run.clean = CleanSet.of((x, y))
        method = FisherSteps()
        method.setup(run)
        assert method.worst is not None
        radii.append(method.worst.relative_radius)
        assert float(method.worst.success.max()) > 0.3 or radii[-1] * 1.4 > 0.4
    assert radii[0] > 0.01 and radii[1] >= 0.3 - 1e-6


@pytest.mark.parametrize("step", [0, 5, 22, 59])
def test_a_loss_that_is_not_finite_once_does_no_harm(step: int) -> None:
    """At a renewal of the Fisher, while it unlearns, and in the last step; wherever it is the run goes on."""
    seen: list[int] = []

    def loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = F.cross_entropy(logits, batch[1], reduction="none")
        return out * float("nan") if seen and seen[-1] == step else out

    class Counted(FisherSteps):
        def backward(self, run, batch):
            seen.append(run.step)
            values = super().backward(run, batch)
            seen.append(-1)
            return values

    model = net(torch.float32)
    batch = data(24, torch.float32)
    result = fastfip.purify(model, [batch], Counted, steps=60, loss=loss, progress=False)
    assert any("not finite" in note for note in result.notes)
    for value in result.model.state_dict().values():
        assert bool(torch.isfinite(value.float()).all())


def test_a_fisher_that_is_not_finite_leaves_the_bound_as_it_was() -> None:
    model = net(torch.float32)
    x, y = data(32, torch.float32)
    run = make_run(FisherStepsConfig(steps=100, weight=0.0, changes=0.0), model)
    method = FisherSteps()
    method.setup(run)
    method._renew(run, (x, y))
    old = {name: value.clone() for name, value in method.diagonal.items()}
    run.task = fastfip.data.Task(loss_hook=lambda logits, batch: logits.sum(1) * float("nan"))
    run.step = 4
    method._renew(run, (x, y))
    assert all(torch.equal(old[name], value) for name, value in method.diagonal.items())
    assert math.isnan(fisher_length([torch.ones(2)], [torch.tensor([1.0, math.nan])]))


def test_a_model_without_a_fisher_names_the_way_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4))
    with pytest.raises(fastfip.errors.ModelError, match="nats=None"):
        fastfip.purify(model, [data(24, torch.float32)], "fisher_steps", steps=4, progress=False)


def rates(model: nn.Module, x: Tensor, y: Tensor, triggered: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        clean = (model(x).argmax(1) == y).float().mean()
        return float(clean), float((model(triggered).argmax(1) == 0).float().mean())


def test_a_backdoor_goes_that_fine_tuning_leaves(backdoored: nn.Module) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(9)
    x, y = digits_like(200, generator)
    triggered = x[y != 0].clone()
    triggered[:, :, 5, 5] = 1.0
    clean = digits_like(60, generator)
    assert rates(backdoored, x, y, triggered)[1] > 0.9
    left = fastfip.purify(backdoored, [clean], "fine_tune", epochs=10, progress=False)
    assert rates(left.model, x, y, triggered)[1] > 0.5
    # What a digit of these is hangs on its row: they must not be moved.
    result = fastfip.purify(backdoored, [clean], "fisher_steps", augment="none", progress=False)
    acc, asr = rates(result.model, x, y, triggered)
    assert asr < 0.1 and acc > 0.95, (acc, asr)
    assert list(result.model.state_dict()) == list(backdoored.state_dict())
    again = fastfip.purify(backdoored, [clean], "fisher_steps", augment="none", progress=False)
    for a, b in zip(result.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


def test_at_small_steps_it_is_the_worst_case_that_removes_it(backdoored: nn.Module) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(9)
    x, y = digits_like(200, generator)
    triggered = x[y != 0].clone()
    triggered[:, :, 5, 5] = 1.0
    clean = digits_like(60, generator)
    left = []
    for weight in (0.5, 0.0):
        options = {"augment": "none", "lr": 0.001, "weight": weight}
        result = fastfip.purify(backdoored, [clean], "fisher_steps", progress=False, **options)
        left.append(rates(result.model, x, y, triggered)[1])
    assert left[0] < 0.25 and left[1] > left[0] + 0.2, left


def test_no_pass_is_spent_on_a_score_that_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    score = fastfip.methods.Method.score
    monkeypatch.setattr(fastfip.methods.Method, "score", lambda self, run: passes.append(1) or score(self, run))
    batch = data(24, torch.float32)
    fastfip.purify(net(torch.float32), [batch], "fisher_steps", steps=4, progress=False)
    assert not passes
    fastfip.purify(net(torch.float32), [batch], "fisher_steps", steps=4, holdout=0.2, select="best", progress=False)
    assert passes


def test_inputs_that_cannot_be_changed_are_said_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 6), nn.Linear(6, 4))
    tokens = torch.randint(0, 20, (32, 5))
    result = fastfip.purify(model, [(tokens, torch.arange(32) % 4)], "fisher_steps", steps=4, progress=False)
    assert any("ONLY FINE-TUNED" in alert for alert in result.alerts)
