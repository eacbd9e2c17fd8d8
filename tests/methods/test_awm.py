"""AWM: the perturbation is bounded and clipped in pixels whatever the normalisation, masks stay in [0, 1]."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError, ModelError
from fastfip.methods.awm import AWM, AWMConfig
from fastfip.methods.base import Run
from fastfip.testing import nets
from fastfip.worst_case.pixels import PixelRange
from tests.support.small_nets import CLASSES, TiedNet, conv_net, data, plain_net, same

MEAN, STD = torch.tensor([0.4, 0.5]).reshape(2, 1, 1), torch.tensor([0.2, 0.3]).reshape(2, 1, 1)


def pixels(n: int = 24) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] that hold black and white in both channels."""
    x, y = data(n)
    x = (x / 2).clamp(0, 1)
    x[0, :, 0, 0], x[1, :, 0, 0] = 0.0, 1.0
    return x, y


class Normalised(nn.Module):
    """The same net for images in pixels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - MEAN) / STD)


def started(model: nn.Module, x: Tensor, y: Tensor, **options) -> tuple[Run, AWM]:
    run = Run(
        model=model.requires_grad_(False).eval(),
        task=Task(),
        clean=CleanSet.of((x, y)),
        config=AWMConfig(**options),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        total_steps=10,
    )
    method = AWM()
    method.setup(run)
    method.parameter_groups(run)
    return run, method


def test_the_range_is_that_of_the_clean_images_by_channel() -> None:
    x, y = pixels()
    run, method = started(plain_net(), (x - MEAN) / STD, y)
    torch.testing.assert_close(method.range.low[0], -MEAN / STD)
    torch.testing.assert_close(method.range.high[0], (1 - MEAN) / STD)
    given = PixelRange.of_batches(run.clean.batches(), run.task, low=(-2.0, -3.0), high=4.0)
    assert given.low.flatten().tolist() == [-2.0, -3.0] and given.high.flatten().tolist() == [4.0, 4.0]
    for low, high, words in (((1.0, 2.0, 3.0), None, "3 numbers for inputs of 2"), (5.0, 4.0, "high must be above")):
        with pytest.raises(ConfigError, match=words):
            PixelRange.of_batches(run.clean.batches(), run.task, low, high)


def test_a_flat_channel_is_perturbed_in_the_units_of_the_others() -> None:
    x, y = pixels()
    x[:, 1] = 0.25
    run, method = started(plain_net(), x, y)
    assert method.range.span.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_the_same_perturbation_and_masks_under_any_normalisation() -> None:
    x, y = pixels()
    torch.manual_seed(0)
    model = conv_net()
    found = []
    for net, images in ((model, (x - MEAN) / STD), (Normalised(model), x)):
        run, method = started(net, images, y, tau=3.0, inner=6, batch_size=8)
        method.ascend(run)
        (delta,) = method.deltas.values()
        result = fastfip.purify(net, (images, y), "awm", steps=9, inner=3, progress=False)
        found.append((delta, next(iter(result.model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_the_perturbation_stays_in_its_ball_and_images_in_their_range(tau: float) -> None:
    x, y = pixels()
    run, method = started(plain_net(), (x - MEAN) / STD, y, tau=tau, delta_lr=1e3)
    method.ascend(run)
    (delta,) = method.deltas.values()
    assert float(delta.abs().sum()) == pytest.approx(tau, rel=1e-4)  # so large a step reaches the bound
    moved = method.range.moved(run.task, ((x - MEAN) / STD, y), delta)[0] * STD + MEAN
    assert float(moved.min()) >= -1e-5 and float(moved.max()) <= 1 + 1e-5
    torch.testing.assert_close(moved, (x + delta).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_the_ascent_leads_away_from_the_nets_own_answers() -> None:
    x, y = pixels()
    run, method = started(plain_net(), x, y, delta_lr=1.0, inner=10)
    answers = run.model(x).argmax(1)
    before = F.cross_entropy(run.model(x), answers)
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    method.ascend(run)
    (delta,) = method.deltas.values()
    after = F.cross_entropy(run.model(method.range.moved(run.task, (x, y), delta)[0]), answers)
    assert float(after) > 1.02 * float(before)
    assert same(run.model.state_dict(), state) and all(p.grad is None for p in run.model.parameters())


def test_one_step_of_the_ascent_is_its_formula() -> None:
    x, y = pixels(8)
    run, method = started(plain_net(), x, y, inner=1, batch_size=8, labels="given", delta_lr=0.1)
    method.ascend(run)
    (delta,) = method.deltas.values()
    start = torch.zeros(1, 2, 6, 6, requires_grad=True)
    loss = F.cross_entropy(run.model(method.range.moved(run.task, (x, y), start)[0]), y)
    (gradient,) = torch.autograd.grad(loss, start)
    torch.testing.assert_close(delta, 0.1 * gradient, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_the_masks_is_that_of_the_objective() -> None:
    x, y = (t.double() if t.is_floating_point() else t for t in pixels())
    run, method = started(plain_net().double(), x, y, alpha=0.7, gamma=0.3, tau=4.0, layers="all")
    for value in method.masks.values:
        value.data.uniform_(0.2, 1)
    values = method.backward(run, (x, y))
    (delta,) = method.deltas.values()
    masks = [v.detach().clone().requires_grad_(True) for v in method.masks.values]
    weights = {m.name: m.received * v for m, v in zip(method.masks.masks, masks)}
    clean = F.cross_entropy(torch.func.functional_call(run.model, weights, (x,)), y)
    moved = method.range.moved(run.task, (x, y), delta)[0]
    there = F.cross_entropy(torch.func.functional_call(run.model, weights, (moved,)), y)
    assert float(values["perturbed_loss"]) == pytest.approx(there.item())
    total = 0.7 * clean + 0.3 * there + 0.3 * sum(v.abs().sum() for v in masks)
    for value, want in zip(method.masks.values, torch.autograd.grad(total, masks)):
        torch.testing.assert_close(value.grad, want, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in run.model.parameters())


def test_a_round_begins_with_a_new_perturbation() -> None:
    x, y = pixels()
    run, method = started(plain_net(), x, y, inner=3)
    rounds = []
    ascend = method.ascend
    method.ascend = lambda run: (rounds.append(run.step), ascend(run))  # type: ignore[method-assign]
    for run.step in range(8):
        method.backward(run, (x, y))
    assert rounds == [0, 3, 6]


def test_a_round_is_five_passes_of_each_part() -> None:
    x, y = pixels(20)
    run, method = started(plain_net(), x, y, batch_size=8)
    assert method.inner == 15 and AWMConfig().epochs == 100  # 100 passes of the masks: 20 rounds
    batches = []
    step = method._step
    method._step = lambda run, batch, delta: (batches.append(len(batch[1])), step(run, batch, delta))[1]  # type: ignore
    for run.step in range(16):
        method.backward(run, (x[:8], y[:8]))
    assert len(batches) == 30 and sum(batches) == 200


def test_masks_stay_between_zero_and_one() -> None:
    model = conv_net()
    result = fastfip.purify(model, pixels(), "awm", steps=6, inner=2, lr=0.4, progress=False)
    factor = (result.model[0].weight / model[0].weight).detach()
    assert float(factor.min()) >= 0 and float(factor.max()) <= 1 + 1e-6 and float(factor.min()) < 0.9
    assert same({"b": model[6].bias.data}, {"b": result.model[6].bias.data})
    for name in ("weight", "bias", "running_mean", "running_var"):  # BatchNorm is as it was
        assert torch.equal(getattr(model[1], name), getattr(result.model[1], name))


def test_what_is_masked() -> None:
    x, y = pixels()
    assert [m.name for m in started(nets.SmallVGG(CLASSES, width=4), *_rgb())[1].masks.masks] == [
        f"features.{k}.weight" for k in (0, 3, 8, 11, 16, 19)
    ]
    assert [m.name for m in started(TiedNet(), x, y)[1].masks.masks] == ["first.weight", "head.weight"]
    with pytest.raises(ModelError, match="layers='all'"):
        started(TiedNet(), x, y, layers="conv")


def _rgb() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, 32, 32), torch.arange(6) % CLASSES


def test_one_sample_a_class() -> None:
    _, method = started(plain_net(), *pixels(CLASSES))
    assert (method.alpha, method.tau) == (0.99, 100.0)
    _, method = started(plain_net(), *pixels())
    assert (method.alpha, method.tau) == (0.9, 1000.0)
    result = fastfip.purify(plain_net(), pixels(CLASSES), "awm", steps=4, inner=2, progress=False)
    assert all(bool(torch.isfinite(v).all()) for v in result.state_dict().values())


def test_tokens_are_not_perturbed_and_sizes_may_differ() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(18, CLASSES))
    tokens, y = torch.randint(0, 10, (24, 3)), torch.arange(24) % CLASSES
    result = fastfip.purify(model, (tokens, y), "awm", steps=3, progress=False)
    assert any("cannot be perturbed" in note for note in result.notes)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    x, y = pixels(12)
    run, method = started(model, x, y)
    run.clean = CleanSet.of([(x, y), (torch.rand(6, 2, 8, 8), y[:6])])
    method.ascend(run)
    assert set(method.deltas) == {(2, 6, 6), (2, 8, 8)}


def test_a_transformer() -> None:
    model = nets.ViT(classes=CLASSES, size=8, dim=16, depth=1, heads=2, fused=False)
    x, y = torch.rand(12, 3, 8, 8), torch.arange(12) % CLASSES
    result = fastfip.purify(model, (x, y), "awm", steps=3, inner=2, progress=False)
    assert list(result.state_dict()) == list(model.state_dict())
    assert not same(result.state_dict(), model.state_dict())
