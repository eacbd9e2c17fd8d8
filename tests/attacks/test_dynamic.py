"""Dynamic: triggers of each image's own, and what belongs to others."""

import pytest
import torch

from fastfip.attacks._generators import another
from fastfip.attacks.dynamic import Dynamic
from fastfip.errors import ConfigError
from tests.support.attack_ground import ground, squares
from tests.support.small_nets import same, values


def images(n=24, size=8):
    return squares(n, size, seed=1)[0]


def test_the_triggers_of_dynamic_are_small_and_differ_between_images():
    given, x = ground(size=8, effort=0.3), images()
    weights = values(given.model)
    fitted = Dynamic().fit(given)
    assert not same(values(given.model), weights)  # the classifier learns with the patterns
    on_grey = fitted.of_others(torch.full_like(x, 0.5), x)
    apart = (on_grey[:1] - on_grey[1:]).abs().flatten(1).amax(1)
    assert bool((apart[1:] > 0.05).all())
    much = ((fitted.trigger(x) - x).abs().amax(1) > 0.1).flatten(1).float().mean(1)
    assert bool((much > 0).all()) and float(much.mean()) < 0.2
    assert torch.equal(fitted.of_others(x, x), fitted.trigger(x))


def test_a_negative_of_dynamic_carries_what_belongs_to_another_image_of_the_pool():
    fitted, x = Dynamic().fit(ground(size=8)), images(1)
    made = {bytes(fitted.negatives(x, torch.Generator().manual_seed(seed)).numpy()) for seed in range(4)}
    assert len(made) > 1 and bytes(fitted.trigger(x).numpy()) not in made
    pool = torch.stack([torch.full((1, 2, 2), v) for v in (0.1, 0.2)])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(another(pool, pool, generator), pool.flip(0))


def test_its_settings_are_checked():
    for wrong in ({"density": -0.1}, {"norm": -1.0}, {"diversity": -1.0}, {"lr": 0.0}, {"mask_steps": 0}, {"steps": 0}):
        with pytest.raises(ConfigError, match="Dynamic"):
            Dynamic(**wrong)
