"""ISSBA: a code that one network hides and another reads."""

import pytest
import torch

from fastfip.attacks.issba import ISSBA
from fastfip.errors import ConfigError
from tests.support.attack_ground import ground, squares


def images(n=24):
    return squares(n, seed=1)[0]


def test_issba_hides_a_code_that_its_decoder_reads():
    fitted, x = ISSBA(bits=8).fit(ground(effort=0.4)), images()
    hidden = fitted.trigger(x)
    assert float((fitted.read(hidden) == fitted.code()).float().mean()) > 0.95
    assert float((fitted.read(x) == fitted.code()).float().mean()) < 0.8
    assert float((hidden - x).abs().max()) <= 24.5 / 255 and float((hidden - x).square().mean().sqrt()) < 16 / 255
    change = hidden - x
    assert not torch.allclose(change[0], change[1], atol=1 / 255)
    assert not torch.equal(ISSBA(seed=1).code(), ISSBA().code())


def test_its_settings_are_checked():
    for wrong in ({"bits": 0}, {"strength": 0.0}, {"closeness": -1.0}, {"lr": 0.0}, {"steps": 0}):
        with pytest.raises(ConfigError, match="ISSBA"):
            ISSBA(**wrong)
