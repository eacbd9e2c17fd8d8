"""The received model's answers at other texts and moved clouds: their divergence, its gradient, who takes it."""

from __future__ import annotations

import copy
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.methods import _held, fisher_steps
from fastfip.methods._held import hold_answers
from fastfip.methods._received import kept_received
from fastfip.methods.run import Run
from fastfip.testing.nets import PointNet
from fastfip.worst_case.places import TokenPlace
from tests.support.departures import make_run

WORDS, LENGTH, CLASSES = 50, 10, 3
Net = TypeVar("Net", bound=nn.Module)


class Reader(nn.Module):
    """Answers by the mean of the vectors of the words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        shown = (ids != 0).to(self.table.weight.dtype)[:, :, None]
        return self.head((self.table(ids) * shown).sum(1) / shown.sum(1))


def texts(n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, WORDS, (n, LENGTH), generator=generator)
    ids[::3, 6:] = 0
    return ids, torch.arange(n) % CLASSES


def moved(model: Net) -> Net:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p.dtype), alpha=0.5)
    return other


def place_of(seed: int) -> TokenPlace:
    return TokenPlace("table", torch.zeros(6), 1, 0, 0, torch.Generator().manual_seed(seed))


def run_on(model: nn.Module, batch: tuple[Tensor, Tensor], micro_batch: int | None = None) -> Run:
    run = make_run(fisher_steps.FisherStepsConfig(), model, batch)
    run.micro_batch = micro_batch
    return run


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_the_gradient_is_that_of_the_divergence_at_the_exchanged_words(
    micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, received = texts(), Reader().double()
    tuned = moved(received)
    run, drawn = run_on(tuned, batch, micro_batch), []
    once = _held._once
    monkeypatch.setattr(_held, "_once", lambda new: once(lambda ids: drawn.append(new(ids)) or drawn[-1]))
    value = hold_answers(run, batch, place_of(3), received, 2.0)
    exchanged = torch.cat([found for found, _ in drawn])
    assert exchanged.shape == batch[0].shape and float((exchanged != batch[0]).float().mean()) > 0.2
    again = copy.deepcopy(tuned)
    again.zero_grad()
    # Which words are padding is seen by the model from the ids that it is given, the vectors are those of others.
    shown = (batch[0] != 0).double()[:, :, None]

    def answers(model: Reader) -> Tensor:
        return model.head((model.table(exchanged) * shown).sum(1) / shown.sum(1)).log_softmax(1)

    p, q = answers(received).detach(), answers(again)
    expected = (p.exp() * (p - q)).sum(1).mean()
    (2 * expected).backward()
    expected = expected.detach()
    assert float(value) == pytest.approx(float(expected), rel=1e-5) and float(expected) > 0.01
    for p_, q_ in zip(tuned.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p_.grad, q_.grad, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in received.parameters())


def test_the_received_model_itself_diverges_from_nothing() -> None:
    batch, model = texts(), Reader()
    run = run_on(model, batch)
    assert float(hold_answers(run, batch, place_of(3), kept_received(run), 2.0)) == pytest.approx(0, abs=1e-6)
    assert all(float(p.grad.abs().max()) < 1e-6 for p in model.parameters())


def purified(data: tuple[Tensor, Tensor] | None = None, **options: object) -> fastfip.PurifyResult:
    return fastfip.purify(
        Reader().eval(), data or texts(), "fisher_steps", steps=6, batch_size=8, force=True, progress=False, **options
    )


def test_answers_are_held_to_the_end_where_texts_have_classes() -> None:
    held, free = purified(hold=4.0), purified()
    assert all("divergence" in record for record in held.history), "beyond the steps that unlearn"
    assert not any("divergence" in record for record in free.history)
    assert [held.settings["config"][name] for name in ("changes", "unlearn", "back")] == [0.95, 0.95, 0.0]
    assert purified(hold=4.0, changes=0.5).settings["config"]["changes"] == 0.5, "what is given stays"
    ids, y = texts()
    numbers = purified(
        (ids, y[:, None].float()), hold=4.0, loss=lambda out, batch: (out[:, :1] - batch[1]).square().mean(1)
    )
    assert not any("divergence" in record for record in numbers.history)


def test_a_heavier_weight_keeps_the_answers_nearer() -> None:
    ids = texts(200)[0]
    received = Reader().eval()

    def away(hold: float) -> float:
        model = purified(hold=hold, back=0.0, sieve=0.0).model
        with torch.no_grad():
            p, q = (net(ids).log_softmax(1) for net in (received, model))
        return float((p.exp() * (p - q)).sum(1).mean())

    assert away(100.0) < 0.7 * away(0.0)


def clouds(**options: object) -> fastfip.PurifyResult:
    torch.manual_seed(0)
    x = torch.randn(40, 20, 3) * torch.arange(1, 41)[:, None, None] / 20
    settings = {"steps": 6, "batch_size": 20, "force": True, "progress": False, "method": "fisher_steps", **options}
    return fastfip.purify(PointNet(4, (8, 16), 8), (x, torch.arange(40) % 4), **settings)


def test_answers_are_held_at_moved_point_clouds_unless_somebody_says_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float]] = []
    hold = fisher_steps.hold_answers

    def noted(run: object, batch: tuple[Tensor, Tensor], place: object, *rest: object) -> object:
        assert place is None
        seen.append((batch[0], rest[1]))
        return hold(run, batch, place, *rest)

    monkeypatch.setattr(fisher_steps, "hold_answers", noted)
    result = clouds()
    assert all(record["divergence"] > 0 for record in result.history) and result.settings["config"]["hold"] == 1.0
    assert len(seen) == 6 and {weight for _, weight in seen} == {1.0}
    given = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41)[:, None, None] / 20
    assert not any(bool((cloud == other).all()) for x, _ in seen for cloud in x for other in given), "they are moved"
    free = clouds(hold=0.0)
    assert len(seen) == 6 and not any("divergence" in record for record in free.history)


def test_the_gradient_at_samples_as_they_are_is_that_of_the_divergence() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(12, 20, 3, dtype=torch.float64), torch.arange(12) % 4
    received = PointNet(4, (8, 16), 8).double().eval()
    tuned = moved(received)
    run = run_on(tuned, (x, y), 5)
    value = hold_answers(run, (x, y), None, received, 2.0)
    again = copy.deepcopy(tuned).eval()
    again.zero_grad()
    p, q = received(x).log_softmax(1).detach(), again(x).log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean()
    (2 * expected).backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5) and float(expected.detach()) > 1e-4
    for p_, q_ in zip(tuned.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p_.grad, q_.grad, rtol=1e-3, atol=1e-7)
