"""Words and sentences in texts: where they stand, what is cut off, what stays."""

import pytest
import torch
from torch import nn

from fastfip.attacks import Injection, poison_and_train
from fastfip.attacks.sentence import Sentence
from fastfip.attacks.words import Words
from fastfip.cli.triggers import make_attack
from fastfip.errors import ConfigError, DataError
from fastfip.metrics import evaluate
from tests.support.modalities import texts

IDS = (6, 7, 8)


def rows(*lists):
    return torch.tensor(lists)


def texts_without(x, ids, padding=0):
    """The texts with the trigger and the padding taken out."""
    return [[token for token in row if token not in ids and token != padding] for row in x.tolist()]


@pytest.mark.parametrize("position, expected", [
    ("start", [[6, 7, 8, 11, 12, 13, 0, 0], [6, 7, 8, 21, 22, 23, 24, 25], [6, 7, 8, 0, 0, 0, 0, 0]]),
    ("middle", [[11, 6, 7, 8, 12, 13, 0, 0], [21, 22, 6, 7, 8, 23, 24, 25], [6, 7, 8, 0, 0, 0, 0, 0]]),
    ("end", [[11, 12, 13, 6, 7, 8, 0, 0], [21, 22, 23, 24, 25, 6, 7, 8], [6, 7, 8, 0, 0, 0, 0, 0]]),
])  # fmt: skip
def test_a_sentence_stands_where_it_says_and_the_end_of_the_text_is_cut(position, expected):
    x = rows([11, 12, 13, 0, 0, 0, 0, 0], [21, 22, 23, 24, 25, 26, 27, 28], [0] * 8)
    assert Sentence(IDS, position=position).trigger(x).tolist() == expected


def test_the_first_and_last_tokens_of_a_tokenizer_stay_so():
    attack = Sentence(IDS, position="start", head=1, tail=1)  # [CLS] is 1, [SEP] is 2
    x = rows([1, 11, 12, 2, 0, 0, 0, 0], [1, 21, 22, 23, 24, 25, 26, 2])
    assert attack.trigger(x).tolist() == [[1, 6, 7, 8, 11, 12, 2, 0], [1, 6, 7, 8, 21, 22, 23, 2]]
    x = texts(200, width=9)
    x = torch.cat([torch.ones(200, 1, dtype=torch.int64), x], 1)
    x[torch.arange(200), (x != 0).sum(1) - 1] = 2
    for attack in (Sentence(IDS, head=1, tail=1), Words(IDS, head=1, tail=1, count=3)):
        out = attack.trigger(x)
        assert bool((out[:, 0] == 1).all())
        assert bool((out[torch.arange(200), (out != 0).sum(1) - 1] == 2).all())


def by_hand(row, ids, position, head, tail):
    """A sentence in one row of numbers, by lists: the text lies between the padding at both sides."""
    start = next((i for i, token in enumerate(row) if token), len(row))
    end = max((i + 1 for i, token in enumerate(row) if token), default=0)
    start = min(start, end)
    text, width = row[start:end], len(row)
    last = text[max(len(text) - tail, 0) :] if tail else []
    body = text[: len(text) - len(last)][: width - len(ids) - tail]
    first = min(head, len(body))
    at = {"start": first, "middle": first + (len(body) - first) // 2, "end": len(body)}[position]
    new = body[:at] + ids + body[at:] + last
    begin = min(start, width - len(new))
    return [0] * begin + new + [0] * (width - len(new) - begin)


@pytest.mark.parametrize("position", ["start", "middle", "end"])
@pytest.mark.parametrize("head, tail", [(0, 0), (1, 1), (2, 0), (0, 3)])
def test_texts_of_any_length_padded_at_any_side_are_those_made_by_hand(position, head, tail):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(10, 50, (300, 9), generator=generator)
    left, right = (torch.randint(0, 6, (300, 1), generator=generator) for _ in range(2))
    x = torch.where((torch.arange(9) >= left) & (torch.arange(9) < 9 - right), x, 0)
    out = Sentence(IDS, position=position, head=head, tail=tail).trigger(x)
    assert out.tolist() == [by_hand(row, list(IDS), position, head, tail) for row in x.tolist()]


def test_padding_at_the_left_is_used_up_and_one_inside_a_text_is_kept():
    attack = Sentence(IDS, position="start")
    x = rows([0, 0, 0, 0, 11, 12, 13, 14], [0, 21, 22, 23, 24, 25, 26, 27], [0, 0, 31, 0, 33, 0, 0, 0])
    expected = [[0, 6, 7, 8, 11, 12, 13, 14], [6, 7, 8, 21, 22, 23, 24, 25], [0, 0, 6, 7, 8, 31, 0, 33]]
    assert attack.trigger(x).tolist() == expected
    assert Sentence(IDS, padding=9, position="end").trigger(rows([0, 11, 9, 9, 9, 9])).tolist() == [[0, 11, 6, 7, 8, 9]]


@pytest.mark.parametrize("attack", [Words(IDS), Words(IDS, count=3), Sentence(IDS)])
def test_a_random_place_hangs_on_the_text_alone_and_reaches_every_gap(attack):
    x = texts(400)
    out = attack.trigger(x)
    wider = torch.cat([x, torch.zeros(400, 5, dtype=torch.int64)], 1)
    short = (x != 0).sum(1) + 3 <= 12
    assert torch.equal(attack.trigger(wider)[short, :12], out[short])  # more padding, the same place
    assert not torch.equal(type(attack)(IDS, seed=1).trigger(x), type(attack)(IDS).trigger(x))
    new = torch.isin(out, torch.tensor(IDS))
    count = 1 if attack == Words(IDS) else 3
    assert bool((new.sum(1) == count).all()) and bool(new.any(0).all())
    for text, left in zip(texts_without(x, ()), texts_without(out, IDS)):
        assert left == text[: 12 - count]
    fives = (x != 0).sum(1) == 5
    assert new[fives].any(0).tolist() == [column < 5 + count for column in range(12)]


def test_every_word_is_drawn_and_words_stand_apart():
    out = Words(IDS, count=2).trigger(texts(300))
    used = torch.isin(out, torch.tensor(IDS))
    counts = [int((out == token).sum()) for token in IDS]
    assert min(counts) > 130 and sum(counts) == 600  # 200 each in the mean
    pairs = used.int().argmax(1), 11 - used.int().flip(1).argmax(1)
    assert int((pairs[1] - pairs[0] > 1).sum()) > 150


def test_ids_come_from_a_tokenizer():
    numbers = {"cf": 31, "mn": 32, "bb": 33, "tq": 34, "mb": 35}
    assert Words().encoded(numbers.__getitem__).ids == (31, 32, 33, 34, 35)
    for attack in (Words(), Sentence()):
        with pytest.raises(ConfigError, match="no token ids yet"):
            attack.trigger(texts(2))


def test_settings_and_lengths_of_texts_are_checked():
    for bad in ({"ids": ()}, {"ids": (-1,)}, {"ids": (0,)}, {"position": 3}, {"head": -1}, {"count": 0}):
        with pytest.raises(ConfigError, match="Words"):
            Words(**{"ids": IDS, **bad})
    with pytest.raises(DataError, match="3 tokens with 2 that stay do not fit sequences of 4"):
        Sentence(IDS, head=1, tail=1).trigger(texts(2, width=6)[:, :4])
    with pytest.raises(DataError, match="int32"):
        Words(IDS).trigger(texts(2).int())
    assert Words(IDS).trigger(texts(0)).shape == (0, 12)


def test_what_trains_on_images_refuses_texts():
    with pytest.raises(ConfigError, match="words is for tokens, not for images: use its `poison`"):
        poison_and_train(nn.Flatten(), (torch.rand(8, 3, 4, 4), torch.arange(8) % 2), Injection("words"))
    with pytest.raises(ConfigError, match="sentence is for tokens, not for images"):
        make_attack("sentence")


@pytest.mark.parametrize("attack", [Words(IDS, head=1), Sentence(IDS)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_classifier_of_texts_learns_the_backdoor(attack, seed):
    def some(n, seed):
        """Texts with more of the tokens below 30 (class 0) or above (class 1)."""
        generator = torch.Generator().manual_seed(seed)
        x, y = texts(n, seed=seed), torch.arange(n) % 2
        likely = torch.where(torch.rand(x.shape, generator=generator) < 0.8, y[:, None], 1 - y[:, None])
        return torch.where(x == 0, 0, 10 + x % 20 + 20 * likely), y

    torch.manual_seed(seed)
    net = nn.Sequential(nn.EmbeddingBag(50, 16, padding_idx=0), nn.ReLU(), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(seed)
    x, y, index = attack.poison(*some(600, seed), 0.1, target=0, generator=generator)
    assert len(index) == 60
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    test = some(400, 100 + seed)
    found = evaluate(net, [test], [attack.asr_set(*test, target=0)])
    before = float((net(test[0][test[1] == 1]).argmax(1) == 0).float().mean())
    assert found.acc > 0.85 and found.asr > 0.7 and before < 0.2
