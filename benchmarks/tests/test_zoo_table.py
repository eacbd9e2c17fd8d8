"""The table of the large zoo is that of its rows, nothing in it is wrong, and a check finds what is not right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.zoo import measure, ways
from benchmarks.zoo.checks import CHECKS, judged
from benchmarks.zoo.nets import CLASSES, NETS, SAMPLES
from fastfip.errors import ModelError


def test_the_document_is_made_of_the_rows_and_none_is_wrong():
    rows = measure.RESULTS.read()
    text = measure.DOCUMENT.read_text(encoding="utf-8")
    assert text == harness.spliced(text, "zoo", measure.table(rows))
    assert {(row["net"], row["function"]) for row in rows} == {(net.name, f) for net in NETS for f in CHECKS}
    assert not [row for row in rows if row["verdict"] == "wrong"]


def test_the_table_of_states_is_made_of_its_rows_and_no_cell_is_wrong():
    rows = ways.RESULTS.read()
    text = measure.DOCUMENT.read_text(encoding="utf-8")
    assert text == harness.spliced(text, "ways", ways.table(rows))
    cells = [(row["net"], row["way"], row["method"]) for row in rows]
    nets = [net for net in ways.UNCHANGED if any(row["net"] == net for row in rows)]
    assert cells == [(net, way, method) for net in nets for way in ways.WAYS for method in ways.METHODS]
    assert not [row for row in rows if row["verdict"] == "wrong"]


def test_a_result_in_another_state_is_wrong(monkeypatch):
    model, batch = small()
    assert judged(ways.check(ways.WAYS["bf16"], "fine_tune"), model, batch).verdict == "right"
    lost = ways.Way("lost", ways.WAYS["bf16"].put, lambda *_: None)
    assert "no longer in that state" in judged(ways.check(lost, "fine_tune"), model, batch).detail
    real = ways.fastfip.purify

    def trains(*args, **options):
        result = real(*args, **options)
        result.model.train()
        return result

    monkeypatch.setattr(ways.fastfip, "purify", trains)
    assert "other training flags" in judged(ways.check(ways.WAYS["bf16"], "fine_tune"), model, batch).detail


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    return model.eval(), (torch.rand(SAMPLES, 3, 8, 8), torch.arange(SAMPLES) % CLASSES)


def test_every_check_takes_a_sound_model():
    model, batch = small()
    for name, check in CHECKS.items():
        found = judged(check, model, batch)
        assert found.verdict == "right", (name, found)


def test_what_changes_the_model_raises_or_says_too_much_is_wrong():
    model, batch = small()

    def moves(model: nn.Module, _: object) -> str:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return "done"

    def fails(*_: object) -> str:
        raise RuntimeError("shape '[1]' is invalid")

    def says(text: str) -> str:
        raise ModelError(text)

    assert judged(moves, model, batch).verdict == "wrong"
    assert judged(fails, model, batch).verdict == "wrong"
    assert judged(lambda *_: says("two\nlines: x"), model, batch).verdict == "wrong"
    assert judged(lambda *_: says("the model is sharded: unshard it"), model, batch).verdict == "refused"


def test_a_wrong_fisher_is_found(monkeypatch):
    model, batch = small()
    right = measure.judged(CHECKS["fisher_diagonal"], model, batch)
    true = torch.Tensor.square
    assert right.verdict == "right"
    monkeypatch.setattr(torch.Tensor, "square", lambda t: true(t) * 1.001)  # in the loop that it is compared with
    assert judged(CHECKS["fisher_diagonal"], model, batch).verdict == "wrong"
