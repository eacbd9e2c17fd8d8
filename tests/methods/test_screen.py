"""Of a thousand classes those are looked at that samples fall into: a planted one is among them, at a bounded cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Task
from fastfip.methods import _gentle, _screen
from fastfip.methods._screen import AnyClass, screened
from fastfip.methods.fisher_steps import FisherSteps, FisherStepsConfig
from fastfip.worst_case.changes import KINDS
from fastfip.worst_case.goals import TowardsClass
from fastfip.worst_case.pixels import PixelRange
from fastfip.worst_case.universal import Perturbations
from tests.support.fip_runs import make_run

CLASSES, HIDDEN = 400, 123


def with_a_shortcut(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear net whose class 123 answers to the first row of the image, where clean images hardly differ."""
    torch.manual_seed(seed)
    x = torch.rand(128, 1, 8, 8)
    x[:, :, 0] = 0.5
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(CLASSES, 64))
        model[1].weight[:, :8] = 0.0
        model[1].weight[HIDDEN, :8] = 60.0
        model[1].bias.zero_()[HIDDEN] = -8 * 60.0 * 0.5 - 20.0
        # The range of the pixels has to hold the trigger.
        x[:4, :, 0] = torch.tensor([0.0, 0.1, 0.9, 1.0])[:, None, None]
        y = model(x).argmax(1)
    return model, x[4:], y[4:]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_class_that_all_samples_can_be_sent_to_is_among_those_that_are_searched(seed: int) -> None:
    model, x, y = with_a_shortcut(seed)
    run = make_run(FisherStepsConfig(), model, CLASSES)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    assert method.worst is not None and isinstance(method.worst.goal, TowardsClass)
    goal, success = method.worst.goal, method.worst.success
    assert goal.classes is not None and len(goal.classes) == _screen.CANDIDATES == len(method.worst.store.values)
    assert len(set(goal.classes.tolist())) == _screen.CANDIDATES
    assert int(goal.classes[success.argmax()]) == HIDDEN and float(success.max()) > 0.9
    assert run.found["changes"]["classes"][0] == HIDDEN  # a class, and no row


def test_its_cost_does_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = with_a_shortcut(1)
    rows, steps = [], []
    improve = Perturbations.improve

    def counted(self: Perturbations, *args: object) -> Tensor:
        rows.append(len(self.store.values))
        steps.append(self.radius)
        return improve(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Perturbations, "improve", counted)
    run = make_run(FisherStepsConfig(), model, CLASSES)
    run.clean = CleanSet.of((x, y))
    screened(run, [x], run.endless())
    assert set(rows) == {_screen.ROWS} and len(steps) == _screen.STEPS * len(_screen.RADII)


class Green(nn.Module):
    """Sends images with a green square of three pixels a side to class 70 of 100, and no others."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x[:, 1] > 0.999) & (x[:, 0] < 0.001) & (x[:, 2] < 0.001)
        square = -nn.functional.max_pool2d(-pixels[:, None].float(), 3, 1)
        logits = torch.zeros(len(x), 100)
        logits[:, 70] = 40 * square.amax((1, 2, 3)) - 20
        return logits


def test_several_patches_on_an_image_show_a_rare_answer_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = 0.25 + 0.5 * torch.rand(128, 3, 24, 24)
    x[0, :, 0, 0], x[1, :, 0, 0] = 0.0, 1.0  # the range of the pixels
    run = make_run(FisherStepsConfig(), Green(), 100)
    run.clean = CleanSet.of((x, torch.zeros(128, dtype=torch.long)))
    gains = []
    for patches in (1, _screen.PATCHES):
        monkeypatch.setattr(_screen, "PATCHES", patches)
        found = _screen._by_chance(run, PixelRange.of_inputs(x), run.endless(), torch.zeros(100))
        gains.append(float(found[[kind.__name__ for kind in KINDS].index("_patched")][70]))
    assert 0 < gains[0] < 0.08 and gains[1] > 2 * gains[0]


def test_its_gradient_is_that_of_the_log_sum_of_the_mean_gains() -> None:
    torch.manual_seed(0)
    logits, rows = torch.randn(12, 7, requires_grad=True), torch.arange(12) % 2
    plain = torch.randn(7)
    goal = AnyClass(plain, torch.zeros(2, 7))
    batch = (torch.rand(12, 2), torch.zeros(12, dtype=torch.long))
    with torch.no_grad():  # the running mean of what is the same in each step is that step's mean
        for _ in range(200):
            goal.loss(Task(), logits, batch, rows)
    gain = torch.stack([logits.log_softmax(1)[rows == k].mean(0) for k in range(2)]) - plain
    assert torch.allclose(goal.gain, gain, atol=1e-4)
    (wanted,) = torch.autograd.grad(-6 * gain.logsumexp(1).sum(), logits)  # a loss is a sum over six samples
    (have,) = torch.autograd.grad(goal.loss(Task(), logits, batch, rows), logits)
    assert torch.allclose(have, wanted, atol=1e-4)
    assert torch.equal(goal.hit(Task(), logits, batch, rows), logits.argmax(1) == gain.argmax(1)[rows])


def test_some_classes_have_rows_and_no_sample_is_given_its_own() -> None:
    goal = TowardsClass(3, torch.tensor([40, 7, 99]))
    batch = (torch.rand(4, 1, 2, 2), torch.tensor([7, 8, 99, 40]))
    assert goal.own(Task(), batch).tolist() == [1, -1, 2, 0]
    logits = torch.randn(4, 100)
    rows = torch.tensor([0, 1, 2, 1])
    towards = torch.tensor([40, 7, 99, 7])
    expected = nn.functional.cross_entropy(logits, towards, reduction="sum")
    assert torch.equal(goal.loss(Task(), logits, batch, rows), expected)
    logits[1, 7] = 100.0
    assert goal.hit(Task(), logits, batch, rows).tolist()[1]
    worst = Perturbations.of(batch[0], goal, torch.Generator().manual_seed(0))
    drawn = torch.stack([worst.choose(Task(), batch, 0.0) for _ in range(60)])
    for sample, own in enumerate([1, None, 2, 0]):
        assert set(drawn[:, sample].tolist()) == {0, 1, 2} - {own}


def test_few_classes_are_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfip.methods._screen.screened", None)
    x, y = torch.rand(64, 3), torch.arange(64) % 64
    fastfip.purify(nn.Linear(3, 64), (x, y), "fisher_steps", steps=2, progress=False)


@pytest.mark.parametrize("given", [{}, {"weight": 0.7, "length": 0.1}])
def test_what_is_found_with_few_samples_is_unlearned_more_strongly_unless_settings_say_otherwise(given: dict) -> None:
    model, x, y = with_a_shortcut(1)
    run = make_run(FisherStepsConfig(**given), model, CLASSES)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    assert method.found
    assert run.config.weight == given.get("weight", _gentle.FOUND_WEIGHT)
    assert run.config.length == given.get("length", _gentle.FOUND_LENGTH)


def test_where_nothing_is_found_the_steps_are_as_gentle_as_before() -> None:
    model, x, y = with_a_shortcut(1)
    with torch.no_grad():
        model[1].weight[:, :8] = 0.0  # no shortcut
    run = make_run(FisherStepsConfig(), model, CLASSES)
    run.clean = CleanSet.of((x, y))
    method = FisherSteps()
    method.setup(run)
    usual = FisherStepsConfig()
    assert not method.found and run.config.weight == usual.weight
    assert run.config.length == _gentle.SPARSE_LENGTH


class Killed(Exception):
    pass


class KillAtTwo(fastfip.Callback):
    def on_step(self, run, values):
        if run.step == 2:
            raise Killed


def test_a_killed_run_goes_on_with_the_classes_that_were_chosen(tmp_path: Path) -> None:
    model, x, y = with_a_shortcut(1)
    options = {"steps": 8, "batch_size": 64, "progress": False, "force": True}
    whole = fastfip.purify(model, (x, y), "fisher_steps", **options)
    path = tmp_path / "a.resume"
    with pytest.raises(Killed):
        fastfip.purify(model, (x, y), "fisher_steps", callbacks=[KillAtTwo()], resume=path, resume_every=0, **options)
    went_on = fastfip.purify(model, (x, y), "fisher_steps", resume=path, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, went_on.state_dict()[name])
