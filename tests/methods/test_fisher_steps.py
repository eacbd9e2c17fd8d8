"""`fisher_steps`: each part is its definition, and a planted backdoor goes that fine-tuning leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.methods import _gentle, fisher_steps
from fastfip.methods._reach import search_reach
from fastfip.methods._relative import SMALLEST_VECTOR, SMALLEST_WEIGHT, RelativeSGD, fisher_length
from fastfip.methods.fisher_steps import FisherSteps, FisherStepsConfig
from fastfip.methods.wfip import method as wfip_method
from fastfip.testing.nets import PointNet
from fastfip.worst_case.added_points import AddedPoints
from fastfip.worst_case.universal import Perturbations
from tests.methods.test_wfip import backdoored, digits_like  # noqa: F401  (a fixture)
from tests.support.fip_runs import data, make_run, net
from tests.support.small_nets import OneHot


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


def test_of_a_table_of_vectors_as_many_rows_count_as_move() -> None:
    table = torch.randn(50, 4).requires_grad_()
    table.data /= table.data.norm(dim=1, keepdim=True)
    for rows in (1, 8, 50):
        before = table.detach().clone()
        table.grad = torch.zeros_like(table)
        table.grad[:rows] = F.normalize(torch.randn(rows, 4), dim=1)
        RelativeSGD([table], 0.1, 0.9, tables={id(table)}).step()
        assert float((table.detach() - before).norm()) == pytest.approx(0.1 * math.sqrt(rows), rel=1e-4)
        table.data.copy_(before)


def _step(model: nn.Module, size: float) -> list[Tensor]:
    return [size * torch.randn_like(p) for p in model.parameters()]


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_the_length_of_a_step_is_that_of_the_whole_fisher_and_twice_its_divergence(bn_mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    model[1].running_var.fill_(0.3)
    x = torch.randn(60, 5, dtype=torch.float64)
    run = make_run(FisherStepsConfig(bn_mode=bn_mode), model.eval(), classes=4)
    tensors, step = list(model.parameters()), _step(model, 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fisher_length(run, (x, None), tensors, step, 1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())

    def logits(values: tuple[Tensor, ...]) -> Tensor:
        w, b, gamma, beta, w2, b2 = values
        h = x @ w.T + b
        kept = (
            (h.mean(0), h.var(0, correction=0))
            if bn_mode == "train"
            else (model[1].running_mean, torch.full_like(b, 0.3))
        )
        return torch.tanh((h - kept[0]) / (kept[1] + model[1].eps).sqrt() * gamma + beta) @ w2.T + b2

    with torch.no_grad():
        here, u = torch.func.jvp(logits, (tuple(p.detach() for p in tensors),), (tuple(step),))
        p = here.softmax(1)
        definition = ((p * (u - (p * u).sum(1, keepdim=True)).square()).sum(1)).mean().sqrt()
        small = tuple(t + 1e-3 * d for t, d in zip(tensors, step))
        divergence = F.kl_div(logits(small).log_softmax(1), p.log(), reduction="batchmean", log_target=True)
    assert found == pytest.approx(float(definition), rel=2e-3)
    assert 0.5 * (1e-3 * found) ** 2 == pytest.approx(float(divergence), rel=1e-2)


def test_with_a_loss_of_other_outputs_the_length_is_that_of_the_empirical_fisher() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    run = make_run(FisherStepsConfig(), model, classes=None)
    run.task = fastfip.data.Task(loss_hook=lambda out, batch: (out - batch[1]).square().sum(1))
    step = _step(model, 0.3)
    found = fisher_length(run, (x, y), list(model.parameters()), step, 1e-4)
    residual = 2 * (model(x) - y)
    along = (residual * (x @ step[0].T + step[1])).sum(1)
    assert found == pytest.approx(float(along.detach().square().mean().sqrt()), rel=1e-3)


def test_outputs_that_are_not_finite_have_no_length() -> None:
    model = nn.Linear(3, 2)
    run = make_run(FisherStepsConfig(), model, classes=2)
    x = torch.full((4, 3), math.inf)
    assert not math.isfinite(fisher_length(run, (x, None), list(model.parameters()), _step(model, 1.0), 0.1))


def _one_step(length: float | None, lr: float = 0.5) -> tuple[float, float]:
    """Return the Fisher length of one step, and the largest share of a tensor's norm that it moves."""
    model = net(torch.float32)
    x, y = data(32, torch.float32)
    config = FisherStepsConfig(
        steps=1, lr=lr, length=length, warmup=0.0, schedule="constant", changes=0.0, weight=0.0, augment="none",
        mirror=False, peak=0.0,
    )  # fmt: skip
    run = make_run(config, model)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = method.make_optimizer(run, method.parameter_groups(run))
    method.backward(run, (x, y))
    optimizer.step()
    d = [p.detach() - b for p, b in zip(model.parameters(), before)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before):
            p.copy_(b)
    share = max(float(step.norm() / b.norm()) for step, b in zip(d, before) if b.dim() > 1)
    return fisher_length(run, (x, y), list(model.parameters()), d, 0.1), share


def test_the_whole_step_is_no_longer_than_its_bound_in_the_fisher_metric() -> None:
    longest, share = _one_step(1e6)
    assert longest < 1e6 and share == pytest.approx(0.5, rel=1e-4)
    length, share = _one_step(0.5 * longest)
    assert length == pytest.approx(0.5 * longest, rel=0.2) and share == pytest.approx(0.25, rel=0.2)
    assert _one_step(1e-9)[1] == pytest.approx(0.125, rel=1e-4)  # a quarter of the largest step, at least
    assert _one_step(None)[1] == pytest.approx(0.5, rel=1e-4)


def test_the_weights_go_back_along_the_line_and_the_statistics_are_of_what_they_are_then() -> None:
    batch = data(24, torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    model[2].momentum = 0.3
    ends = []
    for back in (0.0, 0.25):
        options = {"back": back, "steps": 6, "augment": "none", "mirror": False, "changes": 0.0}
        ends.append(fastfip.purify(model, [batch], "fisher_steps", force=True, progress=False, **options).model)
    for received, end, there in zip(model.parameters(), *(end.parameters() for end in ends)):
        assert torch.allclose(there, end + 0.25 * (received - end), atol=1e-6)
    h = ends[1][1](ends[1][0](batch[0]))
    assert torch.allclose(ends[1][2].running_mean, h.mean(0), atol=1e-5)
    assert torch.allclose(ends[1][2].running_var, h.var(0), rtol=1e-4)
    assert ends[1][2].momentum == 0.3


def test_classes_whose_mirror_images_the_model_knows_are_mirrored() -> None:
    class Sides(nn.Module):  # class 0: bright left, class 1: bright right, class 2: bright top
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, 0] * self.scale
            sides = (x[:, :, :4], x[:, :, 4:], x[:, :4])
            return torch.stack([side.mean((1, 2)) for side in sides], 1)

    x, y = 0.1 * torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    x[y == 0, :, :, :4] += 1
    x[y == 1, :, :, 4:] += 1
    x[y == 2, :, :4] += 1
    run = make_run(FisherStepsConfig(weight=0.0, changes=0.0), Sides(), classes=3)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    assert method.symmetric is not None and method.symmetric.tolist() == [False, False, True]
    seen = method._mirrored(run, (x, y))[0]
    same, other = ((seen == t).flatten(1).all(1) for t in (x, x.flip(3)))
    assert bool(same[y < 2].all()) and bool((same | other).all()) and 0 < int((~same).sum()) < 10


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
        assert float(method.worst.success.max()) > 0.3 or radii[-1] * 1.3 > 0.4
    assert radii[0] > 0.15 - 1e-6 and radii[1] >= 0.3 - 1e-6


def test_of_more_classes_than_a_batch_has_samples_the_one_that_is_reached_is_found() -> None:
    torch.manual_seed(1)
    classes, hidden = 400, 123
    x = torch.rand(128, 1, 8, 8)
    x[:, :, 0] = 0.5  # no clean image differs there, and one class answers to it
    means = torch.randn(classes, 64)
    means[:, :8] = 0.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        model[1].weight.copy_(means)
        model[1].weight[hidden, :8] = 60.0
        model[1].bias.zero_()[hidden] = -8 * 60.0 * 0.5 - 20.0
        # The range of the pixels has to hold the trigger.
        x[:4, :, 0] = torch.tensor([0.0, 0.1, 0.9, 1.0])[:, None, None]
        y = model(x).argmax(1)
    run = make_run(FisherStepsConfig(), model, classes)
    run.clean = CleanSet.of((x[4:], y[4:]))
    worst = Perturbations.of(x, classes, run.generator, 0.05)
    search_reach(run, worst)
    assert int(worst.success.argmax()) == hidden and float(worst.success.max()) >= 0.9
    assert worst.relative_radius < 0.2  # drawn alike, it is found at 0.31


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


def test_a_length_that_is_not_finite_leaves_the_bound_as_it_was() -> None:
    model = net(torch.float32)
    x, y = data(32, torch.float32)
    run = make_run(FisherStepsConfig(steps=100, weight=0.0, changes=0.0, mirror=False), model)
    method = FisherSteps()
    method.setup(run)
    tensors, step = list(model.parameters()), _step(model, 1.0)
    method.seen = (x, y)
    method._measure(run, tensors, step)
    old = method.measured
    assert old is not None and old > 0
    method.seen = (torch.full_like(x, math.inf), y)
    method._measure(run, tensors, step)
    assert method.measured == old


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
        options = {"augment": "none", "lr": 0.001, "weight": weight, "back": 0.0}
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
    model = OneHot(20, 4)
    tokens = torch.randint(0, 20, (32, 5))
    result = fastfip.purify(model, [(tokens, torch.arange(32) % 4)], "fisher_steps", steps=4, progress=False)
    assert any("ONLY FINE-TUNED" in alert for alert in result.alerts)


@pytest.mark.usefixtures("one_short_search")
@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip", "wfip"])
def test_token_models_and_tasks_without_classes_unlearn_a_worst_case(method: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (32, 7))
    text = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(42, 4))
    by_token = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20))

    def loss(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:  # one for each position, as a language model has
        return F.cross_entropy(out[:, :-1].transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)

    def squares(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return (out - batch[1]).square().mean(1)

    images = (torch.rand(32, 1, 4, 4), torch.rand(32, 4))
    cases: list[tuple[nn.Module, object, dict[str, object]]] = [
        (text, (tokens, torch.arange(32) % 4), {}),
        (by_token, (tokens,), {"loss": loss, "forward": lambda model, batch: model(batch[0])}),
        (net(torch.float32), images, {"loss": squares}),
    ]
    for model, clean, options in cases:
        result = fastfip.purify(model, [clean], method, steps=10, progress=False, force=True, **options)
        assert not any("ONLY FINE-TUNED" in alert or "NO WORST CASE" in alert for alert in result.alerts)
        assert result.seconds["search"] > 0 and any("worst_case_loss" in record for record in result.history)
        assert not any(module._forward_hooks for module in result.model.modules())


def test_on_texts_steps_are_as_short_as_the_fisher_asks_for() -> None:
    """A model of images has a least step; one of texts, whose answers hang on small changes, has none."""
    shortest = []
    for table in (True, False):
        torch.manual_seed(0)
        ids = torch.randint(0, 20, (64, 6))
        first = nn.Embedding(20, 6) if table else nn.Linear(1, 6)
        model = nn.Sequential(first, nn.Flatten(), nn.Linear(36, 4))
        x = ids if table else ids[:, :, None].float()
        result = fastfip.purify(model, [(x, ids[:, 0] % 4)], "fisher_steps", steps=6, length=1e-4, progress=False)
        shortest.append(result.history[1]["relative_step"] / 0.02)
    assert shortest[0] < 0.2 < shortest[1], shortest


def test_a_layer_whose_vectors_do_not_reach_the_answers_is_no_place() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(20, 6), nn.Linear(20, 4)

        def forward(self, ids: Tensor) -> Tensor:
            self.words(ids)
            return self.head(F.one_hot(ids, 20).float().mean(1))

    clean = (torch.randint(0, 20, (32, 5)), torch.arange(32) % 4)
    result = fastfip.purify(Deaf(), [clean], "fisher_steps", steps=4, progress=False, force=True)
    assert any("ONLY FINE-TUNED" in alert for alert in result.alerts)


def test_images_whose_targets_may_be_places_are_not_moved() -> None:
    seen: list[Tensor] = []

    def loss(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        seen.append(batch[0])
        return (out - batch[1]).square().mean(1)

    x = torch.rand(32, 1, 4, 4)
    options = {"steps": 4, "changes": 0.0, "weight": 0.0, "loss": loss, "progress": False, "batch_size": 32}
    result = fastfip.purify(net(torch.float32), [(x, torch.rand(32, 4))], "fisher_steps", **options)
    assert all(torch.equal(part.flatten().sort().values, x.flatten().sort().values) for part in seen if len(part) == 32)
    assert any("not moved" in note for note in result.notes)


def test_the_bound_is_wider_where_the_first_part_hardly_raises_the_loss() -> None:
    run = make_run(FisherStepsConfig(steps=10, peak=1.0, changes=0.3, unlearn=0.2), net(torch.float32))
    method = FisherSteps()
    losses = (None, 2.0, 1.0, 0.8, 0.1, 0.0)

    def factors() -> list[float]:
        out = []
        for method.mean_loss in losses:
            out.append(method._growth(run))
        return out

    assert factors() == pytest.approx([1, 1, 1, 1.5625, 3, 3])
    run.step = 4  # of 10: the first part is over
    assert factors() == [1] * 6
    run.step, run.config = 0, FisherStepsConfig(peak=0.0)
    assert factors() == [1] * 6


def test_it_goes_back_also_where_the_last_step_is_left_out() -> None:
    seen: list[int] = []

    class Counted(FisherSteps):
        def _go_back(self, run, start):
            seen.append(run.step)
            super()._go_back(run, start)

        def backward(self, run, batch):
            values = super().backward(run, batch)
            return {**values, "loss": math.nan} if run.step == wrong[0] else values

    wrong = [-1]
    for wrong[0] in (-1, 5):
        fastfip.purify(net(torch.float32), [data(24, torch.float32)], Counted, steps=6, progress=False)
    assert seen == [5, 6]


@pytest.mark.parametrize("enough", [False, True])
def test_with_fewer_than_three_samples_a_class_steps_are_short_and_statistics_stay(enough: bool) -> None:
    torch.manual_seed(0)
    classes = 20
    x, y = torch.randn(3 * classes - 1 + enough, 6), torch.arange(3 * classes - 1 + enough) % classes
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, classes)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(0.1)
        model[3].weight.mul_(20)  # sure of itself and wrong: the Fisher asks for short steps
    options = {"steps": 12, "length": 1e-3, "force": True, "progress": False}
    result = fastfip.purify(model, [(x, y)], "fisher_steps", **options)
    steps = [record["relative_step"] for record in result.history if "relative_step" in record]
    floor = 0.25 * FisherStepsConfig().lr
    assert (max(steps) >= 0.5 * floor) == enough
    assert torch.equal(result.model[1].running_mean, model[1].running_mean) != enough
    assert any("cannot teach again" in alert for alert in result.alerts) != enough


def test_what_was_asked_for_stays_with_few_samples_a_class() -> None:
    x, y = torch.randn(40, 6), torch.arange(40) % 20
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 20)).eval()
    result = fastfip.purify(model, [(x, y)], "fisher_steps", bn_mode="freeze", steps=4, force=True, progress=False)
    assert torch.equal(result.model[1].weight, model[1].weight) and result.history[-1]["step"] == 4
    result = fastfip.purify(model, [(x, y)], "fisher_steps", force=True, progress=False)
    assert result.history[-1]["step"] == 75


def test_sparse_gradients_are_taken() -> None:
    model = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Linear(6, 4))
    before = model[0].weight.detach().clone()
    tokens = torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(0))
    result = fastfip.purify(
        model, [(tokens, torch.arange(32) % 4)], "fisher_steps", steps=4, progress=False, force=True
    )
    assert bool(torch.isfinite(result.model[0].weight).all()) and not torch.equal(result.model[0].weight, before)


def test_point_clouds_are_changed_and_moved_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their axis of points is found, a part of the steps changes them, all steps move them."""
    seen: dict[str, list[int]] = {"changed_points": [], "moved_points": []}
    for name in seen:
        real = getattr(fisher_steps, name)

        def spy(task, batch, axis, generator, name=name, real=real):
            seen[name].append(axis)
            return real(task, batch, axis, generator)

        monkeypatch.setattr(fisher_steps, name, spy)
    torch.manual_seed(0)
    x = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41)[:, None, None] / 20
    y = torch.arange(40) % 4
    settings = {"steps": 10, "batch_size": 20, "force": True, "progress": False}
    fastfip.purify(PointNet(4, (8, 16), 8), (x, y), "fisher_steps", **settings)
    # In each step those that it learns from, and those at which the received answers are held.
    assert len(seen["changed_points"]) == 4 and len(seen["moved_points"]) == 2 * 10
    assert {*seen["changed_points"], *seen["moved_points"]} == {1}
    seen["moved_points"].clear()
    fastfip.purify(PointNet(4, (8, 16), 8), (x, y), "fisher_steps", augment="none", changes=0.0, **settings)
    assert not seen["moved_points"] and len(seen["changed_points"]) == 4


def test_point_clouds_keep_batchnorms_statistics_and_go_three_tenths_back() -> None:
    torch.manual_seed(0)
    model = PointNet(4, (8, 16), 8)
    x = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41)[:, None, None] / 20
    settings = {"steps": 6, "batch_size": 20, "force": True, "progress": False}

    def tuned(**more: Any) -> dict[str, Tensor]:
        result = fastfip.purify(model, (x, torch.arange(40) % 4), "fisher_steps", **settings, **more)
        used = result.settings["config"]  # what was used is said
        assert (used["bn_mode"], used["back"]) == ("eval", more.get("back", 0.3))
        return result.model.state_dict()

    assert tuned(back=0.1) is not None  # the default for images, but named
    usual, named, own = tuned(), tuned(back=0.3), tuned(back=0.9)
    before = model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, usual[name])}
    assert moved == {name for name, _ in model.named_parameters()}  # no buffer is among them
    for name in moved:
        assert torch.equal(usual[name], named[name])
        torch.testing.assert_close(7 * (own[name] - before[name]), usual[name] - before[name], rtol=1e-2, atol=1e-5)


def test_on_a_cpu_clouds_go_through_the_model_in_parts_and_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gentle, "CLOUD_POINTS", 119)  # of clouds of 20 points: five together
    torch.manual_seed(0)
    model = PointNet(4, (8, 16), 8)
    model.head[3].p = 0.0  # what dropout draws depends on the parts
    x = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41)[:, None, None] / 20
    y, settings = torch.arange(40) % 4, {"steps": 6, "batch_size": 20, "force": True, "progress": False}
    seen: list[int] = []

    def forward(net: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return net(batch[0])

    def tuned(**more: Any) -> tuple[int, list[Tensor]]:
        result = fastfip.purify(model, (x, y), "fisher_steps", forward=forward, **settings, **more)
        return result.settings["micro_batch"], list(result.model.parameters())

    parts, in_parts = tuned()
    few = seen.count(5)
    seen.clear()
    named, whole = tuned(micro_batch=1000)  # as given
    assert (parts, named) == (5, 1000) and few > 100 > 5 > seen.count(5) and max(seen) == 64
    for one, other in zip(in_parts, whole):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert tuned(bn_mode="train")[0] is None  # BatchNorm's statistics are of the whole batch
    monkeypatch.setattr(_gentle, "CLOUD_POINTS", 19)
    assert tuned()[0] == 4, "clouds at least, however large they are"


class Waves(nn.Module):
    """Series, [N, 3, T]: their order counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean(2))


ADDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "clouds": (lambda: PointNet(4, (8, 16), 8), (20, 3), True),
    "series": (Waves, (3, 20), False),
    "images": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), (3, 8, 8), False),
}


@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip"])
@pytest.mark.parametrize("kind", ADDED)
def test_points_are_added_to_clouds_and_to_nothing_else(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step that unlearns; `fisher_steps` takes half of a batch of at least 64 samples for each of the two."""
    make, shape, taken = ADDED[kind]
    seen: list[type] = []
    sizes: set[int] = set()
    radii: list[float] = []
    module = fisher_steps if method == "fisher_steps" else wfip_method
    real = module.unlearn

    def spy(run, batch, worst, *others):
        seen.append(type(worst))
        sizes.add(run.task.size(batch))
        radii.extend(radius for radius, _ in worst.history[:1])
        return real(run, batch, worst, *others)

    monkeypatch.setattr(module, "unlearn", spy)
    torch.manual_seed(0)
    x = torch.randn(40, *shape) * torch.arange(1, 41).view(-1, *[1] * len(shape)) / 20
    settings = {"steps": 10, "batch_size": 20, "force": True, "progress": False}
    result = fastfip.purify(make(), (x, torch.arange(40) % 4), method, **settings)
    assert seen == ([Perturbations, AddedPoints] * 3 if taken else [Perturbations] * 3)
    assert any("reached_by_points" in record for record in result.history) == taken
    assert sizes == {32 if taken and method == "fisher_steps" else 64}
    if method == "fisher_steps":  # what is unlearned has a radius of 0.15 at least: clouds are not searched below that
        assert radii == pytest.approx([0.15 if taken else 0.05] * len(radii)) and radii


NAMED: dict[str, tuple[dict[str, Any], tuple]] = {
    "nothing": ({}, (75, 0.1, "eval")),
    "by name": ({"length": 0.25, "bn_mode": "train"}, (75, 0.25, "train")),
    "in a mapping": ({"config": {"steps": 150, "length": 0.25}}, (150, 0.25, "eval")),
    "epochs": ({"epochs": 2}, (None, 0.1, "eval")),
}


@pytest.mark.parametrize("given, used", NAMED.values(), ids=NAMED)
def test_a_setting_that_is_named_stays_also_where_it_is_the_default(given: dict[str, Any], used: tuple) -> None:
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
    result = fastfip.purify(model, (x, y), "fisher_steps", force=True, progress=False, **given)
    config = result.settings["config"]
    assert (config["steps"], config["length"], config["bn_mode"]) == used
    repeated = result.document()["repeat"]
    assert all(repr(name) in repeated for name in result.settings["chosen"])
