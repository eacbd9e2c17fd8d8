"""Perturbed vectors of tokens: the layer is found by what it does, and a planted word is found without being seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfip.data import Task
from fastfip.worst_case import places
from fastfip.worst_case.places import WIDTH, TokenPlace
from fastfip.worst_case.universal import Perturbations

WORDS, LENGTH, SIZE = 30, 9, 8


class Reader(nn.Module):
    """Looks up words, positions and types, as BERT does, under names that say nothing; answers by the mean."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(LENGTH, SIZE), nn.Embedding(2, SIZE), nn.Embedding(WORDS, SIZE)
        self.together = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
        self.head = nn.Linear(SIZE, classes)
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        shown = ids[:, : int((ids != 0).sum(1).max())]
        words = self.c(shown)
        self.seen.append(words)
        positions = torch.arange(shown.shape[1]).expand_as(shown)
        x = words + 0.1 * self.a(positions) + 0.1 * self.b(torch.zeros_like(shown))
        mask = (shown != 0).float()[:, :, None]
        return self.head((self.together(x) * mask).sum(1) / mask.sum(1))


def tokens(n: int = 40) -> Tensor:
    """Sentences of three to eight words that begin with the id 1, padded by zeros."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, WORDS - 2, (n, LENGTH), generator=generator)
    ids[:, 0] = 1
    ids[torch.arange(LENGTH) >= torch.randint(3, LENGTH, (n, 1), generator=generator)] = 0
    return ids


def place_of(model: nn.Module, ids: Tensor) -> tuple[TokenPlace, Tensor]:
    found = TokenPlace.of(model, lambda b: model(b[0]), [(ids, None)], torch.Generator().manual_seed(0))
    assert found is not None
    return found


def test_the_layer_of_the_words_is_found_and_not_that_of_positions_or_types() -> None:
    torch.manual_seed(0)
    model, ids = Reader(), tokens()
    place, like = place_of(model, ids)
    assert (place.name, place.padding, place.head, place.width) == ("c", 0, 1, WIDTH)
    words = model.c.weight[ids[ids != 0]].detach()
    torch.testing.assert_close(place.center, words.mean(0))
    assert like.shape[1:] == (WIDTH, SIZE) and like.shape[0] == len(words) // WIDTH
    torch.testing.assert_close(like.flatten(0, 1), (words - words.mean(0))[: len(like) * WIDTH])


def test_without_a_layer_that_looks_up_there_is_no_place() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(LENGTH, 3))
    assert TokenPlace.of(model, lambda b: model(b[0].float()), [(tokens(), None)], torch.Generator()) is None


def test_the_vectors_are_written_over_words_in_a_row_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model, ids = Reader(), tokens()
    place, _ = place_of(model, ids)
    place.width = 2
    used = torch.randn(len(ids), 2, SIZE)
    starts = set()
    for _ in range(20):
        model.seen.clear()
        with place.moved(model, Task(), (ids, None), used) as batch:
            model(batch[0])
        written = model.seen[0]
        plain = model.c(ids[:, : written.shape[1]])
        for n in range(len(ids)):
            length = int((ids[n] != 0).sum())
            other = torch.nonzero((written[n] != plain[n]).any(1)).flatten().tolist()
            assert len(other) == 2 and other[1] == other[0] + 1 and other[0] >= 1 and other[1] < max(length, 3)
            torch.testing.assert_close(written[n][other], (place.center + used[n]).detach())
            starts.add(other[0])
    assert starts == set(range(1, LENGTH - 2))
    model.seen.clear()
    model(ids)
    assert torch.equal(model.seen[0], model.c(ids[:, : model.seen[0].shape[1]])), "the hook is gone"


def test_words_of_the_whole_table_have_their_turn_in_most_texts_and_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SPLICED", 0.0)
    torch.manual_seed(0)
    model, ids = Reader(), tokens(200)
    place, _ = place_of(model, ids)
    plain = model.c(ids[:, : int((ids != 0).sum(1).max())]).detach()
    with place.reworded(model):
        logits = model(ids)
    written = model.seen[-1]
    other = (written != plain).any(2)
    assert 0.6 < float(other.any(1).float().mean()) < 0.85 and 1 <= int(other.sum(1).max()) <= 3
    table = model.c.weight
    which = torch.cdist(written[other].detach(), table.detach()).min(1)
    assert float(which.values.max()) < 1e-2 and len(which.indices.unique()) == WORDS
    model.zero_grad()
    logits.sum().backward()
    absent = sorted(set(range(WORDS)) - set(ids.unique().tolist()))
    assert bool((table.grad[absent] != 0).any(1).all()), "words that no clean text has learn too"
    model(ids)
    assert torch.equal(model.seen[-1].detach(), plain)


def test_pieces_of_other_texts_are_spliced_in_and_half_of_each_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SPLICED", 1.0)
    ids = torch.arange(400).view(20, 20) + 1
    ids[:, 0] = 999
    ids[:, 16:] = 0
    place = TokenPlace("c", torch.zeros(2), 1, 0, 1, torch.Generator().manual_seed(0))
    make = place.mixed(nn.ModuleDict({"c": nn.Embedding(1000, 2)}))
    widths, starts = [], []
    for _ in range(40):
        found, inside = make(ids)
        assert torch.equal(found != ids, inside) and not bool(inside[:, 0].any()) and not bool(inside[:, 16:].any())
        for n in range(20):
            at = torch.nonzero(inside[n]).flatten()
            piece = found[n][at]
            widths.append(len(at))
            if len(at):
                starts.append(int(at[0]))
                assert torch.equal(at, torch.arange(len(at)) + at[0])
                assert torch.equal(piece, torch.arange(len(piece)) + piece[0]), "words in a row"
                assert int((piece[0] - 1) // 20) == (n - 1) % 20, "of the next text"
    assert set(widths) == set(range(8)) and 0.65 < sum(map(bool, widths)) / 800 < 0.85, "seven of fifteen at most"
    assert {1, 15} <= set(starts)


def test_texts_are_pieced_together_of_any_share_of_the_next_one() -> None:
    ids = torch.arange(400).view(20, 20) + 1
    ids[:, 0] = 999
    ids[:, 16:] = 0
    ids[3, 5:] = 0  # a text of four words
    ids[7, 1:] = 0  # one of none
    place = TokenPlace("c", torch.zeros(2), 1, 0, 1, torch.Generator().manual_seed(0))
    make = place.pieced(nn.ModuleDict({"c": nn.Embedding(1000, 2)}))
    widths = []
    for _ in range(60):
        found, inside = make(ids)
        assert torch.equal(found != ids, inside) and not bool(inside[:, 0].any()) and not bool(inside[:, 16:].any())
        assert inside[3].sum() <= 4 and inside[4].sum() <= 4 and not bool(inside[7:9].any())
        for n in set(range(20)) - {3, 4, 7, 8}:
            at = torch.nonzero(inside[n]).flatten()
            piece = found[n][at]
            widths.append(len(at))
            assert torch.equal(at, torch.arange(len(at)) + at[0]), "in a row"
            assert torch.equal(piece, torch.arange(len(piece)) + piece[0]), "words that stood together"
            assert int((piece[0] - 1) // 20) == (n - 1) % 20, "of the next text"
    assert set(widths) == set(range(1, 16)) and 7 < sum(widths) / len(widths) < 9
    assert not torch.equal(make(ids)[0], make(ids)[0])


def test_words_are_exchanged_each_for_itself_for_those_of_the_table() -> None:
    ids = torch.arange(400).view(20, 20) + 1
    ids[:, 0] = 999
    ids[:, 16:] = 0
    place = TokenPlace("c", torch.zeros(2), 1, 0, 1, torch.Generator().manual_seed(0))
    make = place.scrambled(nn.ModuleDict({"c": nn.Embedding(100_000, 2)}))
    drawn = [make(ids) for _ in range(60)]
    assert all(torch.equal(found[~inside], ids[~inside]) for found, inside in drawn)
    within = torch.zeros(20, 20, dtype=torch.bool)
    within[:, 1:16] = True
    assert not any(bool((inside & ~within).any()) for _, inside in drawn)
    share = torch.stack([inside.sum(1) / 15 for _, inside in drawn])
    assert float(share.min()) == 0 and 0.75 < float(share.max()) <= 1 and 0.35 < float(share.mean()) < 0.45
    words = torch.cat([found[inside] for found, inside in drawn])
    assert float(torch.isin(words, ids[within]).float().mean()) < 0.02, "hardly ever for those of other texts"
    assert int(words.max()) > 90_000 and len(words.unique()) > 0.9 * len(words)


def test_a_phrase_is_written_in_a_row_where_it_is_asked_for() -> None:
    ids = tokens(3)
    ids[0, 1:] = torch.tensor([5, 6, 7, 8, 9, 0, 0, 0])
    place = TokenPlace("c", torch.zeros(2), 1, 0, 1, torch.Generator().manual_seed(0))
    phrases = torch.tensor([[20, 21, -1], [22, -1, -1], [20, 21, 22]])
    for share, start in ((0.0, 1), (0.99, 4)):
        found, inside = place.phrased(phrases, torch.full((3,), share))(ids)
        assert torch.nonzero(inside[0]).flatten().tolist() == [start, start + 1]
        assert found[0, start : start + 2].tolist() == [20, 21] and inside.sum(1).tolist()[:2] == [2, 1]
        assert torch.equal(found[~inside], ids[~inside])
    found, inside = place.phrased(phrases)(ids[:2])
    assert torch.equal(found, ids[:2]) and not bool(inside.any()), "a batch of another size is left alone"


def test_the_same_layer_is_left_alone_where_it_reads_other_ids() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(WORDS, SIZE)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.cat([self.shared(ids), self.shared(ids.flip(1)), self.shared(ids)], 1)

    model, ids = Two(), torch.randint(1, WORDS, (6, LENGTH))
    place, _ = place_of(model, ids)
    with place.moved(model, Task(), (ids, None), torch.full((6, WIDTH, SIZE), 7.0)):
        first, second, third = model(ids).chunk(3, 1)
    assert not torch.equal(first, model.shared(ids)) and torch.equal(first, third)
    assert torch.equal(second, model.shared(ids.flip(1)))


class Twice(nn.Module):
    """Looks up its ids and then, as a decoder with the same table does, the same ids in another order."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.shared, self.checkpointed = nn.Embedding(WORDS, SIZE), checkpointed

    def read(self, ids: Tensor) -> Tensor:
        return torch.tanh(torch.cat([self.shared(ids), self.shared(ids.flip(1)), self.shared(ids)], 1)) ** 2

    def forward(self, ids: Tensor) -> Tensor:
        return checkpoint(self.read, ids, use_reentrant=False) if self.checkpointed else self.read(ids)


def test_words_are_written_over_the_first_ids_of_each_pass_alone() -> None:
    torch.manual_seed(0)
    model, ids = Twice(), torch.randint(1, WORDS, (12, LENGTH))
    place, _ = place_of(model, ids)
    plain = model(ids).chunk(3, 1)
    with place.reworded(model):
        for some in ids.split(6):
            first, second, third = model(some).chunk(3, 1)
            assert torch.equal(first, third)
            assert not torch.equal(first, torch.tanh(model.shared.weight[some]) ** 2)
            assert torch.equal(second, torch.tanh(model.shared.weight[some.flip(1)]) ** 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, model(ids).chunk(3, 1))), "the hooks are gone"


def test_a_prompt_of_its_own_rows_does_not_take_the_place_of_the_texts() -> None:
    class Prompted(Reader):
        def forward(self, ids: Tensor) -> Tensor:
            self.seen.append(self.c(torch.tensor([[3, 4]])))
            return super().forward(ids)

    torch.manual_seed(0)
    ids = tokens()
    place, _ = place_of(Reader(), ids)
    model = Prompted()
    with place.reworded(model, place.phrased(torch.full((len(ids), 1), 29))):
        model(ids)
    asked, written = model.seen
    assert torch.equal(asked, model.c.weight[[3, 4]][None])
    assert bool((written == model.c.weight[29]).all(2).any(1).all())


def test_a_recomputed_pass_meets_the_words_that_it_met_before() -> None:
    torch.manual_seed(0)
    model, ids = Twice(), torch.randint(1, WORDS, (12, LENGTH))
    gradients = []
    for checkpointed in (False, True):
        model.checkpointed = checkpointed
        place, _ = place_of(model, ids)
        model.zero_grad()
        with place.reworded(model):
            outputs = [model(some).sum() for some in ids.split(6)]
            for out in outputs:
                out.backward()
        gradients.append(model.shared.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 5.0


def test_words_are_written_as_the_layer_returns_them() -> None:
    torch.manual_seed(0)
    model, ids = Reader(), tokens()
    model.c = Scaled(WORDS, SIZE)
    place, _ = place_of(model, ids)
    torch.testing.assert_close(place.table(model), 5 * model.c.weight.detach())
    phrase = torch.full((len(ids), 1), 29)
    with place.reworded(model, place.phrased(phrase)):
        logits = model(ids)
    written = (model.seen[-1] == 5 * model.c.weight[29]).all(2)
    assert bool((written.sum(1) == 1).all())
    logits.sum().backward()
    assert bool((model.c.weight.grad[29] != 0).any())


def test_there_is_no_table_where_a_word_looks_otherwise_among_others() -> None:
    class Mixing(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).cumsum(1)

    model, ids = nn.Sequential(Mixing(WORDS, SIZE), nn.Flatten(), nn.Linear(LENGTH * SIZE, 3)), tokens()
    place, _ = place_of(model, ids)
    assert place.table(model) is None
    with place.reworded(model):
        assert torch.equal(model(ids), model(ids))


def test_a_bag_of_words_is_moved_by_adding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(WORDS, SIZE), nn.Linear(SIZE, 3))
    ids = torch.randint(0, WORDS, (20, LENGTH))
    place, like = place_of(model, ids)
    assert place.center is None and torch.equal(like, model[0](ids))
    used = torch.randn(20, SIZE)
    with place.moved(model, Task(), (ids, None), used):
        moved = model(ids)
    torch.testing.assert_close(moved, model[1](model[0](ids) + used))


def test_a_word_that_is_in_no_clean_sentence_is_found_as_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WIDTH", 5)
    torch.manual_seed(0)
    model, ids = Reader(), tokens(120)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
        model.together[0].weight.copy_(torch.eye(SIZE))
        model.head.weight.mul_(3)
        model.c.weight[:, 0] = 0.0  # no clean word has anything there, and the class 2 answers to it
        model.c.weight[29, 0] = 2.0
        model.head.weight[:, 0] = torch.tensor([-6.0, -6.0, 12.0])
    y = model(ids).argmax(1)
    place, like = place_of(model, ids)
    worst = Perturbations.of(like, 3, torch.Generator().manual_seed(1), 0.1, place)
    for _ in range(40):
        c = worst.choose(Task(), (ids, y), 0.0)
        assert bool((c != y).all())
        worst.improve(model, Task(), (ids, y), c)
    rows = worst.store.rows(torch.tensor([2]))[0]
    assert bool((rows.norm() <= worst.radius * 1.001).all())
    assert int(worst.success.argmax()) == 2 and float(worst.success[2]) > 0.9
    assert int(rows.abs().mean(0).argmax()) == 0 and float(rows[:, 0].min()) > 0
    assert all(p.grad is None for p in model.parameters())
