"""Words put in between those of a text: nothing of it is lost, masks grow with it, and who has no room gets none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfip.data import Task
from fastfip.worst_case.inserted import Insertion
from fastfip.worst_case.places import TokenPlace

PAD, CLS, SEP = 0, 1, 2
TASK = Task()


def place(padding: int | None = PAD, head: int = 1) -> TokenPlace:
    return TokenPlace("table", torch.zeros(3), 1, padding, head, torch.Generator().manual_seed(0))


def texts(lengths: list[int], columns: int, left: bool) -> Tensor:
    """[CLS], words 10, 11, ..., [SEP], and padding at one side."""
    rows = []
    for n in lengths:
        row = [CLS, *range(10, 10 + n), SEP]
        empty = [PAD] * (columns - len(row))
        rows.append([*empty, *row] if left else [*row, *empty])
    return torch.tensor(rows)


def words(row: Tensor) -> list[int]:
    return [int(v) for v in row if int(v) != PAD]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("form", ["pair", "dict"])
def test_a_text_keeps_its_words_and_gets_the_phrase_between_them(left: bool, form: str) -> None:
    lengths, columns = [3, 6, 8, 1, 5], 10
    ids, y = texts(lengths, columns, left), torch.arange(5)
    batch = {
        "input_ids": ids, "attention_mask": (ids != PAD).long(), "token_type_ids": torch.zeros_like(ids),
        "float_mask": (ids != PAD).float(), "labels": y,
    } if form == "dict" else (ids, y)  # fmt: skip
    before = ids.clone()
    how = Insertion.of(TASK, [batch], place(), longest=12)
    assert how is not None and how.left == left
    phrases = torch.tensor([[70, 71, 72], [73, -1, -1], [74, 75, 76], [77, 78, -1], [-1, -1, -1]])
    for share in (torch.zeros(5), torch.full((5,), 0.999), torch.rand(5, generator=torch.Generator().manual_seed(0))):
        out, done = how.put(TASK, batch, phrases, share)
        new = TASK.inputs(out)
        assert done.tolist() == [True, True, False, True, False]  # 8 + 2 + 3 > 12; the last has no phrase
        assert new.shape == (5, 10) and new.dtype == ids.dtype and torch.equal(ids, before)
        for i, n in enumerate(lengths):
            row, plain = words(new[i]), [CLS, *range(10, 10 + n), SEP]
            assert [w for w in row if w < 70] == plain and row[0] == CLS
            mine = [w for w in phrases[i].tolist() if w >= 0] if done[i] else []
            at = next((k for k, w in enumerate(row) if w >= 70), None)
            assert [w for w in row if w >= 70] == mine
            if at is not None:
                assert row[at : at + len(mine)] == mine and 1 <= at <= 1 + n and row[-1] == SEP
                assert share[i] > 0 or at == 1
            assert new[i, 0 if left else -1] == PAD or len(row) == 10
        assert torch.equal(TASK.labels(out), y)
        if form == "dict":
            assert torch.equal(out["attention_mask"], (new != PAD).long())
            assert torch.equal(out["float_mask"], (new != PAD).float()) and out["float_mask"].dtype == torch.float32
            assert out["token_type_ids"].shape == new.shape and not out["token_type_ids"].any()


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_gets_columns_up_to_the_longest_text_that_is_known(left: bool) -> None:
    ids = texts([6, 4], 8, left)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "token_type_ids": torch.full_like(ids, 3)}
    batch["labels"] = torch.tensor([0, 1])
    how = Insertion.of(TASK, [batch], place(), longest=11)
    assert how is not None
    out, done = how.put(TASK, batch, torch.tensor([[70, 71, 72], [73, 74, 75]]), torch.tensor([0.5, 0.0]))
    assert done.all() and out["input_ids"].shape == (2, 11) and (out["token_type_ids"] == 3).all()
    assert words(out["input_ids"][0]) == [CLS, 10, 11, 12, 70, 71, 72, 13, 14, 15, SEP]
    assert words(out["input_ids"][1]) == [CLS, 73, 74, 75, 10, 11, 12, 13, SEP]
    assert torch.equal(out["attention_mask"], out["input_ids"] != PAD) and out["attention_mask"].dtype == torch.bool
    fewer = Insertion.of(TASK, [batch], place(), longest=10)
    assert fewer is not None
    out, done = fewer.put(TASK, batch, torch.tensor([[70, 71, 72], [73, 74, 75]]), torch.tensor([0.5, 0.0]))
    assert done.tolist() == [False, True] and out["input_ids"].shape == (2, 9)


def test_words_go_into_no_batch_with_what_is_not_understood() -> None:
    ids = texts([3, 4], 7, False)
    y = torch.tensor([0, 1])
    positions = torch.arange(7).expand(2, -1)
    assert Insertion.of(TASK, [{"input_ids": ids, "position_ids": positions, "labels": y}], place(), 9) is None
    assert Insertion.of(TASK, [(ids, y)], place(padding=None), 9) is None
    assert Insertion.of(TASK, [(torch.randn(2, 7), y)], place(), 9) is None
    vectors = {"input_ids": ids, "vectors": torch.randn(2, 7, 3), "labels": y}
    assert Insertion.of(TASK, [vectors], place(), 9) is None
    assert Insertion.of(TASK, [{"input_ids": ids, "other": torch.randn(2, 5), "labels": y}], place(), 9) is not None


@pytest.mark.parametrize("left", [False, True])
def test_pieces_are_of_the_text_before_and_leave_most_of_a_text(left: bool) -> None:
    lengths = [6, 9, 3, 0, 5, 8]
    ids = texts(lengths, 14, left)
    ids[ids >= 10] += 100 * torch.arange(6)[:, None].expand_as(ids)[ids >= 10]  # each text has words of its own
    how = Insertion.of(TASK, [(ids, torch.arange(6))], place(), longest=12)
    assert how is not None
    generator, seen = torch.Generator().manual_seed(0), [set[int]() for _ in lengths]
    for _ in range(200):
        found = how.pieces(ids, generator)
        for i, row in enumerate(found.tolist()):
            words_in = [w for w in row if w >= 0]
            assert row == words_in + [-1] * (len(row) - len(words_in))
            seen[i].add(len(words_in))
            before = [10 + k + 100 * ((i - 1) % 6) for k in range(lengths[(i - 1) % 6])]
            assert not words_in or words_in == before[before.index(words_in[0]) :][: len(words_in)]
    # Up to half as many words as the text has, and one more; no more than the text before has, or than there is room.
    assert seen == [{1, 2, 3, 4}, {1, 2, 3}, {1, 2}, {0}, {0}, {1, 2, 3, 4}]


def test_the_form_is_that_of_all_batches_and_not_of_the_first() -> None:
    full, filled = texts([4, 4], 6, True), texts([2, 4], 6, True)
    y = torch.tensor([0, 1])
    how = Insertion.of(TASK, [(full, y), (filled, y)], place(), 6)
    assert how is not None and how.left, "the first batch has no padding at all"
    out, done = how.put(TASK, (filled, y), torch.tensor([[70, 71], [72, -1]]), torch.zeros(2))
    assert done.tolist() == [True, False] and words(out[0][0]) == [CLS, 70, 71, 10, 11, SEP]
    hidden = [{"input_ids": ids, "key_padding_mask": ids == PAD, "labels": y} for ids in (full, filled)]
    assert Insertion.of(TASK, hidden, place(), 9) is None, "no mask of the tokens, and not the same throughout"
    assert Insertion.of(TASK, hidden[:1], place(), 9) is not None
    kinds = [{"input_ids": full, "token_type_ids": torch.full_like(full, k), "labels": y} for k in (0, 1)]
    assert Insertion.of(TASK, kinds, place(), 9) is None


def test_texts_with_the_padding_s_id_inside_or_without_any_token_get_nothing() -> None:
    y = torch.tensor([0, 1])
    inside = torch.tensor([[5, PAD, 6, PAD, 7, 8], [5, 6, 7, PAD, PAD, PAD]])
    assert Insertion.of(TASK, [(inside, y)], place(head=0), 6) is None
    how = Insertion.of(TASK, [(inside[1:], y[1:])], place(head=0), 9)
    assert how is not None
    inside[0, 4:] = PAD
    empty = torch.full_like(inside[:1], PAD)
    batch = torch.cat([inside, empty]), torch.arange(3)
    out, done = how.put(TASK, batch, torch.tensor([[70, 71]] * 3), torch.full((3,), 0.5))
    assert done.tolist() == [False, True, False] and torch.equal(out[0][[0, 2], :6], batch[0][[0, 2]])
    pieces = how.pieces(batch[0], torch.Generator().manual_seed(0))
    assert (pieces[[0, 2]] == -1).all() and (pieces[1] == -1).all(), "the text before the second one is in two pieces"
