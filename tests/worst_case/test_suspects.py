"""Phrases that turn texts in one model alone: which are found, how they grow, and how often each is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.worst_case import suspects
from fastfip.worst_case.suspects import Suspects

M, CLASSES = 6, 3
WORDS = torch.arange(10, 40)
USABLE = torch.arange(M)[:, None] % CLASSES != torch.arange(CLASSES)


def holds(phrases: Tensor, *words: int) -> Tensor:
    return torch.stack([(phrases == w).any(1) for w in words]).all(0)


def score(phrases: Tensor, texts: Tensor) -> Tensor:
    """12, 25 and 31 together send texts to class 2, each of them helps a little; 17 does for class 0."""
    out = torch.zeros(len(phrases), M, CLASSES)
    for part in (12, 25, 31):
        out[:, :, 2] += 0.12 * holds(phrases, part)[:, None]
    out[:, :, 2] += 0.5 * holds(phrases, 12, 25, 31)[:, None]
    out[:, :, 0] += 0.3 * holds(phrases, 17)[:, None]
    out[:, torch.arange(M) % CLASSES == 2, 2] = -50.0  # of texts of its own class nothing is counted
    return out[:, texts]


def test_a_phrase_of_three_words_is_found_by_its_parts() -> None:
    found = Suspects.of(score, WORDS, USABLE)
    assert set(found.ids[0].tolist()) == {12, 25, 31} and int(found.classes[0]) == 2
    assert float(found.scores[0]) > 0.85 and bool((found.scores.diff() <= 0).all())
    assert set(found.classes.tolist()) == {0, 2}, "nothing is kept of a class for which nothing was found"
    assert all(17 in row for row in found.ids[found.classes == 0].tolist())
    assert int((found.classes == 2).sum()) == suspects.TOP and bool((found.scores > suspects.LEAST).all())
    one = found.ids[(found.ids >= 0).sum(1) == 1]
    assert bool((one[:, 1:] == -1).all())


def test_only_some_of_many_classes_are_searched_those_with_the_best_words() -> None:
    tried: list[int] = []

    def many(phrases: Tensor, texts: Tensor) -> Tensor:
        tried.append(len(phrases))
        assert len(texts) == M
        return (0.2 + 0.01 * torch.arange(20)).expand(len(phrases), M, 20)

    found = Suspects.of(many, WORDS, torch.ones(M, 20, dtype=torch.bool))
    assert set(found.classes.tolist()) == {16, 17, 18, 19}
    assert tried[0] == len(WORDS) and len(tried) == 1 + 2 * 4


def test_nothing_is_found_where_both_answer_alike_or_no_text_is_left() -> None:
    none = Suspects.of(lambda phrases, texts: torch.zeros(len(phrases), len(texts), CLASSES), WORDS, USABLE)
    assert none.ids.shape == (0, 3) and len(none.scores) == len(none.classes) == 0
    alike = torch.zeros(M, 1, dtype=torch.bool)
    own = Suspects.of(lambda phrases, texts: torch.ones(len(phrases), len(texts), 1), WORDS, alike)
    assert len(own.ids) == 0


def test_classes_are_drawn_alike_and_phrases_by_the_square_of_their_scores() -> None:
    ids = torch.tensor([[1, -1, -1], [2, 3, -1], [4, 5, 6]])
    found = Suspects(ids, torch.tensor([1, 1, 0]), torch.tensor([0.9, 0.3, 0.2]))
    drawn = found.draw(20_000, 0.5, torch.Generator().manual_seed(0))
    shares = [float((drawn[:, 0] == w).double().mean()) for w in (-1, 1, 2, 4)]
    for share, due in zip(shares, (0.5, 0.225, 0.025, 0.25), strict=True):
        assert abs(share - due) < 0.015
    assert bool((drawn[drawn[:, 0] == 2] == ids[1]).all())
    assert bool((found.draw(50, 1.0, torch.Generator())[:, 0] > 0).all())
    assert bool((found.draw(50, 0.0, torch.Generator()) == -1).all())
