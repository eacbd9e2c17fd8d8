"""Worst-case FIP and its spectral form: each part is its definition, and a planted backdoor goes."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.methods.base import Run
from fastfip.methods.wfip import WFIP, FastWFIP, FastWFIPConfig, WFIPConfig
from fastfip.methods.wfip.clean import CleanTerms
from fastfip.methods.wfip.steps import StateMean
from fastfip.worst_case.universal import Perturbations
from tests.support.fip_runs import data, make_run, net
from tests.support.small_nets import OneHot


def test_trust_bounds_every_step_by_the_fisher() -> None:
    model = net(torch.float32)
    x, y = data(40, torch.float32)
    config = FastWFIPConfig(steps=1, lr=5.0, trust=0.01, warmup=0.0, unlearn=0.0, grad_clip=None, schedule="constant")
    run = make_run(config, model)
    run.clean = CleanSet.of((x, y))
    method = FastWFIP()
    method.setup(run)
    diagonal = [d.clone() for d in method.bound.diagonal]
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


@pytest.mark.parametrize("method", ["wfip", "fast_wfip"])
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
    run, method = make_run(WFIPConfig(), net()), WFIP()
    run.step = 0
    assert not method.is_candidate(run)
    run.step = run.total_steps
    assert method.is_candidate(run)


def test_half_of_the_recovery_settles_before_a_state_can_be_kept() -> None:
    run, method = make_run(WFIPConfig(unlearn=0.4), net()), WFIP()
    run.total_steps = 100
    for run.step, kept in ((69, False), (70, True)):  # the recovery is steps 40 to 100
        assert method.is_candidate(run) is kept


def test_the_unlearning_gives_way_where_the_kl_passes_its_budget() -> None:
    run, method = make_run(WFIPConfig(budget=0.5), net()), WFIP()
    for kl, room in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0), (2.0, 0.0)):
        assert method.room(run, {"kl": kl}) == pytest.approx(room)
    assert method.room(run, {}) == 1.0


def test_perturbations_that_work_better_are_drawn_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    sharpness: list[float] = []
    draw = Perturbations.draw

    def watched(self: Perturbations, y: Tensor, focus: float) -> Tensor:
        sharpness.append(focus)
        return draw(self, y, focus)

    monkeypatch.setattr(Perturbations, "draw", watched)
    fastfip.purify(net(torch.float32), data(40, torch.float32), "wfip", steps=5, unlearn=1.0, progress=False)
    assert sharpness[-5:] == [2.0] * 5 and set(sharpness[:-5]) == {0.0}  # the search draws evenly


def test_fast_wfip_ends_with_the_mean_of_the_last_fifth() -> None:
    states: list[list[Tensor]] = []

    class Watched(FastWFIP):
        def after_step(self, run: Run) -> None:
            if run.step == run.total_steps - 1:
                self.mean.tensors = [t.clone() for t in self.space.tensors]  # the mean is put into these
            super().after_step(run)
            states.append([t.detach().clone() for t in self.space.tensors])
            if run.step == run.total_steps - 1:
                for t, mean in zip(zip(*states[-4:]), self.mean.tensors):
                    torch.testing.assert_close(torch.stack(t).mean(0), mean, rtol=1e-5, atol=1e-6)
                states.append([])

    fastfip.purify(net(torch.float32), data(40, torch.float32), Watched, steps=20, trust=None, progress=False)
    assert states[-1] == [] and (WFIP.average, WFIP.turns, WFIP.improve_every) == (0.0, False, 1)


def test_inputs_that_cannot_be_perturbed_leave_the_clean_terms() -> None:
    model = OneHot(10, 3)
    tokens, y = torch.randint(0, 10, (24, 3)), torch.arange(24) % 3
    result = fastfip.purify(model, (tokens, y), "fast_wfip", steps=4, progress=False)
    assert any("no worst-case inputs" in note for note in result.notes)


def clean_gradient(step: int, turns: bool) -> tuple[list[Tensor], dict[str, object]]:
    """The gradient of the clean terms at a recovery step, without mixtures' chance: every mixture is the batch."""
    torch.manual_seed(4)
    model = net(torch.float64)
    run = make_run(WFIPConfig(unlearn=0.0, steps=10, kl=0.25), model)
    received = copy.deepcopy(model).eval()
    terms = CleanTerms(run, turns, lambda: contextlib.nullcontext(received), mixable=False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    run.step = step
    for p in model.parameters():
        p.grad = None
    values = terms.backward(data(12, torch.float64))
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
    run = make_run(WFIPConfig(steps=10), net())
    tensors = list(run.model.parameters())
    mean = StateMean(tensors, 0.3)
    for run.step in range(10):
        for t in tensors:
            t.data.fill_(float(run.step))
        mean.add(run)
        if run.step < 9:
            assert all((t == run.step).all() for t in tensors)
    for t in tensors:
        torch.testing.assert_close(t.data, torch.full_like(t, 8.0))


@pytest.mark.parametrize("every", [1, 3])
def test_perturbations_are_improved_in_every_so_many_steps(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    improved = []
    gradient = Perturbations.gradient

    def counted(self: Perturbations, *arguments: object, retain_graph: bool = False) -> Tensor:
        improved.extend([1] * retain_graph)
        return gradient(self, *arguments, retain_graph=retain_graph)

    monkeypatch.setattr(Perturbations, "gradient", counted)
    monkeypatch.setattr(FastWFIP, "improve_every", every)
    fastfip.purify(net(torch.float32), data(40, torch.float32), "fast_wfip", steps=6, unlearn=1.0)
    assert len(improved) == 6 / every
