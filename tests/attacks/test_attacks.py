import dataclasses
import functools

import pytest
import torch

from fastfip import attacks
from fastfip.attacks import attack_labels
from fastfip.attacks.badnets import BadNets
from fastfip.attacks.blend import Blend
from fastfip.attacks.bppa import BPPA
from fastfip.errors import ConfigError, DataError
from tests.support.attack_ground import ground
from tests.support.modalities import MODALITIES, made


def images(n=20, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(20) % 4


TARGET = 2
#: A few steps show whether an attack does the same each time, and whether its trigger is a trigger.
EFFORT = 0.02


@functools.cache
def fitted(name):
    return made(name).fit(ground(TARGET, effort=EFFORT))


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack(name):
    attack = fitted(name)
    assert attack.name == name and attack.summary
    x = MODALITIES[attack.modality](20)
    kept = x.clone()
    out = attack.trigger(x)
    assert torch.equal(x, kept) and out.shape == x.shape and out.dtype == x.dtype
    attack.check(out)
    assert bool((out != x).flatten(1).any(1).all())
    assert torch.equal(attack.trigger(x[3:5]), out[3:5])
    poisoned, y, index = attack.poison(x, LABELS, 0.25, target=TARGET, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, kept) and len(index) == 5 and bool(((LABELS[index] == TARGET) == attack.clean_label).all())
    rest = torch.tensor([i for i in range(20) if i not in index.tolist()])
    assert torch.equal(poisoned[rest], x[rest]) and bool((poisoned[index] != x[index]).flatten(1).any(1).all())
    if type(attack).training_trigger is attacks.Attack.training_trigger:
        assert torch.equal(poisoned[index], out[index])
    assert bool((y[index] == TARGET).all()) and torch.equal(y[rest], LABELS[rest])
    seeds = (torch.Generator().manual_seed(seed) for seed in range(6))
    assert len({tuple(attack.poison(x, LABELS, 0.1, target=TARGET, generator=seed)[2].tolist()) for seed in seeds}) > 1
    again = attack.poison(x, LABELS, 0.25, target=TARGET, generator=torch.Generator().manual_seed(0))
    assert torch.equal(index, again[2]) and torch.equal(poisoned, again[0])
    triggered, wanted, true = attack.asr_set(x, LABELS, target=TARGET)
    attacked = torch.isin(LABELS, torch.tensor([attack.first] if name == "cba" else range(4)))
    keep = attacked & (LABELS != TARGET)
    assert torch.equal(triggered, out[keep]) and torch.equal(true, LABELS[keep])
    assert wanted.tolist() == [TARGET] * int(keep.sum())
    triggered, wanted, true = attack.asr_set(x, LABELS, target="next")
    assert torch.equal(triggered, out[attacked]) and torch.equal(wanted, (LABELS[attacked] + 1) % 4)


#: bppa has a trigger before it is fitted; only its negatives are of the training set.
FITTED = [n for n in attacks.names() if attacks.get(n).fit is not attacks.Attack.fit and n != "bppa"]


@pytest.mark.parametrize("name", FITTED)
def test_an_attack_that_trains_something_is_fitted_before_use_and_the_same_each_time(name):
    attack, x = attacks.get(name)(), images(4, size=16)
    with pytest.raises(ConfigError, match="fit it"):
        attack.training_trigger(x)
        attack.trigger(x)
    seen = []
    for one in (fitted(name), attack.fit(ground(TARGET, effort=EFFORT))):
        seen.append(one.training_trigger(x, torch.Generator().manual_seed(1)))
        seen.append(one.trigger(x))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    grey = attack.fit(ground(TARGET, size=13, channels=1, effort=0.01))  # any size, any number of channels
    assert grey.trigger(images(4, size=13)[:, :1]).shape == (4, 1, 13, 13)


def test_badnets_writes_its_patch_where_it_says():
    x = images(2)
    out = BadNets(size=2, margin=1).trigger(x)
    changed = (out != x).any(1).any(0)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[5:7, 5:7] = True
    assert torch.equal(changed, expected) and bool((out[..., 5:7, 5:7] == 1).all())
    half = BadNets(size=2, margin=1, alpha=0.5).trigger(x)
    assert torch.allclose(half[..., 5:7, 5:7], 0.5 * x[..., 5:7, 5:7] + 0.5)
    assert BadNets(pattern="checker").patch().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert BadNets(pattern="grid").patch().tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_blend_mixes_one_picture():
    x = images(2)
    picture = torch.full((3, 8, 8), 0.5)
    assert torch.allclose(Blend(alpha=0.2, picture=picture).trigger(x), 0.8 * x + 0.1)
    noise = Blend(seed=1).trigger(x) - 0.8 * x
    assert torch.allclose(noise[0], noise[1]) and float(noise[0].std()) > 0.01
    assert not torch.equal(Blend(seed=2).trigger(x), Blend(seed=1).trigger(x))
    with pytest.raises(DataError, match="resize"):
        Blend(picture=picture).trigger(images(2, size=6))


def test_labels_of_the_attack():
    assert attack_labels(LABELS[:4], 2).tolist() == [2] * 4
    assert attack_labels(LABELS[:4], "next").tolist() == [1, 2, 3, 0]
    assert attack_labels(LABELS[:4], "next", classes=9).tolist() == [1, 2, 3, 4]
    for bad in (-1, 9, "all", 1.5):
        with pytest.raises(DataError, match="target="):
            attack_labels(LABELS, bad, classes=4)


def test_what_cannot_be_poisoned():
    attack = BadNets()
    with pytest.raises(DataError, match="uint8"):
        attack.poison((images() * 255).to(torch.uint8), LABELS, 0.1)
    with pytest.raises(DataError, match="before normalising"):
        attack.asr_set(images() * 2 - 1, LABELS)
    with pytest.raises(DataError, match="rate=1.5"):
        attack.poison(images(), LABELS, 1.5)
    with pytest.raises(DataError, match="15 are not of the target class"):
        attack.poison(images(), LABELS, 1.0)
    with pytest.raises(DataError, match="does not fit"):
        BadNets(size=9).trigger(images())


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_refuses_samples_of_another_modality(name):
    attack = made(name)
    for modality, samples in MODALITIES.items():
        if modality != attack.modality:
            with pytest.raises(DataError, match=r"^[^\n]*: give [^\n]*$"):
                attack.poison(samples(20), LABELS, 0.1)


def test_settings_are_checked():
    for bad in ({"size": 0}, {"alpha": 0.0}, {"margin": -1}, {"pattern": "stripes"}, {"pattern": "grid", "size": 4}):
        with pytest.raises(ConfigError, match="BadNets"):
            BadNets(**bad)
    with pytest.raises(ConfigError, match="alpha"):
        Blend(alpha=2.0)
    with pytest.raises(ConfigError, match="did you mean 'badnets'"):
        attacks.get("badnet")


def test_a_negative_of_bppa_never_carries_the_residual_of_its_own_image():
    x, attack = images(6), BPPA(bits=2)
    residuals = attack.trigger(x) - x
    for seed in range(20):
        for n in (2, 3, 6):
            carried = attack.negatives(x[:n], torch.Generator().manual_seed(seed)) - x[:n]
            expected = [(x[i] + residuals[:n]).clamp(0, 1) - x[i] for i in range(n)]
            whose = [[torch.allclose(carried[i], one, atol=1e-5) for one in expected[i]].index(True) for i in range(n)]
            assert sorted(whose) == list(range(n)) and all(i != j for i, j in enumerate(whose))
    assert torch.equal(attack.negatives(x[:1]), x[:1])


def test_fitted_bppa_takes_residuals_from_the_whole_training_set():
    given = ground(TARGET)
    for pool in (given.x, (255 * given.x).round().to(torch.uint8)):
        attack = BPPA(bits=2).fit(dataclasses.replace(given, x=pool))
        x = attacks.base.in_range(pool[:1])
        made = {bytes(attack.negatives(x, torch.Generator().manual_seed(seed)).numpy()) for seed in range(60)}
        assert len(made) > 40 and bytes(attack.trigger(x).numpy()) not in made
        assert attack.pool is pool
