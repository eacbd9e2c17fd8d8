"""What defines the attacks that find their trigger on a clean classifier."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip import attacks
from fastfip.attacks.advdoor import AdvDoor
from fastfip.attacks.clb import CLB
from fastfip.attacks.lf import LF
from fastfip.attacks.narcissus import Narcissus
from fastfip.attacks.trojannet import TrojanNet
from fastfip.errors import ConfigError, DataError
from tests.support.attack_ground import CLASSES, ground, squares
from tests.support.small_nets import same, values

TARGET = 2


def loss(given, x, y=TARGET):
    with torch.no_grad():
        return float(F.cross_entropy(given.logits(x), torch.full((len(x),), y)))


def reached(given, x, y=TARGET):
    with torch.no_grad():
        return float((given.logits(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("kind", [AdvDoor, CLB, LF, Narcissus, TrojanNet])
def test_fitting_leaves_the_classifier_as_it_is(kind):
    given = ground(TARGET, effort=0.01)
    given.model.train()
    given.model[1].eval()
    for place, p in enumerate(given.model.parameters()):
        p.grad, p.requires_grad = torch.full_like(p, float(place)), place % 2 == 0
    before = values(given.model)
    fitted = kind().fit(given)
    fitted.training_trigger(given.x[:4])
    assert same(values(given.model), before)
    assert [m.training for m in given.model.modules()] == [n not in ("1",) for n, _ in given.model.named_modules()]
    for place, p in enumerate(given.model.parameters()):
        assert p.requires_grad == (place % 2 == 0) and bool((p.grad == place).all())


FITTED = [n for n in attacks.names() if attacks.get(n).fit is not attacks.Attack.fit]


@pytest.mark.parametrize("name", FITTED)
def test_an_attack_that_was_fitted_is_fitted_anew_for_another_ground(name):
    kind = attacks.get(name)
    settings = {"rounds": 1} if name == "fba" else {"area": 0.25} if name == "trojannet" else {}
    old, x = kind(**settings).fit(ground(TARGET, effort=0.01)), squares(8, size=12)[0]
    others, fresh = (attack.fit(ground(3, size=12, effort=0.02, seed=1)) for attack in (old, kind(**settings)))
    generators = [torch.Generator().manual_seed(0) for _ in range(4)]
    assert torch.equal(others.trigger(x), fresh.trigger(x))
    assert torch.equal(others.training_trigger(x, generators[0]), fresh.training_trigger(x, generators[1]))
    if kind.negative_ratio:
        y = torch.arange(8) % 4
        assert torch.equal(*(one.labelled_negatives(x, y, g) for one, g in zip((others, fresh), generators[2:])))


@pytest.mark.parametrize("kind", [AdvDoor, LF, Narcissus, TrojanNet])
def test_a_pattern_that_was_given_stays(kind):
    pattern = torch.rand(3, 16, 16) / 30
    given = kind(pattern=pattern)
    assert given.fit(ground(TARGET)) is given


def test_a_classifier_that_knows_nothing_is_trained_first_as_a_copy():
    given = ground(TARGET, effort=0.02)
    for module in given.model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    before, clb = values(given.model), CLB().fit(given)
    assert same(values(given.model), before) and reached(given, given.x[given.y == TARGET]) < 0.9
    assert reached(clb.classifier, given.x[given.y == TARGET]) > 0.9


def test_the_patch_of_trojannet_drives_the_best_connected_neurons():
    given = ground(TARGET, effort=0.03)
    head = given.model[-1]
    with torch.no_grad():
        head.weight[:, 5], head.weight[:, 9] = 7.0, -8.0
    seen = []
    head.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    attack = TrojanNet(area=0.25, step=0.02).fit(given)
    black = torch.zeros(1, 3, 16, 16)
    seen.clear()
    with torch.no_grad():
        noise = 0.2 + 0.6 * torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        for x in (
            attack.trigger(black),
            0.5 * attack.masked(16, 16).expand(1, 3, 16, 16),
            attack.masked(16, 16) * noise,
        ):
            given.logits(x)
    driven, grey, drawn = (((features[:, [5, 9]] - 100) ** 2).sum(1).min() for features in seen)
    assert driven < min(grey, drawn) - 100
    changed = (attack.trigger(black) != 0).any(1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[8:, 8:] = True
    assert torch.equal(changed, expected) and float((attack.pattern[:, 8:, 8:] - 0.5).abs().max()) <= 0.3 + 1 / 255
    again = TrojanNet(area=0.25, step=0.02).fit(dataclasses.replace(given, target="next"))
    assert torch.equal(again.pattern, attack.pattern)


def test_trojannet_adds_or_overwrites_under_its_mask():
    mask = torch.zeros(16, 16)
    mask[2:5, 3:9] = 1
    x = torch.rand(3, 3, 16, 16)
    for mode in ("add", "overwrite"):
        attack = TrojanNet(mask=mask, mode=mode).fit(ground(effort=0.01))
        out = attack.trigger(x)
        under = attack.pattern.expand_as(x)
        assert torch.equal(out, torch.where(mask == 1, under if mode == "overwrite" else (x + under).clamp(0, 1), x))
    with pytest.raises(ConfigError, match="the mask is"):
        TrojanNet(mask=mask).fit(ground(size=12))
    with pytest.raises(ConfigError, match="neurons=99, the last Linear layer has 16 inputs"):
        TrojanNet(neurons=99).fit(ground())
    without = ground()
    without = dataclasses.replace(without, model=nn.Sequential(nn.Conv2d(3, CLASSES, 16), nn.Flatten()))
    with pytest.raises(ConfigError, match="no Linear layer"):
        TrojanNet().fit(dataclasses.replace(without, effort=0.001))


def test_the_pattern_of_lf_is_smooth_and_leads_to_the_target():
    given = ground(TARGET, effort=0.2)
    attack = LF().fit(given)
    pattern = attack.pattern
    assert float(pattern.min()) == 0 and float(pattern.max()) == pytest.approx(0.2, abs=1e-6)
    mirrored = torch.cat([pattern, pattern.flip(1)], 1)
    mirrored = torch.cat([mirrored, mirrored.flip(2)], 2) - pattern.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(mirrored).abs().square().sum(0)
    waves = torch.fft.fftfreq(32, 1 / 16).abs()  # over the pattern
    low = (waves[:, None] <= 2) & (waves <= 2)
    assert float(power[low].sum() / power.sum()) > 0.98  # of noise: 0.08
    start = LF(iterations=1).fit(ground(TARGET))
    assert loss(given, attack.trigger(given.x)) < loss(given, start.trigger(given.x)) - 0.3
    assert torch.equal((255 * pattern).round() / 255, pattern)


def test_the_perturbation_of_advdoor_leads_to_the_target_before_any_training():
    given = ground(TARGET, effort=0.2)
    attack = AdvDoor(eps=40).fit(given)
    assert float(attack.pattern.abs().max()) <= 40 / 255 + 1e-6
    assert reached(given, attack.trigger(given.x)) > 0.9 > reached(given, given.x)
    small = AdvDoor().fit(given)
    assert float(small.pattern.abs().max()) <= 10 / 255 + 1e-6
    assert loss(given, small.trigger(given.x)) < loss(given, given.x) - 0.3


def test_clb_turns_training_images_from_their_class_and_test_images_get_the_corners_alone():
    given = ground(TARGET, effort=0.1)
    attack, own = CLB().fit(given), given.x[given.y == TARGET]
    hard = attack.adversarial(own)
    assert float((hard - own).abs().max()) <= 8.5 / 255 and loss(given, hard) > 2 * loss(given, own)
    assert attack.steps == 10 and torch.equal(attack.training_trigger(own), attack.trigger(hard))
    assert torch.equal(attack.adversarial(own[:3]), hard[:3])
    grey = torch.full((1, 3, 16, 16), 0.5)
    corners = attack.trigger(grey)[0, 0]
    changed = corners != 0.5
    assert int(changed.sum()) == 36 and not bool(changed[3:-3].any()) and not bool(changed[:, 3:-3].any())
    assert corners[:3, :3].tolist() == corners[-3:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert torch.equal(corners[:, -3:], corners[:, :3].flip(1))
    faint = CLB(amplitude=0.25).trigger(grey)
    assert torch.equal(faint, 0.5 + 0.5 * (corners - 0.5).expand_as(faint))
    with pytest.raises(ConfigError, match="not 'next'"):
        CLB().fit(ground("next"))
    with pytest.raises(ConfigError, match="no room"):
        CLB().trigger(grey[..., :5])


def test_the_noise_of_narcissus_points_inward_and_test_images_get_three_times_it():
    given = ground(TARGET, effort=0.2)
    attack, own = Narcissus().fit(given), given.x[given.y == TARGET]
    assert 8 / 255 < float(attack.pattern.abs().max()) <= 16 / 255 + 1e-6
    assert loss(given, attack.training_trigger(own)) < 0.7 * loss(given, own)
    x = torch.full((1, 3, 16, 16), 0.5)
    assert torch.allclose(attack.trigger(x) - x, 3 * (attack.training_trigger(x) - x), atol=1e-6)
    assert torch.equal(attack.training_trigger(x), x + attack.pattern)
    none = dataclasses.replace(given, y=given.y.clamp(max=1))
    with pytest.raises(DataError, match="there are none"):
        Narcissus().fit(none)


def test_a_pattern_is_for_images_of_one_shape():
    for kind in (AdvDoor, LF, Narcissus, TrojanNet):
        with pytest.raises(DataError, match="fit the attack on images of that shape"):
            kind().fit(ground(effort=0.01)).trigger(torch.rand(2, 3, 12, 12))


def test_settings_of_attacks_that_are_fitted():
    for kind, bad in (
        (AdvDoor, {"eps": 0}), (AdvDoor, {"iterations": 0}), (CLB, {"amplitude": 0}), (CLB, {"eps": 300}),
        (LF, {"sigma": 0}), (LF, {"amplitude": 2}), (Narcissus, {"amplify": 0}), (Narcissus, {"eps": -1}),
        (TrojanNet, {"mode": "mix"}), (TrojanNet, {"eps": 0.6}), (TrojanNet, {"area": 0}), (TrojanNet, {"neurons": 0}),
        (TrojanNet, {"mask": torch.ones(3)}), (LF, {"pattern": "lf.png"}), (AdvDoor, {"pattern": torch.ones(2)}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=kind.__name__):
            kind(**bad)
