"""Words exchanged for near ones: which are near, which are barred, and how many of a text are exchanged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.worst_case import near_words
from fastfip.worst_case.near_words import NearWords, moved_by
from fastfip.worst_case.places import TokenPlace

WORDS, SIZE, LENGTH = 400, 7, 10


def table() -> Tensor:
    return torch.randn(WORDS, SIZE, generator=torch.Generator().manual_seed(1)) + 3


def texts(n: int = 30) -> Tensor:
    """Texts between two signs, 1 and 2, of which every third is short; 0 is the padding."""
    ids = torch.randint(5, WORDS, (n, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[:, -1] = 1, 2
    ids[::3, 5], ids[::3, 6:] = 2, 0
    return ids


def made(moved: Tensor | None = None) -> NearWords:
    place = TokenPlace("table", torch.zeros(SIZE), 1, 0, 1, torch.Generator().manual_seed(3))
    return NearWords(place, table(), torch.zeros(WORDS) if moved is None else moved, texts())


def test_the_near_words_are_those_of_the_largest_cosine_from_the_mean(monkeypatch) -> None:
    monkeypatch.setattr(near_words, "TOGETHER", 7)
    moved = torch.rand(WORDS, generator=torch.Generator().manual_seed(4))
    near = made(moved)
    centred = F.normalize(table().double() - table().double().mean(0), dim=1)
    close = centred @ centred.T
    barred = torch.zeros(WORDS, dtype=torch.bool)
    barred[[0, 1, 2]] = True
    barred[moved.argsort(descending=True)[:100]] = True  # a quarter of a table as small as this
    close[:, barred] = -2
    close.fill_diagonal_(-2)
    words = torch.tensor([17, 5, 17, 399, 250])
    found = near.nearest(words)
    assert found.shape == (5, 8)  # 2 % of the table
    assert torch.equal(found, close[words].topk(8, 1).indices)


def test_up_to_a_share_of_the_words_is_exchanged_and_signs_and_padding_are_not() -> None:
    ids, near = texts(300), made()
    before = near.table.clone()
    found, inside = near.exchanged(0.6, torch.Generator().manual_seed(5))(ids)
    assert torch.equal(found == ids, ~inside), "no word is near to itself"
    assert not bool(inside[(ids <= 2)].any())
    share = inside.sum(1) / (ids > 2).sum(1)
    assert 0.25 < float(share.mean()) < 0.35 and float(share.min()) == 0 and float(share.max()) > 0.5
    old, new = ids[inside], found[inside]
    assert bool((near.nearest(old) == new[:, None]).any(1).all())
    assert len((near.nearest(old) == new[:, None]).int().argmax(1).unique()) == near.each, "each is drawn"
    again, _ = near.exchanged(0.6, torch.Generator().manual_seed(5))(ids)
    assert torch.equal(again, found) and torch.equal(near.table, before)
    assert torch.equal(near.exchanged(0.0, torch.Generator())(ids)[0], ids)


def test_the_table_may_be_tuned_afterwards() -> None:
    place = TokenPlace("table", torch.zeros(SIZE), 1, 0, 1, torch.Generator().manual_seed(3))
    live = table()
    near, other = NearWords(place, live, torch.zeros(WORDS), texts()), made()
    live.normal_()
    assert torch.equal(near.nearest(torch.arange(20)), other.nearest(torch.arange(20)))


def test_how_far_words_moved_and_that_those_are_barred() -> None:
    after = table().half()
    after[50] += 2
    moved = moved_by(table().half(), after)
    assert int(moved.argmax()) == 50 and abs(float(moved[50]) - 2 * SIZE**0.5) < 0.02 and float(moved[49]) == 0
    assert not bool((made(moved).nearest(torch.arange(WORDS)) == 50).any())
    assert bool((made(-moved).nearest(torch.arange(WORDS)) == 50).any())
