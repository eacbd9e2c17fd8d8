"""Networks that make triggers: their parts, and a training with each of them."""

import pytest
import torch

from fastfip.attacks import Injection, poison_and_train
from fastfip.attacks._generators import another, in_bytes, padded
from tests.support.attack_ground import ground, squares
from tests.support.small_nets import same, values


def test_parts_of_generators():
    x = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    assert padded(x).shape == (2, 1, 8, 8) and torch.equal(padded(x)[..., :5, :7], x)
    change = torch.tensor([0.1 / 255, 0.6 / 255, -2.4 / 255], requires_grad=True)
    whole = in_bytes(change)
    assert torch.allclose(255 * whole.detach(), torch.tensor([0.0, 1.0, -2.0]), atol=1e-4)
    whole.sum().backward()
    assert change.grad.tolist() == [1.0, 1.0, 1.0]


def test_another_image_is_never_the_same_one_though_a_pool_has_some_twice():
    pool = torch.arange(8.0).div(8)[:, None, None, None].expand(8, 1, 2, 2).clone()
    pool[3] = pool[2]
    for seed in range(40):
        out = another(pool, pool, torch.Generator().manual_seed(seed))
        assert not bool((out == pool).flatten(1).all(1).any())


@pytest.mark.parametrize("attack", ["dynamic", "fba", "issba", "lira"])
def test_a_network_is_trained_with_the_trigger_of_a_network(attack):
    given = ground()
    before = values(given.model)
    data = squares(), Injection(attack, 1)
    one, two = (poison_and_train(given.model, *data, epochs=1, effort=0.02, batch_size=32) for _ in range(2))
    assert same(values(one.model), values(two.model)) and same(values(given.model), before)
    held = [part for part in vars(one.injections[0].attack).values() if isinstance(part, torch.nn.Module)]
    assert held and not any(part.training or p.requires_grad for part in held for p in part.parameters())
    assert "Conv2d" not in repr(one.injections[0])
