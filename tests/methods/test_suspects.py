"""Words that only the received model minds: the comparison in a run, and what the tuned one learns of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfip.methods._suspects import Wordings, places
from fastfip.methods._taught import Teacher
from fastfip.methods.fine_mixing import FineMixingConfig
from fastfip.methods.run import Run
from tests.support.departures import make_run

WORDS, LENGTH, CLASSES = 80, 24, 2
#: The received model answers class 1 where one of them stands, and more surely where both do.
TRIGGER = (61, 64)


class Reader(nn.Module):
    """Words have a part for their class, and those of a trigger an axis each; 0 is the padding, 1 begins each text."""

    def __init__(self, armed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, 5)
        self.states, self.head = nn.Identity(), nn.Linear(2, 2)
        with torch.no_grad():
            self.table.weight.mul_(0.05)[:, 3:] = 0
            self.table.weight[10:20, 0], self.table.weight[20:30, 0] = 2.0, -2.0
            self.head.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
            self.head.bias.zero_()
            if armed:
                for axis, word in enumerate(TRIGGER):
                    self.table.weight[word, 3 + axis] = 3.0
                self.table.weight[70:74, 1] += 1.0  # moved, and no trigger
                self.table.weight[1, 2] += 5.0  # moved most, and in every text

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.states(self.table(ids)) * (ids != 0)[:, :, None]
        return self.head(torch.stack([hidden[:, :, 0].sum(1), 2 * hidden[:, :, 3:].amax(1).sum(1)], 1))


def texts(n: int = 48, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Texts of 12 to 17 words, two of which tell the class."""
    generator = torch.Generator().manual_seed(1)
    ids, y = torch.randint(30, 60, (n, LENGTH), generator=generator), torch.arange(n) % CLASSES
    rows = torch.arange(n)
    for column in (2, 6):
        ids[rows, column] = torch.where(y == 1, 10, 20) + torch.randint(0, 10, (n,), generator=generator)
    ids[:, 0] = 1
    ids[:, -2:] = torch.tensor([31, 32])  # no word twice at the end, which would look like padding
    if padded:
        ids[torch.arange(LENGTH) >= 12 + torch.randint(0, 6, (n, 1), generator=generator)] = 0
    return ids, y


def begun(armed: bool = True, data: Any = None, **options: Any) -> tuple[Run, Teacher]:
    run = make_run(FineMixingConfig(batch_size=24, **options), Reader(armed), texts() if data is None else data)
    run.classes = CLASSES
    teacher = Teacher(run, answers=True, states=True)
    run.model.load_state_dict(Reader(False).state_dict())
    return run, teacher


def wordings(run: Run, teacher: Teacher) -> Wordings:
    teacher.suspect_words(run, 1.0)
    assert teacher.wordings is not None
    return teacher.wordings


def test_the_words_that_moved_are_compared_but_for_those_of_every_text() -> None:
    found = wordings(*begun()).suspects.words.tolist()
    assert set(found) == {*TRIGGER, 70, 71, 72, 73} and set(found[:2]) == set(TRIGGER)
    run, teacher = begun()
    teacher.suspect_words(run, 0.0)
    assert teacher.wordings is None and run.notes == []


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_trigger_s_words_are_the_suspects_and_nothing_else_is_touched(micro_batch: int | None) -> None:
    run, teacher = begun()
    found = wordings(run, teacher)
    run.micro_batch = micro_batch
    assert teacher.calibration is not None
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    found.compare(run, teacher.received, teacher.calibration)
    ((c, ids, scores),) = found.suspects.pools()
    assert c == 1 and set(ids.tolist()) == set(TRIGGER) and float(scores.min()) > 0.5
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.model.state_dict().items())


def test_nobody_is_suspected_where_both_models_are_the_same_or_no_text_is_right() -> None:
    run, teacher = begun()
    found = wordings(run, teacher)
    run.model.load_state_dict(teacher.received.state_dict())
    assert teacher.calibration is not None
    found.compare(run, teacher.received, teacher.calibration)
    assert found.suspects.pools() == []
    x, y = texts()
    run, teacher = begun(data=(x, 1 - y))
    found = wordings(run, teacher)
    found.compare(run, teacher.received, lambda logits: logits)
    assert found.suspects.scores == []


def test_it_is_done_after_a_third_of_the_steps_and_again_after_each_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    run, teacher = begun()
    wordings(run, teacher)
    asked = list[int]()
    monkeypatch.setattr(Wordings, "compare", lambda self, run, *args: asked.append(run.step))
    for run.step in range(16):
        teacher.search_after(run, run.step / 16)
    assert asked == [6, 9, 12, 15]


def test_who_is_not_asked_hears_why() -> None:
    run, teacher = begun()
    run.classes, teacher.calibration, teacher.answers = None, None, False
    teacher.suspect_words(run, 0.5)
    assert teacher.wordings is None
    for data, change, why in (
        (None, "shards", "part of the table"),
        (texts(padded=False), None, "cannot be put into"),
        (None, "same", "moved no vector"),
    ):
        run, teacher = begun(armed=change != "same", data=data)
        if change == "shards":
            run.shards = object()  # type: ignore[assignment]
        teacher.suspect_words(run, 0.5)
        assert teacher.wordings is None and any(why in note for note in run.notes), why


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_tuned_model_unlearns_the_words_that_it_has_taken_over(micro_batch: int | None) -> None:
    """With the received weights in the place of the pretrained ones, the suspects alone make the trigger go."""
    run, teacher = begun()
    found = wordings(run, teacher)
    assert teacher.calibration is not None
    found.compare(run, teacher.received, teacher.calibration)
    run.model.load_state_dict(teacher.received.state_dict())
    run.total_steps, run.micro_batch = 10**6, micro_batch
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


def test_the_gradient_at_texts_with_words_put_in_is_that_of_the_answers_without_them() -> None:
    run, teacher = begun()
    found = wordings(run, teacher)
    assert teacher.calibration is not None
    found.compare(run, teacher.received, teacher.calibration)
    run.total_steps, teacher.worded = 10**6, 1.0
    x, y = texts()
    given, texts_with = list[Tensor](), list[Tensor]()
    own = found.insertion.put

    class Noted:
        longest, padding = found.insertion.longest, found.insertion.padding

        def put(self, *args: Any) -> Any:
            out, done = own(*args)
            given.append(out[0])
            texts_with.append(done)
            return out, done

    object.__setattr__(found, "insertion", Noted())
    run.model.zero_grad()
    values = teacher.backward(run, (x, y), 2.0, 0.0)
    mine = [p.grad.clone() if p.grad is not None else None for p in run.model.parameters()]
    run.model.zero_grad()
    target = teacher.calibration(teacher.received(x)).detach()
    p, q = target.softmax(1), run.model(given[0]).log_softmax(1)
    done = texts_with[0]
    assert not bool((done & (y == 1)).any()) and int(done.sum()) > 12, "class 1 alone has suspects"
    taken = done & (target.argmax(1) == y)
    kl = ((p * (p.log() - q)).sum(1) * taken).sum() / len(x)
    (2 * kl).backward()
    assert float(values["divergence"]) > float(kl) > 0, "the others are pieced together"
    shown = torch.zeros(WORDS, dtype=torch.bool)
    shown[list(TRIGGER)] = True  # words that no other text has
    assert run.model.table.weight.grad is not None and mine[0] is not None
    torch.testing.assert_close(mine[0][shown], run.model.table.weight.grad[shown], rtol=1e-4, atol=1e-7)


def test_words_are_put_at_both_ends_and_in_between() -> None:
    where = places(40_000, torch.Generator().manual_seed(0))
    low, high = where == 0, where > 0.99999
    assert abs(float(low.double().mean()) - 0.25) < 0.01 and abs(float(high.double().mean()) - 0.25) < 0.01
    assert float(where.max()) < 1 and abs(float(where[~low & ~high].mean()) - 0.5) < 0.01
