"""A first, short tuning after which fine-mixing begins anew: its steps, its weights, and what is kept of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.errors import ModelError
from fastfip.methods._scout import Scout
from fastfip.methods._suspects import Wordings
from fastfip.methods.config import learning_rate
from fastfip.methods.fine_mixing import FineMixingConfig
from fastfip.methods.run import Run
from tests.methods.test_suspects import TRIGGER, Reader, texts
from tests.support.departures import images, make_run


def begun(share: float, steps: int, **options: Any) -> tuple[Run, Scout]:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    run = make_run(FineMixingConfig(**options), net, (torch.randn(8, 4), torch.arange(8) % 2))
    run.total_steps = steps
    return run, Scout(run, share)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_both_parts_have_a_schedule_of_their_own(schedule: Any) -> None:
    run, scout = begun(0.25, 22, schedule=schedule, lr=0.5)
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.5} for p in run.model.parameters()])
    sizes = []
    for run.step in range(22):
        scout.set_size(run, optimizer)
        (size,) = {group["lr"] for group in optimizer.param_groups}
        sizes.append(size)
    warmup = run.config.warmup
    parts = [0.5 * learning_rate(k, n, schedule, warmup) for n in (5, 17) for k in range(n)]
    assert sizes == pytest.approx(parts) and sizes[5] < sizes[6], "it rises again"


def test_weights_statistics_and_the_optimiser_go_back_and_what_is_frozen_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    run = make_run(FineMixingConfig(), net, (torch.randn(8, 4), torch.arange(8) % 2))
    run.frozen = frozenset({id(net[2].bias)})  # type: ignore[assignment]
    scout, before = Scout(run, 0.25), copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(run.model.parameters(), 0.1)
    run.model.train()
    run.model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    now = copy.deepcopy(run.model.state_dict())
    assert optimizer.state and not any(torch.equal(now[name], before[name]) for name in now)
    scout.begin_anew(run, optimizer)
    assert not optimizer.state
    for name, t in run.model.state_dict().items():
        assert torch.equal(t, now[name] if name == "2.bias" else before[name]), name
    scout.end()
    assert scout.over and scout.weights == [], "no memory is held"


def noted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, list[int]]], list[Tensor]]:
    """Return lists that get, at each search, its step and those suspected before it, and the tuned table then."""
    asked, tables = list[tuple[int, list[int]]](), list[Tensor]()
    own = Wordings.compare

    def compare(self: Wordings, run: Run, *args: Any) -> None:
        asked.append((run.step, [word for _, ids, _ in self.suspects.pools() for word in ids.tolist()]))
        tables.append(run.model.table.weight.detach().clone())
        own(self, run, *args)

    monkeypatch.setattr(Wordings, "compare", compare)
    return asked, tables


OPTIONS: dict[str, Any] = {"steps": 24, "lr": 0.01, "batch_size": 24, "force": True, "progress": False}


def test_it_begins_anew_from_the_same_weights_and_knows_the_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tables = noted(monkeypatch)
    seen = list[Tensor]()

    def at_step(self: Any, run: Run, values: Any) -> None:
        seen.append(run.model.table.weight.detach().clone())

    watch = type("Watch", (fastfip.Callback,), {"on_step": at_step})()
    before = Reader(False)
    fastfip.purify(Reader(True), texts(), "fine_mixing", pretrained=before, callbacks=[watch], **OPTIONS)
    assert asked[0] == (6, []) and [step for step, _ in asked] == [6, 12, 16, 20, 23]
    assert set(TRIGGER) <= set(asked[1][1]), "from its first step on the second part knows them"
    assert torch.equal(tables[0], seen[5]) and not torch.equal(tables[0], before.table.weight), "searched, then undone"
    # The first step of either part, of Adam and at the same size, moves what has a gradient by at most that size.
    ramp = [0.01 * learning_rate(0, n, "cosine", 0.1) for n in (6, 18)]
    for k, size in zip((0, 6), ramp, strict=True):
        assert 0 < float((seen[k] - before.table.weight.detach()).abs().max()) < 1.01 * size
    assert float((seen[6] - seen[5]).abs().max()) > 2 * ramp[1]


@pytest.mark.parametrize("options", [{"scout": 0.0}, {"suspects": 0.0}, {"hold": 0.0}, {"steps": 3}])
def test_it_begins_once_where_nothing_is_looked_for_or_there_is_no_time(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scout, "begin_anew", lambda *args: pytest.fail("it began anew"))
    settings = {**OPTIONS, **options}
    result = fastfip.purify(Reader(True), texts(), "fine_mixing", pretrained=Reader(False), **settings)
    assert result.history[-1]["step"] == settings["steps"]


def test_images_have_no_scout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfip.methods.fine_mixing.Scout", lambda *args: pytest.fail("there is nothing to find out"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    old = {name: t + 0.1 for name, t in net.state_dict().items()}
    fastfip.purify(net, images(24, 0), "fine_mixing", pretrained=old, **OPTIONS)


def test_no_epoch_of_the_first_part_is_kept() -> None:
    result = fastfip.purify(
        Reader(True), texts(), "fine_mixing", pretrained=Reader(False), select="best", holdout=0.5, **OPTIONS
    )
    kept = [record["candidate"] for record in result.history]
    assert kept == [record["step"] > 6 for record in result.history] and not all(kept) and any(kept)


def test_weights_that_nothing_has_tuned_since_it_began_anew_are_not_kept() -> None:
    def not_finite(self: Any, run: Run, values: Any) -> None:
        if run.step == 6:  # the next step is the first one after that; scores stay finite
            run.model.head.register_forward_hook(lambda *args: args[2] + torch.nan if torch.is_grad_enabled() else None)

    watch = type("Watch", (fastfip.Callback,), {"on_step": not_finite})()
    with pytest.raises(ModelError, match="not finite in 10 steps"):
        fastfip.purify(
            Reader(True), texts(), "fine_mixing", pretrained=Reader(False), callbacks=[watch], select="best", **OPTIONS
        )


def test_a_run_that_ends_before_it_began_anew_says_so() -> None:
    def stop(run: Run, record: Any) -> bool:
        return True

    result = fastfip.purify(Reader(True), texts(), "fine_mixing", pretrained=Reader(False), callbacks=[stop], **OPTIONS)
    assert any("ended before tuning began anew" in note for note in result.notes)
    whole = fastfip.purify(Reader(True), texts(), "fine_mixing", pretrained=Reader(False), **OPTIONS)
    assert not any("began anew" in note for note in whole.notes)
