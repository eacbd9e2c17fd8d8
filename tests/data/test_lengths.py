"""Texts of like lengths in a batch: every sample once, less padding, the same batches for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.data.lengths import Padding, alike, columns_held

PAD = 7  # not the usual 0, which is a word here


def texts(n: int = 100, longest: int = 30, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [n, 32] of one to thirty words, filled up at the right, or at the left; labels [n] tell them apart."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator)
    ids = torch.where(torch.arange(32) < lengths[:, None], 1 + torch.randint(0, 6, (n, 32), generator=generator), PAD)
    return ids.flip(1) if left else ids, torch.arange(n)


def computed(batches: list[tuple[Tensor, Tensor]]) -> int:
    return sum(x.numel() for x, _ in batches)


@pytest.mark.parametrize("kind", ["tensors", "loader", "dicts"])
def test_each_sample_once_with_less_padding(kind: str) -> None:
    x, y = texts()
    mask = (x != PAD).long()
    given = {"input_ids": x, "attention_mask": mask, "labels": y}
    data = {
        "tensors": (x, y),
        "loader": DataLoader(TensorDataset(x, y), 10),
        "dicts": [{k: v[i : i + 10] for k, v in given.items()} for i in range(0, 100, 10)],
    }[kind]
    clean = CleanSet.of(data).grouped_by_length(Padding(PAD, cuts=True))
    walk = list(clean.batches(10, shuffle=True, generator=torch.Generator().manual_seed(1)))
    if kind == "dicts":
        assert all(torch.equal(b["attention_mask"], (b["input_ids"] != PAD).long()) for b in walk)
    pairs = [(b["input_ids"], b["labels"]) if isinstance(b, dict) else (b[0], b[1]) for b in walk]
    assert torch.cat([labels for _, labels in pairs]).sort().values.equal(y)
    for ids, labels in pairs:  # each text is whole, and beside its own label
        assert torch.equal(x[labels][:, : ids.shape[1]], ids) and bool((x[labels][:, ids.shape[1] :] == PAD).all())
    held = int((x != PAD).sum())
    assert held <= computed(pairs) < 1.35 * held < 0.8 * 3200
    # Walks in order are as they were but for the columns that are padding throughout.
    plain = list(clean.batches(10))
    first = plain[0]["labels"] if kind == "dicts" else plain[0][1]
    assert first.equal(y[:10])


def test_the_seed_decides_and_parts_of_the_set_do_the_same() -> None:
    clean = CleanSet.of(texts())
    plain = clean.order(8, shuffle=True, generator=torch.Generator().manual_seed(3))
    before, clean = clean, clean.grouped_by_length(Padding(PAD))
    assert before.order(8, shuffle=True, generator=torch.Generator().manual_seed(3)) == plain, "it stays as it was"
    mine = [clean.order(8, shuffle=True, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert mine[0] == mine[1] != mine[2] and mine[0] != plain
    assert [len(b) for b in mine[0]] == [8] * 12 + [4] and mine[0][-1] == plain[-1]
    half = clean.subset(torch.arange(0, 100, 2))
    lengths = (texts()[0] != PAD).sum(1)
    spread = [float(lengths[b].float().std()) for b in half.order(5, shuffle=True, generator=torch.Generator())]
    assert sum(spread) / len(spread) < 0.35 * float(lengths.float().std())
    assert clean.order(8) == CleanSet.of(texts()).order(8)


def test_batches_of_one_pool_come_in_a_drawn_order_and_another_one_each_time() -> None:
    lengths = torch.arange(400) % 50
    generator = torch.Generator().manual_seed(0)
    found = [alike(torch.randperm(400, generator=generator), lengths, 10, generator) for _ in range(2)]
    assert not found[0].equal(found[1]) and all(f.sort().values.equal(torch.arange(400)) for f in found)
    for order in found:
        means = lengths[order].view(40, 10).float().mean(1)
        assert len(means[1:][means[1:] < means[:-1]]) > 10, "the batches would be in the order of their lengths"
        assert float((lengths[order].view(40, 10).amax(1) - lengths[order].view(40, 10).amin(1)).float().mean()) < 10


def test_padding_at_the_left_and_texts_of_padding_alone() -> None:
    x, y = texts(6, 5, left=True)
    cut = Padding(PAD, cuts=True).cut(Task(), (x, y))
    assert cut[0].shape[1] == int((x != PAD).sum(1).max()) and torch.equal(cut[0], x[:, 32 - cut[0].shape[1] :])
    assert columns_held(torch.full((2, 4), PAD), PAD) == (0, 4)
    assert Padding(PAD).cut(Task(), (x, y))[0] is x, "a model that needs all columns gets them"


def test_inputs_that_are_no_ids_stay_as_they_are() -> None:
    clean = CleanSet.of((torch.randn(20, 5), torch.arange(20) % 2))
    before = clean.order(4, shuffle=True, generator=torch.Generator().manual_seed(0))
    clean = clean.grouped_by_length(Padding(0, cuts=True))
    assert clean.order(4, shuffle=True, generator=torch.Generator().manual_seed(0)) == before
