"""What the recovery leaves out: the samples that the unlearning hurt most, hidden triggered ones among them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.attacks.badnets import BadNets
from fastfip.cleanset import CleanSet
from fastfip.data import Task
from fastfip.demo import TARGET, digits, train_backdoored
from fastfip.methods._objective import WorstCase
from fastfip.methods.base import Run
from fastfip.methods.fip import FIP, FIPConfig


def sieved(x: Tensor, y: Tensor, sieve: float) -> tuple[Run, Tensor]:
    """Run the sieve alone on a net that was moved; also the rise of each sample's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5))
    config = FIPConfig(sieve=sieve)
    run = Run(model.eval(), Task(), CleanSet.of([(x[:7], y[:7]), (x[7:], y[7:])]), config, torch.device("cpu"),
              torch.Generator().manual_seed(0), classes=3, total_steps=10)  # fmt: skip
    objective = WorstCase(run, FIP().make_space(run), config)
    objective.teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
        now, before = (F.cross_entropy(net(x), y, reduction="none") for net in (model, objective.teacher))
    model.train()
    objective._sieve()
    assert all(module.training for module in model.modules())
    return run, now - before


@pytest.mark.parametrize("sieve", [0.1, 0.25, 0.6])
def test_those_whose_loss_rose_most_are_left_out(sieve: float) -> None:
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3
    run, rise = sieved(x, y, sieve)
    leave = int(20 * sieve)
    assert run.clean.n == 20 - leave and f"{leave} of 20" in run.notes[0]
    kept = torch.cat([batch[0] for batch in run.clean.batches()])
    expected = rise.argsort()[: 20 - leave].sort().values
    assert torch.equal(kept, x[expected])


@pytest.mark.parametrize(("n", "sieve"), [(20, 0.0), (10, 0.05)])
def test_few_samples_and_a_share_of_zero_leave_all(n: int, sieve: float) -> None:
    x, y = torch.randn(n, 4), torch.arange(n) % 3
    run, _ = sieved(x, y, sieve)
    assert run.clean.n == n and not run.notes


def test_a_loss_that_is_no_number_counts_as_the_greatest_rise() -> None:
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    x[11] = torch.inf
    run, _ = sieved(x, y, 0.05)
    assert torch.isfinite(torch.cat([batch[0] for batch in run.clean.batches()])).all()


def test_triggered_samples_in_the_clean_set_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _, _ = digits(0)
    attack = BadNets(size=2)
    model = train_backdoored(x, y, attack, 0)
    x, y = x[:400].clone(), y[:400].clone()
    hidden = torch.nonzero(y != TARGET).flatten()[:4]
    x[hidden], y[hidden] = attack.trigger(x[hidden]), TARGET
    marked = {tuple(row.tolist()) for row in x[hidden].flatten(1)}
    left: list[int] = []
    sieve = WorstCase._sieve

    def watched(self: WorstCase) -> None:
        def count() -> int:
            rows = torch.cat([batch[0] for batch in self.run.clean.batches()]).flatten(1)
            return sum(tuple(row.tolist()) in marked for row in rows)

        left.append(count())
        sieve(self)
        left.append(count())

    monkeypatch.setattr(WorstCase, "_sieve", watched)
    result = fastfip.purify(model, (x, y), progress=False, sieve=0.05)
    assert left[0] >= 3 and left[1] <= 1, left
    assert any("samples" in note for note in result.notes)
