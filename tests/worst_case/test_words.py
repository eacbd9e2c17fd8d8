"""Words tried alone: one that acts only once it is written is found, whatever the gradient says of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastfip.data import Task
from fastfip.worst_case import words
from fastfip.worst_case.goals import AwayFromTarget, TowardsClass
from fastfip.worst_case.phrases import LENGTHS, Phrases
from fastfip.worst_case.places import TokenPlace
from fastfip.worst_case.words import cut, ranked_words

WORDS, LENGTH, SIZE, TRIGGER = 200, 12, 8, 157


class Silent(nn.Module):
    """Class 1 is answered where a word is at the far end of axis 0; no other word has a part there, so no gradient."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fixed = fixed
        self.seen: list[tuple[int, ...]] = []
        self.table = nn.Embedding(WORDS, SIZE)
        self.head = nn.Linear(SIZE, 3)
        with torch.no_grad():
            self.head.weight[:, 0] = 0
            self.table.weight[:, 0] = 0
            self.table.weight[TRIGGER] = -self.head.weight[1]  # against the class, to first order
            self.table.weight[TRIGGER, 0] = 4

    def forward(self, ids: Tensor) -> Tensor:
        assert not self.fixed or ids.shape[1] == LENGTH
        self.seen.append(tuple(ids.shape))
        shown = (ids != 0).float()[:, :, None]
        vectors = self.table(ids) * shown
        silent = torch.relu(vectors[:, :, 0] - 3).sum(1)
        return self.head(vectors.sum(1) / shown.sum(1)) + silent[:, None] * torch.tensor([0.0, 20.0, 0.0])


def given(fixed: bool = False) -> tuple[Silent, TokenPlace, tuple[Tensor, Tensor]]:
    """A model, its words, and texts of eight or four words without the trigger."""
    model = Silent(fixed).eval()
    ids = torch.randint(2, TRIGGER, (40, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 9:] = 1, 0
    ids[::4, 5:] = 0
    place = TokenPlace("table", torch.zeros(SIZE), 1, 0, 1, torch.Generator().manual_seed(2))
    batch = ids, model(ids).argmax(1)
    model.seen.clear()
    return model, place, batch


def found(tried: bool) -> Phrases:
    model, place, batch = given()
    made = Phrases.of(model, place, TowardsClass(3), place.generator)
    assert made is not None
    if tried:
        made.try_words(model, Task(), batch)
    for turn in range(4 * made.count):
        made.improve(model, Task(), batch, turn % made.count)
    return made


def test_the_trial_finds_the_word_that_the_gradient_passes_by() -> None:
    assert not bool((found(False).ids == TRIGGER).any())
    made = found(True)
    assert made.ids[1, 0, 0] == TRIGGER and float(made.success[1, 0]) == 1.0
    assert made.kept[1, 0] == TRIGGER and not bool((made.kept == 0).any()), "padding is no word"
    assert all(len(row.unique()) == len(row) for row in made.kept)


def test_phrases_begin_with_different_words_and_their_success() -> None:
    model, place, batch = given()
    made = Phrases.of(model, place, TowardsClass(3), place.generator)
    assert made is not None
    made.try_words(model, Task(), batch)
    assert torch.equal(made.ids[:, :, 0], made.kept[:, : len(LENGTHS)])
    assert bool((made.success[:, 0] >= made.success[:, 1]).all()) and float(made.success[1, 0]) == 1.0


def test_a_phrase_that_fails_is_tried_with_the_next_words_of_the_list() -> None:
    model, place, batch = given()
    made = Phrases.of(model, place, TowardsClass(3), place.generator)
    assert made is not None
    made.kept = torch.cat([torch.arange(20, 40), torch.tensor([TRIGGER]), torch.arange(40, 47)]).expand(3, -1)
    made.next = torch.zeros(3, dtype=torch.long)
    turns = 0
    while TRIGGER not in made.ids[1, 0]:
        made.improve(model, Task(), batch, len(LENGTHS))
        turns += 1
    assert turns == 3 and float(made.success[1, 0]) == 1.0
    before = made.next.clone()
    made.improve(model, Task(), batch, len(LENGTHS))
    assert torch.equal(made.next, before), "what works is kept"


def test_without_classes_rows_share_the_words_that_raise_the_loss() -> None:
    model, place, (ids, y) = given()
    task = Task(loss_hook=lambda out, batch: nn.functional.cross_entropy(out, batch[1], reduction="none"))
    made = Phrases.of(model, place, AwayFromTarget(1.0), place.generator)
    assert made is not None
    made.try_words(model, task, (ids[y != 1], y[y != 1]))
    assert int((made.kept == TRIGGER).sum()) == 1 and made.kept.unique().numel() == made.kept.numel()
    assert len(made.kept) == 4 and TRIGGER in made.kept[:, 0]


def test_larger_tables_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "BUDGET", 50)
    model, place, batch = given()
    kept = ranked_words(model, Task(), batch, place, TowardsClass(3), 100, 64)
    assert kept.shape[1] in (49, 50)
    assert sum(n for n, _ in model.seen) < 50 * words.INTO + 60


@pytest.mark.parametrize("fixed", [False, True])
def test_short_texts_go_in_large_passes_without_padding(fixed: bool) -> None:
    model, place, batch = given(fixed)
    kept = ranked_words(model, Task(), batch, place, TowardsClass(3), 5, 10)
    assert kept.shape == (3, 5) and kept[1, 0] == TRIGGER
    passes = [shape for shape in model.seen if shape[0] not in (40, words.INTO)]
    assert {length for _, length in passes} == ({LENGTH} if fixed else {5})
    assert max(n for n, _ in passes) == (10 if fixed else 24), "as many words as in ten whole texts"
    model.seen.clear()
    ranked_words(model, Task(most=4), batch, place, TowardsClass(3), 5, 4)
    assert max(n for n, _ in model.seen) <= 4


def test_columns_are_cut_only_where_the_answers_stay() -> None:
    model, place, (ids, y) = given()
    few = (ids[:8:4], y[:8:4])
    assert cut(model, Task(), few, place, TowardsClass(3), few[0])[1] == 5
    by_place = Task(lambda net, batch: net(batch[0]) * batch[0].shape[1])
    short, length = cut(model, by_place, few, place, TowardsClass(3), few[0])
    assert length == LENGTH and short is few
