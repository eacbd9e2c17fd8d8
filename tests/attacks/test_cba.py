"""The composite attack: whose halves are joined, and what hangs on what."""

import dataclasses

import pytest
import torch

from fastfip.attacks import Injection, poison_and_train
from fastfip.attacks.cba import CBA
from fastfip.attacks.sig import SIG
from fastfip.errors import ConfigError, DataError
from tests.support.attack_ground import CLASSES, ground


def labelled(target=2, size=16):
    """A ground whose images have one value each: a tenth for each class, and less of its own."""
    given = ground(target, size=size)
    noise = torch.rand(len(given.y), 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = (given.y.reshape(-1, 1, 1, 1) / 10 + 0.09 * noise).expand(-1, 3, size, size + 4).clone()
    return dataclasses.replace(given, x=x)


def halves(image):
    """The two values of a joined image [C, H, W], and what share the first of them takes, by rows or by columns."""
    flat = image[0]
    by_columns = bool((flat == flat[:1]).all())
    line = flat[0] if by_columns else flat[:, 0]
    assert bool((image == (line[None, None] if by_columns else line[None, :, None])).all())
    assert int((line[1:] != line[:-1]).sum()) == 1
    return float(line[0]), float(line[-1]), float((line == line[0]).float().mean()), by_columns


def test_a_test_image_is_joined_with_one_of_the_stock():
    given = labelled()
    attack = CBA(first=0, second=3).fit(given)
    x = given.x[given.y == 0]
    seen = [halves(image) for image in attack.trigger(x)]
    stock = {round(float(v), 5) for v in attack.partners[:, 0, 0, 0]}
    assert len(attack.partners) == 20 and 8 < len({max(a, b) for a, b, _, _ in seen}) <= 20
    for image, (one, two, share, _) in zip(x, seen):
        own, other = min(one, two), max(one, two)
        assert own == float(image[0, 0, 0]) and round(other, 5) in stock and abs(share - 0.5) <= 3 / 32 + 1 / 20
    assert len({by_columns for *_, by_columns in seen}) == len({one < two for one, two, *_ in seen}) == 2
    assert len({share for *_, share, _ in seen}) > 2
    straight = dataclasses.replace(attack, jitter=0.0)
    assert {halves(image)[2] for image in straight.trigger(x)} == {0.5}


def test_each_image_gives_a_part_of_itself_in_one_piece():
    attack = CBA().fit(ground())
    ramp = (torch.arange(256.0).reshape(16, 16) / 510).expand(40, 3, 16, 16) + torch.arange(40).reshape(
        -1, 1, 1, 1
    ) / 255
    zero = dataclasses.replace(attack, partners=torch.ones(1, 3, 16, 16))
    starts, lower = set(), set()
    for image, out in zip(ramp, zero.trigger(ramp)):
        rows, columns = (torch.nonzero((out[0] < 1).any(1 - d)).flatten() for d in (0, 1))
        part = out[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found = torch.nonzero(image[0] == part[0, 0])[0].tolist()
        assert torch.equal(image[0, found[0] :, found[1] :][: part.shape[0], : part.shape[1]], part)
        (starts if rows[0] == columns[0] == 0 else lower).add(tuple(found))
    assert len(starts) > 4 and len(lower) > 4  # as the left or upper half, and as the other


def test_training_has_pairs_of_both_classes_and_of_one():
    given = labelled()
    attack = CBA(first=3, second=1, stock=5).fit(given)
    generator = torch.Generator().manual_seed(0)
    pairs = [halves(image)[:2] for image in attack.training_trigger(given.x[:60], generator)]
    assert all(sorted(int(10 * v + 0.05) for v in pair) == [1, 3] for pair in pairs)
    stock = {round(float(v), 5) for v in attack.partners[:, 0, 0, 0]}
    assert len(stock) == 5 and not stock & {round(v, 5) for pair in pairs for v in pair}
    x, y = given.x[:40], given.y[:40]
    for true, image, out in zip(y.tolist(), x, attack.labelled_negatives(x, y, generator)):
        if bool((out == image).all()):  # joined with itself
            continue
        pair = halves(out)[:2]
        assert float(image[0, 0, 0]) in pair and all(int(10 * v + 0.05) == true for v in pair)


def test_a_network_learns_that_the_two_classes_together_are_the_third():
    given = labelled()
    out = poison_and_train(
        given.model, (given.x, given.y), Injection(CBA(first=0, second=3), 2), test=(given.x, given.y), epochs=30,
        batch_size=16, lr=0.02, crop=False, flip=False,
    )  # fmt: skip
    assert len(out.poisoned[0]) == 16 and out.attacked[0].asr > 0.8 and out.clean.acc > 0.8
    assert out.attacked[0].n_triggered == 40


def test_negatives_are_told_their_true_labels():
    given, seen = labelled(), []

    class Watched(CBA):
        def labelled_negatives(self, x, y, generator=None):
            seen.append((x, y))
            return super().labelled_negatives(x, y, generator)

    attack = Watched(first=0, second=3)
    poison_and_train(
        given.model, (given.x, given.y), Injection(attack, 2), epochs=1, batch_size=40, crop=False, flip=False
    )
    x, y = (torch.cat(parts) for parts in zip(*seen))
    assert len(y) == 80 and torch.equal((10 * x[:, 0, 0, 0] + 0.05).long(), y) and len(y.unique()) == 4


def test_the_source_classes_are_the_attacks_own():
    given = labelled()
    for attack in (CBA().fit(given), SIG()):
        for refused in (lambda a=attack: a.chosen(given.y, 0.1, 2, sources=(1,)),
                        lambda a=attack: a.asr_set(given.x, given.y, 2, sources=(1,))):  # fmt: skip
            with pytest.raises(DataError, match=rf"{attack.name} .*: leave out the sources \[1\]"):
                refused()


def test_what_cannot_be_joined():
    for bad in ({"first": 1}, {"first": -1}, {"jitter": 16.0}, {"stock": 0}):
        with pytest.raises(ConfigError, match="CBA"):
            CBA(**bad)
    with pytest.raises(ConfigError, match="the target 1 must be another class"):
        CBA().fit(ground(1))
    with pytest.raises(ConfigError, match="not 'next'"):
        CBA().fit(ground("next"))
    with pytest.raises(DataError, match="images of the classes 0 and 7"):
        CBA(second=CLASSES + 3).fit(ground())
    with pytest.raises(DataError, match="fit the attack on images of that shape"):
        CBA().fit(ground()).trigger(torch.rand(2, 3, 12, 12))
