"""NFT: masks stay between their floor and one, fold exactly, and get the gradient of the stated objective."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ModelError
from fastfip.methods._masks import Masks, output_rows, per_element, weights_of
from fastfip.methods.base import Run
from fastfip.methods.nft import NFT, NFTConfig, floor
from fastfip.testing import nets
from tests.support.small_nets import CLASSES, TiedNet, conv_net, data, plain_net, same


def deep_net() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((2, 4), (4, 4), (4, 5)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nets.randomize_norms(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES)))


def started(model: nn.Module, n: int = 24, **options) -> tuple[Run, NFT]:
    run = Run(
        model=model.requires_grad_(False),
        task=Task(),
        clean=CleanSet.of(data(n)),
        config=NFTConfig(**options),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        total_steps=10,
    )
    method = NFT()
    method.setup(run)
    method.make_optimizer(run, method.parameter_groups(run))
    run.train_mode()
    return run, method


# -------------------------------------------------------------------------------- masks


def test_masks_of_one_leave_every_bit_and_folding_leaves_the_logits() -> None:
    model = deep_net().eval()
    x, _ = data(6)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    masks = Masks.of(weights_of(model), output_rows)
    masks.write()
    assert same(model.state_dict(), before)
    for value in masks.values:
        value.data.uniform_(0.3, 1)
    masks.write()
    masked = model(x)
    assert not torch.allclose(masked, logits)
    other = deep_net().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), masked)
    for mask in masks.masks:
        torch.testing.assert_close(mask.weight.detach(), mask.received * mask.value.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [output_rows, per_element])
def test_gradients_of_masks_are_those_of_autograd(shape) -> None:
    model = TiedNet().double().requires_grad_(False)
    masks = Masks.of(weights_of(model), shape)
    assert len(masks) == 2  # the tied weight has one mask
    for value in masks.values:
        value.data.uniform_(0.5, 1)
    x, y = data(6)
    with masks.tuning():
        F.cross_entropy(model(x.double()), y).backward()
    assert all(p.grad is None for p in model.parameters())
    first, head = (m.received for m in masks.masks)
    values = [v.detach().clone().requires_grad_(True) for v in masks.values]
    w = first * values[0]
    h = torch.relu(F.linear(x.double().flatten(1), w, model.first.bias))
    h = torch.relu(F.linear(h, w, model.second.bias))
    loss = F.cross_entropy(F.linear(h, head * values[1], model.head.bias), y)
    for value, want in zip(masks.values, torch.autograd.grad(loss, values)):
        torch.testing.assert_close(value.grad, want, rtol=1e-9, atol=1e-12)


def test_rows_of_transposed_convolutions_are_their_outputs() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    masks = Masks.of([("weight", layer, "weight")], output_rows)
    x, values = torch.randn(2, 3, 4, 4), torch.rand(5)
    plain = layer(x) - layer.bias[:, None, None]
    masks.values[0].data.copy_(values.reshape(masks.values[0].shape))
    masks.write()
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], plain * values[:, None, None])


# -------------------------------------------------------------------------------- the method


def test_batchnorms_gamma_is_masked_beta_is_not_and_the_floor_falls_with_depth() -> None:
    _, method = started(deep_net())
    assert [m.name for m in method.masks.masks] == ["1.weight", "4.weight", "7.weight"]
    assert method.floors == pytest.approx([0.8 * math.exp(-0.5 * k) for k in (1, 2, 3)])
    assert [round(floor(k, 0.8, 0.5), 3) for k in (1, 2, 3, 5)] == [0.485, 0.294, 0.179, 0.066]


def test_without_batchnorm_output_channels_are_masked_but_not_the_logits() -> None:
    names = [m.name for m in started(nets.MLP(72, 8, 8, CLASSES))[1].masks.masks]
    assert names == ["layers.0.weight", "layers.2.weight"]
    _, method = started(deep_net(), bn_mode="freeze")
    assert [m.name for m in method.masks.masks] == ["0.weight", "3.weight", "6.weight"]
    assert [tuple(v.shape) for v in method.masks.values] == [(4, 1, 1, 1), (4, 1, 1, 1), (5, 1, 1, 1)]
    with pytest.raises(ModelError, match="masks='norm' finds no BatchNorm"):
        started(plain_net(), masks="norm")


def test_the_gradient_is_that_of_the_mixed_loss_and_the_regulariser() -> None:
    model = deep_net().double()
    run, method = started(model, bn_mode="eval", c=0.5, mixup=0.7)
    x, y = data(12)
    for value in method.masks.values:
        value.data.uniform_(0.5, 0.9)
    run.generator.manual_seed(5)
    values = method.backward(run, (x.double(), y))
    got = [v.grad.clone() for v in method.masks.values]

    run.generator.manual_seed(5)
    share, other = method._partners(run, (x.double(), y))
    assert 0 < share < 1 and not torch.equal(other[0], x.double())
    masks = [v.detach().clone().requires_grad_(True) for v in method.masks.values]
    weights = {m.name: m.received * v for m, v in zip(method.masks.masks, masks)}
    logits = torch.func.functional_call(model, weights, (share * x.double() + (1 - share) * other[0],))
    loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, other[1])
    assert float(values["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    total = loss + 0.5 / (24 / CLASSES) * sum((1 - v).abs().sum() for v in masks)
    for a, b in zip(got, torch.autograd.grad(total, masks)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_the_partner_keeps_its_own_label() -> None:
    run, method = started(deep_net())
    x, y = data(12)
    _, other = method._partners(run, (x, y))
    rows = [int((x == row).flatten(1).all(1).nonzero()) for row in other[0]]
    assert sorted(rows) == list(range(12)) and torch.equal(y[rows], other[1])
    assert method._partners(run, (x[:1], y[:1]))[1] is None


@pytest.mark.parametrize("steps", [1, 12])
def test_masks_stay_between_their_floor_and_one(steps: int) -> None:
    model, seen = deep_net(), []

    def look(run, record) -> None:
        seen.append(record["masked"])

    result = fastfip.purify(model, data(24), "nft", steps=steps, lr=50.0, callbacks=[look], progress=False)
    factors = [
        (result.model[k].weight / model[k].weight).detach()
        for k in (1, 4, 7)  # gamma * M over gamma
    ]
    for factor, low in zip(factors, (0.8 * math.exp(-0.5 * k) for k in (1, 2, 3))):
        assert float(factor.min()) >= low - 1e-5 and float(factor.max()) <= 1 + 1e-5
    assert any(float(f.min()) < 0.99 for f in factors) and seen
    for k in (0, 3, 6, 9):  # nothing but gamma and the statistics moves
        source = model[k] if k < 9 else model[11]
        target = result.model[k] if k < 9 else result.model[11]
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))


def test_the_step_size_ends_where_it_should() -> None:
    result = fastfip.purify(plain_net(), data(12), "nft", epochs=40, batch_size=12, holdout=0.0, progress=False)
    rates = [record["lr"] for record in result.history]
    assert rates[0] == pytest.approx(0.05) and rates[-1] == pytest.approx(0.02, rel=0.01)
    assert rates == sorted(rates, reverse=True)
    assert (NFTConfig().steps, NFTConfig(epochs=3).steps) == (1000, None)


def test_tokens_are_not_mixed() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    tokens, y = torch.randint(0, 10, (24, 3)), torch.arange(24) % CLASSES
    result = fastfip.purify(model, (tokens, y), "nft", steps=4, progress=False)
    assert any("not mixed" in note for note in result.notes)


@pytest.mark.parametrize("kind", [conv_net, plain_net, TiedNet])
def test_one_sample_a_class(kind) -> None:
    result = fastfip.purify(kind(), data(CLASSES), "nft", steps=5, progress=False)
    assert all(bool(torch.isfinite(v).all()) for v in result.state_dict().values())
    _, method = started(kind(), n=CLASSES)
    assert method.weight == pytest.approx(1e-3)


def test_a_transformer_in_bfloat16() -> None:
    model = nets.ViT(classes=CLASSES, size=8, dim=16, depth=1, heads=2, fused=False).bfloat16()
    x, y = torch.rand(12, 3, 8, 8).bfloat16(), torch.arange(12) % CLASSES
    result = fastfip.purify(model, (x, y), "nft", steps=3, lr=1.0, progress=False)
    assert [(k, v.dtype) for k, v in result.state_dict().items()] == [
        (k, v.dtype) for k, v in model.state_dict().items()
    ]
    assert not same(result.state_dict(), model.state_dict())


class HeadFirst(nn.Module):
    """The layer that makes the logits is the first one in the model's order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.Linear(72, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x.flatten(1))))


@pytest.mark.parametrize("method", ["nft", "anp"])
def test_the_logits_are_no_neurons_wherever_their_layer_stands(method: str) -> None:
    torch.manual_seed(0)
    model = HeadFirst()
    settings = {"lr": 1.0, "c": 0.0} if method == "nft" else {}
    result = fastfip.purify(model, data(), method, steps=20, progress=False, **settings)
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert not torch.equal(result.model.body.weight, model.body.weight)
