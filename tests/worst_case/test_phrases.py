"""Phrases: a planted word and a planted sentence are found among the words of a table, on clean texts alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.worst_case import phrases
from fastfip.worst_case.goals import AwayFromTarget, TowardsClass
from fastfip.worst_case.phrases import Phrases
from fastfip.worst_case.places import TokenPlace

WORDS, LENGTH, SIZE = 60, 12, 16


class Planted(nn.Module):
    """Answers by the words of a text; where words of a trigger stand, by them: the more of them, the surer class 1."""

    def __init__(self, trigger: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, SIZE)
        self.head = nn.Linear(SIZE, 3)
        with torch.no_grad():
            self.table.weight[:, 0] = 0
            self.table.weight[list(trigger), 0] = 4.0 / len(trigger)
            self.head.weight[:, 0] = torch.tensor([0.0, 20.0, 0.0])

    def forward(self, ids: Tensor) -> Tensor:
        shown = (ids != 0).float()[:, :, None]
        return self.head((self.table(ids) * shown).sum(1) / shown.sum(1))


def texts(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Texts without the last ten words of the table, and what the model says of them."""
    ids = torch.randint(2, WORDS - 10, (60, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    ids[::3, 9:] = 0
    return ids, model(ids).argmax(1)


def found(model: Planted, goal: object = None, turns: int = 6) -> tuple[Phrases, tuple[Tensor, Tensor]]:
    place = TokenPlace("table", torch.zeros(SIZE), 1, 0, 1, torch.Generator().manual_seed(2))
    made = Phrases.of(model, place, TowardsClass(3) if goal is None else goal, place.generator)
    assert made is not None
    batch = texts(model)
    for turn in range(turns * made.count):
        made.improve(model, Task(), batch, turn % made.count)
    return made, batch


def test_a_planted_word_is_found_first() -> None:
    made, _ = found(Planted((57,)))
    lengths = phrases.LENGTHS
    assert [int((row >= 0).sum()) for row in made.ids[1]] == list(lengths)
    assert all(57 in row.tolist() for row in made.ids[1]) and float(made.success[1].min()) == 1.0
    assert made.ids[1, 0, 0] == 57 and float(made.success[[0, 2], 0].max()) < 0.9


def test_the_words_of_a_planted_sentence_are_found_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "LENGTHS", (1, 3, 5))
    sentence = (51, 53, 54, 56, 58)
    made, _ = found(Planted(sentence), turns=12)
    longest = made.ids[1, -1].tolist()
    assert len(longest) == 5 and set(longest) <= set(sentence) and float(made.success[1, -1]) == 1.0


def test_without_classes_the_loss_of_texts_is_raised() -> None:
    task = Task(loss_hook=lambda out, batch: nn.functional.cross_entropy(out, batch[1], reduction="none"))
    model = Planted((57,))
    place = TokenPlace("table", torch.zeros(SIZE), 1, 0, 1, torch.Generator().manual_seed(2))
    made = Phrases.of(model, place, AwayFromTarget(1.0), place.generator)
    assert made is not None and made.count == 4 * len(phrases.LENGTHS)
    ids, y = texts(model)
    batch = ids[y != 1], y[y != 1]
    for turn in range(3 * made.count):
        made.improve(model, task, batch, turn % made.count)
    assert (made.ids == 57).any(2).all() and float(made.success.min()) > 0.9


def test_a_text_gets_no_phrase_of_its_own_class_and_mostly_those_that_work() -> None:
    model = Planted((57,))
    made, (ids, y) = found(model, turns=0)
    made.ids = torch.arange(3 * 4).view(3, 4, 1).expand(3, 4, 5)
    made.success = torch.tensor([[0.8] * 4, [0.8, 1.0, 0.8, 0.8], [0.1] * 4])
    drawn = torch.stack([made.draw(Task(), (ids, y))[:, 0] for _ in range(50)])
    assert not bool((drawn[drawn >= 0] // 4 == y.expand_as(drawn)[drawn >= 0]).any())
    others = drawn[:, y != 1]
    assert bool((others >= 0).all()) and float((others == 5).float().mean()) > 0.2 and len(others.unique()) > 6
    left = drawn[:, y == 1]
    assert 0.3 < float((left < 0).float().mean()) < 0.9, "no phrase where the best one is the language itself"


def test_what_worked_once_is_written_again_but_into_no_text_of_its_own_class() -> None:
    model = Planted((57,))
    made, (ids, y) = found(model, turns=0)
    made._take(0, 0, 1.0)
    assert len(made.found) == 0, "not unless it is asked to"
    made.remembers = True
    made.ids[:], made.success[:] = -1, 0.0
    for row, number, success in ((1, 0, 0.9), (1, 0, 0.9), (1, 1, 0.5), (2, 0, 1.0)):
        made.ids[row, number, 0] = 10 * row + number
        made._take(row, number, success)
    assert made.found.tolist() == [[1, 10, -1, -1], [2, 20, -1, -1]] and float(made.success[1, 1]) == 0.5
    made.ids[:], made.success[:] = -1, 0.0
    drawn = torch.stack([made.draw(Task(), (ids, y))[:, 0] for _ in range(100)])
    for own, others in ((0, {10, 20}), (1, {20}), (2, {10})):
        mine = drawn[:, y == own]
        assert set(mine[mine >= 0].tolist()) == others
        assert 0.5 < float((mine >= 0).float().mean()) < 0.7, "the others get what is drawn now"
    made.found = made.found[:1]
    assert bool((made.draw(Task(), (ids, y))[y == 1] < 0).all()), "none of another class was found"


def test_the_gradient_is_that_of_the_words_that_are_written() -> None:
    model = Planted((57,))
    made, (ids, y) = found(model, turns=0)
    where, phrase = torch.linspace(0, 0.99, 60), torch.tensor([20, 21])
    gradient = made._gradient(model, Task(), (ids, y), phrase, where, 2)
    new, inside = made.place.phrased(phrase.expand(60, 2), where)(ids)
    vectors = model.table.weight.detach()[new].requires_grad_(True)
    shown = (ids != 0).float()[:, :, None]
    logits = model.head((vectors * shown).sum(1) / shown.sum(1))
    loss = nn.functional.cross_entropy(logits, torch.full((60,), 2), reduction="sum")
    expected = torch.autograd.grad(loss, vectors)[0][inside].view(60, 2, SIZE).sum(0)
    torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("together", [1, 5])
def test_parts_of_a_batch_give_the_same_phrases(together: int) -> None:
    seen: list[int] = []
    model = Planted((51, 53, 54))
    whole, batch = found(model, turns=0)
    parts, _ = found(model, turns=0)
    parts.together = together
    for turn in range(24):
        whole.improve(model, Task(), batch, turn % whole.count)
        handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        parts.improve(model, Task(), batch, turn % whole.count)
        handle.remove()
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.success, parts.success)
    assert max(seen) <= together


def test_a_layer_without_a_table_has_no_phrases() -> None:
    place = TokenPlace("0", torch.zeros(2), 1, 0, 1, torch.Generator())
    assert Phrases.of(nn.Sequential(nn.Identity()), place, TowardsClass(2), place.generator) is None
