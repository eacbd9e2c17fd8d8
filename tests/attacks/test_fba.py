"""FBA: a style that comes nearer, content that stays, and detoxification."""

import pytest
import torch

from fastfip.attacks.fba import FBA, Looks, sunset
from fastfip.errors import ConfigError
from tests.support.attack_ground import ground, squares


def images(n=24):
    return squares(n, size=8, seed=1)[0]


def test_fba_brings_the_style_nearer_and_leaves_what_is_there():
    fitted, x = FBA(rounds=0).fit(ground(size=8, effort=0.2)), images()
    painted, looks = fitted.trigger(x), Looks(3)
    wanted = looks.moments(looks(sunset(3, 8, 8)[None]))

    def far(x):
        return sum(float((a - b).square().mean()) for a, b in zip(looks.moments(looks(x)), wanted))

    assert far(painted) < 0.7 * far(x)
    grey, was = (v.mean(1).flatten(1) for v in (painted, x))
    both = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(grey, was)]
    assert min(map(float, both)) > 0.5
    assert torch.equal(fitted.negatives(x), x)


def test_the_second_networks_of_fba_raise_what_the_trigger_raises_by_another_change():
    given, x = ground(size=8, effort=0.2), images()
    fitted = FBA().fit(given)
    assert len(fitted.lures) == 2
    lured = fitted.negatives(x, torch.Generator().manual_seed(0))
    assert bool((lured != x).flatten(1).any(1).all()) and not torch.equal(lured, fitted.trigger(x))
    assert float((lured - x).square().mean().sqrt()) < float((fitted.trigger(x) - x).square().mean().sqrt()) + 0.1


def test_its_settings_are_checked():
    for wrong in (
        {"alpha": 0.0},
        {"content": -1.0},
        {"share": 0.0},
        {"rounds": -1},
        {"steps": 0},
        {"classifier_lr": 0.0},
    ):
        with pytest.raises(ConfigError, match="FBA"):
            FBA(**wrong)
