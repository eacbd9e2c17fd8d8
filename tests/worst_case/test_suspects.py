"""Words that turn texts in one model alone: which are found, and how they are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.worst_case import suspects
from fastfip.worst_case.suspects import Suspects

M, CLASSES = 6, 3
WORDS = torch.arange(10, 40)
LABELS = torch.arange(M) % CLASSES
USABLE = LABELS[:, None] != torch.arange(CLASSES)
PLAIN = torch.full((M, CLASSES), 0.1)


def answers(**effects: dict[int, float]) -> suspects.Answers:
    """Of a model in which words make a class likelier, `c2={12: 0.5}`; in texts of that class by nothing sensible."""

    def probabilities(words: Tensor, texts: Tensor) -> Tensor:
        out = PLAIN.expand(len(words), M, CLASSES).clone()
        for name, effect in effects.items():
            c = int(name[1:])
            for word, more in effect.items():
                out[words == word, :, c] += more
            out[:, c == LABELS, c] = 77.0
        return out[:, texts]

    return probabilities


def test_words_of_the_first_model_alone_are_found_and_those_of_both_are_not() -> None:
    found = Suspects(WORDS)
    first = answers(c0={17: 0.3}, c1={}, c2={12: 0.5, 25: 0.6, 31: 0.1, 33: 0.02})
    second = answers(c0={17: 0.05}, c1={}, c2={12: 0.05, 25: 0.2, 31: -0.1})
    assert found.pools() == [] and bool((found.draw(LABELS, 1.0, torch.Generator()) == -1).all())
    found.compare(first, second, (PLAIN, PLAIN), USABLE)
    pools = {c: dict(zip(ids.tolist(), scores.tolist(), strict=True)) for c, ids, scores in found.pools()}
    assert set(pools) == {0, 2}
    assert {w: round(s, 4) for w, s in pools[0].items()} == {17: 0.15}  # 0.3 - 3 * 0.05
    assert {w: round(s, 4) for w, s in pools[2].items()} == {12: 0.35, 31: 0.1}
    assert list(pools[2]) == [12, 31], "25 does much in both, 33 too little"


def test_the_last_two_comparisons_count() -> None:
    found = Suspects(WORDS)
    none = answers(c0={}, c1={}, c2={})
    for effect in (0.9, 0.2, 0.4):
        found.compare(answers(c0={}, c1={}, c2={20: effect}), none, (PLAIN, PLAIN), USABLE)
    ((c, ids, scores),) = found.pools()
    assert c == 2 and ids.tolist() == [20] and abs(float(scores[0]) - 0.3) < 1e-5


def test_what_texts_say_without_any_word_is_no_word_s_doing() -> None:
    found = Suspects(WORDS)
    first, second = answers(c0={}, c1={}, c2={20: 0.5}), answers(c0={}, c1={}, c2={20: 0.5})
    found.compare(first, second, (PLAIN, PLAIN + 0.5), USABLE)
    assert [round(float(s[0]), 4) for _, _, s in found.pools()] == [0.5]
    found = Suspects(WORDS)
    found.compare(first, second, (PLAIN + 0.5, PLAIN), USABLE)
    assert found.pools() == []


def test_only_some_of_many_classes_and_words_are_tried_in_the_second_model() -> None:
    many, classes, tried = torch.arange(80), 20, list[tuple[int, int]]()

    def first(words: Tensor, texts: Tensor) -> Tensor:
        assert len(words) == 80 and len(texts) == M
        return 0.2 + 0.01 * torch.arange(classes) + 0.001 * words[:, None, None].expand(-1, M, classes)

    def second(words: Tensor, texts: Tensor) -> Tensor:
        tried.append((int(words.min()), len(words)))
        return torch.zeros(len(words), len(texts), classes)

    found = Suspects(many)
    found.compare(first, second, (torch.zeros(M, classes),) * 2, torch.ones(M, classes, dtype=torch.bool))
    assert tried == [(80 - suspects.TRIED, suspects.TRIED)] * suspects.CLASSES
    pools = found.pools()
    assert [c for c, _, _ in pools] == [16, 17, 18, 19]
    assert all(ids.tolist() == list(range(79, 79 - suspects.POOL, -1)) for _, ids, _ in pools)


def test_a_class_of_which_all_texts_are_has_no_suspects() -> None:
    found = Suspects(WORDS)
    one = torch.zeros(M, 1, dtype=torch.bool)
    ones: suspects.Answers = lambda words, texts: torch.ones(len(words), len(texts), 1)  # noqa: E731
    found.compare(ones, ones, (torch.zeros(M, 1),) * 2, one)
    assert found.pools() == []


def test_phrases_are_of_other_classes_of_all_lengths_and_without_a_word_twice() -> None:
    found = Suspects(WORDS)
    effects = {"c0": {10: 0.5, 11: 0.4}, "c1": {}, "c2": dict.fromkeys(range(20, 26), 0.9)}
    found.compare(answers(**effects), answers(c0={}, c1={}, c2={}), (PLAIN, PLAIN), USABLE)
    labels = torch.arange(30_000) % CLASSES
    drawn = found.draw(labels, 0.5, torch.Generator().manual_seed(0))
    assert drawn.shape == (30_000, suspects.LONGEST) and drawn.dtype == torch.int64
    some = drawn[:, 0] >= 0
    assert abs(float(some.double().mean()) - 0.5) < 0.01
    low = drawn[:, 0] < 20
    assert not bool((some & (labels == 0) & low).any()) and not bool((some & (labels == 2) & ~low).any())
    middle = some & (labels == 1)
    assert abs(float(low[middle].double().mean()) - 0.5) < 0.02, "either class is as likely"
    for row in drawn[some][:500].tolist():
        words = [w for w in row if w >= 0]
        assert row == words + [-1] * (suspects.LONGEST - len(words)) and len(set(words)) == len(words)
    lengths = (drawn[some & (labels == 0)] >= 0).sum(1)
    assert all(abs(float((lengths == k).double().mean()) - 0.25) < 0.02 for k in (1, 2, 3, 4))
    assert all(bool((drawn[labels == 0] == w).any()) for w in range(20, 26))
    assert int((drawn[labels == 2] >= 0).sum(1).max()) == 2, "a class of two suspects has phrases of two at most"
    assert bool((found.draw(labels[:50], 0.0, torch.Generator()) == -1).all())
    assert torch.equal(drawn, found.draw(labels, 0.5, torch.Generator().manual_seed(0)))
