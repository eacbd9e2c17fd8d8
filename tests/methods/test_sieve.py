"""What the recovery leaves out: samples that the unlearning hurt most, hidden triggered ones among them."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.attacks.badnets import BadNets
from fastfip.cli.demonstration import TARGET, digits, train_backdoored
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods.base import Run
from fastfip.methods.wfip import WFIP, FastWFIP, WFIPConfig
from fastfip.methods.wfip.sieve import Sieve


def sieved(x: Tensor, y: Tensor, share: float, batch: int = 8, step: int = 3) -> tuple[Sieve, Tensor]:
    """Run the sieve alone on a net that was moved; also the rise of each sample's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5))
    run = Run(model.eval(), Task(), CleanSet.of([(x[:7], y[:7]), (x[7:], y[7:])]), WFIPConfig(batch_size=batch),
              torch.device("cpu"), torch.Generator().manual_seed(0), classes=3, step=step, total_steps=10)  # fmt: skip
    received = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
        now, before = (F.cross_entropy(net(x), y, reduction="none") for net in (model, received))
    model.train()
    sieve = Sieve(run)
    sieve.leave_out(lambda: contextlib.nullcontext(received), share)
    assert all(module.training for module in model.modules())
    return sieve, now - before


def inputs(run: Run) -> Tensor:
    return torch.cat([batch[0] for batch in run.clean.batches()])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_those_whose_loss_rose_most_are_left_out(share: float) -> None:
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3
    sieve, rise = sieved(x, y, share)
    run = sieve.run
    leave = int(20 * share)
    assert run.clean.n == 20 - leave and run.left_out == leave
    assert torch.equal(inputs(run), x[rise.argsort()[: 20 - leave].sort().values])
    sieve.say()
    assert f"{leave} of 20 clean samples were left out" in run.notes[0]


def test_what_the_net_answers_as_labelled_comes_back() -> None:
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3
    sieve, rise = sieved(x, y, 0.5)
    gone = rise.argsort(descending=True)[:10]
    with torch.no_grad():
        for p in sieve.run.model.parameters():  # the net goes on
            p.copy_(torch.randn(p.shape))
        right = sieve.run.model.eval()(x).argmax(1) == y
    sieve.run.model.train()
    assert 0 < int(right[gone].sum()) < 10 and all(module.training for module in sieve.run.model.modules())
    sieve.take_back()
    stay = sorted(k for k in gone.tolist() if not right[k])
    assert sorted(sieve.gone.tolist()) == stay and sieve.run.left_out == len(stay)
    assert torch.equal(inputs(sieve.run), x[[k for k in range(20) if k not in stay]])
    sieve.run.classes = None  # no class to be right about: they stay out
    before = sieve.run.clean
    sieve.take_back()
    assert sieve.run.clean is before


@pytest.mark.parametrize(("n", "share"), [(20, 0.0), (10, 0.05)])
def test_few_samples_and_a_share_of_zero_leave_all(n: int, share: float) -> None:
    sieve, _ = sieved(torch.randn(n, 4), torch.arange(n) % 3, share)
    sieve.take_back()
    sieve.say()
    assert sieve.run.clean.n == n and not sieve.run.notes


def test_no_class_loses_its_last_sample() -> None:
    x, y = torch.randn(20, 4), torch.zeros(20, dtype=torch.int64)
    y[3], y[17], y[5] = 1, 2, 2
    run = sieved(x, y, 0.5)[0].run
    assert run.clean.n == 10 and run.clean.labels is not None
    assert sorted(set(run.clean.labels.tolist())) == [0, 1, 2]
    assert sieved(x[:10], torch.tensor([0, 1, 2] + [0] * 7), 0.5)[0].run.clean.n == 5
    assert sieved(torch.randn(3, 4), torch.arange(3), 0.5)[0].run.clean.n == 3


def test_a_loss_that_is_no_number_counts_as_the_greatest_rise() -> None:
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    x[11] = 3e38  # finite, but no loss is
    run = sieved(x, y, 0.05)[0].run
    assert run.clean.n == 19 and inputs(run).abs().max() < 1e38


def test_of_a_large_set_as_many_are_ranked_as_the_steps_can_draw() -> None:
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    sieve, rise = sieved(x, y, 0.25, batch=2, step=4)  # five steps of two samples are left
    run = sieve.run
    assert run.clean.n == 8 and sieve.whole is not None and sieve.whole.n == 10
    kept = [int((x == row).all(1).nonzero()) for row in inputs(run)]
    assert len(set(kept)) == 8 and rise[kept].max() < rise.max()


class Watched(WFIP):
    """Notes which samples each step sees."""

    seen: list[set[tuple[float, ...]]]

    def setup(self, run: Run) -> None:
        super().setup(run)
        Watched.seen = []

    def backward(self, run: Run, batch: tuple[Tensor, Tensor]) -> dict[str, float | Tensor]:
        Watched.seen.append({tuple(row.tolist()) for row in batch[0].flatten(1)})
        return super().backward(run, batch)


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return model, (torch.randn(40, 1, 6, 6), torch.arange(40) % 3)


def test_no_step_of_the_recovery_sees_what_was_left_out() -> None:
    model, data = small()
    result = fastfip.purify(model, data, Watched, steps=10, sieve=0.2, holdout=0.1, progress=False)  # unlearn: 0.4
    unlearnt, first, second = (set().union(*Watched.seen[a:b]) for a, b in ((0, 4), (4, 7), (7, 10)))
    assert len(unlearnt) == 36 and len(first) == 29 and first < unlearnt and second <= unlearnt
    assert result.settings["clean_samples"] == 40 and 0 <= result.settings["left_out_samples"] <= 7


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, ["leave_out", "take_back"]), ({"kl": 0.0}, ["leave_out", "take_back"]), ({"unlearn": 0.0}, []),
    ],
)  # fmt: skip
def test_it_is_for_runs_that_unlearn_and_then_recover(
    settings: dict[str, Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name in ("leave_out", "take_back"):
        monkeypatch.setattr(Sieve, name, lambda *args, name=name: seen.append(name))
    model, data = small()
    fastfip.purify(model, data, "wfip", **{"sieve": 0.2, "steps": 10, "holdout": 0.1, "progress": False, **settings})
    assert seen == calls


def test_triggered_samples_in_the_clean_set_are_found() -> None:
    x, y, _, _ = digits(0)
    attack = BadNets(size=2)
    model = train_backdoored(x, y, attack, 0)
    x, y = x[:400].clone(), y[:400].clone()
    hidden = torch.nonzero(y != TARGET).flatten()[:4]
    x[hidden], y[hidden] = attack.trigger(x[hidden]), TARGET
    marked = {tuple(row.tolist()) for row in x[hidden].flatten(1)}

    class Counted(FastWFIP):
        def after_step(self, run: Run) -> None:
            before = run.clean
            super().after_step(run)
            if run.clean is not before:
                for clean in (before, run.clean):
                    rows = torch.cat([batch[0] for batch in clean.batches()]).flatten(1)
                    left.append(sum(tuple(row.tolist()) in marked for row in rows))

    left: list[int] = []
    fastfip.purify(model, (x, y), Counted, progress=False, sieve=0.05)
    assert left[0] >= 3 and left[1] <= 1 and left[-1] <= 1, left  # the last two: when samples came back
