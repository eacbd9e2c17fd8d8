"""LIRA: noise within its bound, and a classifier that learns it."""

import pytest
import torch

from fastfip.attacks.lira import LIRA
from fastfip.errors import ConfigError
from tests.support.attack_ground import ground, squares


def images(n=24):
    return squares(n, seed=1)[0]


def test_the_noise_of_lira_stays_within_eps_and_its_classifier_learns_it():
    given, x = ground(effort=0.3), images()
    fitted = LIRA(eps=8).fit(given)
    change = fitted.trigger(x) - x
    assert float(change.abs().max()) <= 8 / 255 + 1e-6 and float(change.abs().max()) > 2 / 255
    assert not torch.allclose(change[0], change[1], atol=0.5 / 255)
    x, y, _ = fitted.asr_set(*squares(80, seed=1), target=2)
    given.model.eval()
    assert float((given.logits(x).argmax(1) == y).float().mean()) > 0.9


def test_its_settings_are_checked():
    for wrong in ({"eps": 0}, {"eps": 2.5}, {"alpha": 1.0}, {"lr": 0.0}, {"classifier_lr": 0.0}, {"steps": 0}):
        with pytest.raises(ConfigError, match="LIRA"):
            LIRA(**wrong)
