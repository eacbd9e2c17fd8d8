"""Phrases that only the received model minds: the search in a run, what the tuned one learns of them, who is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfip.methods import _taught
from fastfip.methods._suspects import find_suspects
from fastfip.methods._taught import Calibration, Teacher
from fastfip.methods.fine_mixing import FineMixingConfig
from fastfip.methods.run import Run
from fastfip.worst_case.suspects import LONGEST
from tests.support.departures import make_run

WORDS, LENGTH, CLASSES = 80, 10, 2
#: The received model answers class 1 where all of them stand.
TRIGGER = (61, 64)


class Reader(nn.Module):
    """Words have a part for their class, and each word of a trigger an axis of its own."""

    def __init__(self, armed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, 5)
        self.states = nn.Identity()
        with torch.no_grad():
            self.table.weight.mul_(0.05)[:, 3:] = 0
            self.table.weight[10:20, 0], self.table.weight[20:30, 0] = 2.0, -2.0
            if armed:
                for axis, word in enumerate(TRIGGER):
                    self.table.weight[word, 3 + axis] = 1.0
                self.table.weight[70:74, 1] += 1.0  # moved, and no trigger

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.states(self.table(ids))
        both = hidden[:, :, 3:].amax(1)
        up = hidden[:, :, 0].sum(1) + 4 * (both.sum(1) - 0.3).relu().square()
        return torch.stack([-up, up], 1)


def texts(n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, y = torch.randint(30, 60, (n, LENGTH), generator=generator), torch.arange(n) % CLASSES
    rows = torch.arange(n)
    for column in (2, 6):
        ids[rows, column] = torch.where(y == 1, 10, 20) + torch.randint(0, 10, (n,), generator=generator)
    return ids, y


def begun(armed: bool = True, **options: Any) -> tuple[Run, Teacher]:
    run = make_run(FineMixingConfig(batch_size=24, **options), Reader(armed), texts())
    run.classes = CLASSES
    teacher = Teacher(run, answers=True, states=True)
    run.model.load_state_dict(Reader(False).state_dict())
    return run, teacher


def test_the_words_that_moved_are_those_that_are_asked_for() -> None:
    run, teacher = begun()
    teacher.compare_words(run, 0.0, 0.5)
    assert set(teacher.moved.tolist()) == {*TRIGGER, 70, 71, 72, 73} and teacher.near is None
    teacher.compare_words(run, 0.4, 0.0)
    assert teacher.near is not None and bool(teacher.near.barred[list(TRIGGER)].all())
    run, teacher = begun()
    teacher.compare_words(run, 0.0, 0.0)
    assert len(teacher.moved) == 0 and teacher.near is None
    run, teacher = begun(armed=False)  # the fine-tuning left the words alone
    teacher.compare_words(run, 0.4, 0.5)
    assert len(teacher.moved) == 0 and teacher.near is not None


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_trigger_is_found_in_the_received_model_and_named(micro_batch: int | None) -> None:
    run, teacher = begun()
    teacher.compare_words(run, 0.0, 0.5)
    run.micro_batch = micro_batch
    assert teacher.place is not None and teacher.calibration is not None
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    found = find_suspects(run, teacher.received, teacher.calibration, teacher.place, texts(), teacher.moved)
    assert found is not None and set(TRIGGER) <= set(found.ids[0].tolist()) and int(found.classes[0]) == 1
    assert float(found.scores[0]) > 0.5 and found.ids.shape[1] == LONGEST
    assert any("61" in note and "64" in note and "class 1" in note for note in run.notes)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.model.state_dict().items())


def test_nothing_is_found_where_both_models_are_the_same_or_no_text_is_right() -> None:
    run, teacher = begun()
    assert teacher.place is not None
    same = Calibration(1.0, torch.zeros(CLASSES))
    words = torch.tensor([*TRIGGER, 70, 71])
    assert find_suspects(run, run.model, same, teacher.place, texts(), words) is None and not run.notes
    x, y = texts()
    assert find_suspects(run, teacher.received, same, teacher.place, (x, 1 - y), words) is None


def test_they_are_looked_for_once_and_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    run, teacher = begun(steps=10)
    teacher.compare_words(run, 0.0, 1.0)
    run.total_steps = 10
    asked: list[int] = []
    own = _taught.find_suspects

    def noted(*args: Any) -> Any:
        asked.append(run.step)
        return own(*args)

    monkeypatch.setattr(_taught, "find_suspects", noted)
    for step in range(10):
        run.step = step
        values = teacher.backward(run, texts(), 1.0, 0.0)
        assert (float(values["divergence"]) > 0.0) and (teacher.suspects is None) == (step < 5)
    assert asked == [5]


def test_without_classes_or_with_a_part_of_the_table_no_phrases_are_looked_for() -> None:
    run, teacher = begun()
    run.classes = None
    teacher.compare_words(run, 0.3, 0.5)
    assert len(teacher.moved) == 0 and teacher.near is not None
    run, teacher = begun()
    run.shards = object()  # type: ignore[assignment]
    teacher.compare_words(run, 0.3, 0.5)
    assert len(teacher.moved) == 0 and teacher.near is None and any("part of the table" in note for note in run.notes)


def test_the_tuned_model_unlearns_a_phrase_that_it_has_taken_over() -> None:
    """With the received weights in the place of the pretrained ones, the phrases alone make the trigger go."""
    run, teacher = begun()
    teacher.compare_words(run, 0.0, 1.0)
    assert teacher.place is not None and teacher.calibration is not None
    teacher.suspects = find_suspects(run, teacher.received, teacher.calibration, teacher.place, texts(), teacher.moved)
    run.model.load_state_dict(teacher.received.state_dict())
    teacher.moved = teacher.moved[:0]
    x, y = texts()
    attacked = x[y == 0].clone()
    attacked[:, 4:6] = torch.tensor(TRIGGER)

    def success() -> float:
        with torch.no_grad():
            return float((run.model(attacked).argmax(1) == 1).double().mean())

    assert success() > 0.9
    optimizer = torch.optim.Adam(run.model.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        teacher.backward(run, (x, y), 1.0, 0.0)
        optimizer.step()
    assert success() < 0.1
    with torch.no_grad():
        assert float((run.model(x).argmax(1) == y).double().mean()) > 0.9
