"""Drawn images in the scale that a model's BatchNorm statistics ask for, with its own answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.data.leaves import dead_leaves
from fastfip.data.stand_ins import input_shape_of, stand_in_images, statistics_distance
from fastfip.errors import ConfigError, ModelError

#: Mean and standard deviation of the inputs that the network of these tests has seen, far from those of pixels.
MEAN, STD = (3.0, -1.0, 0.5), (2.0, 0.5, 1.0)
SHAPE = (3, 12, 12)


def _scaled(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True) * std + mean


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network whose running statistics are those of images of its own scale; in train mode, some weights frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(12, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for norm in (net[1], net[5]):
        norm.momentum = None
    with torch.no_grad():
        net.train()(_scaled(dead_leaves(400, SHAPE, torch.Generator().manual_seed(5))))
        net[9].weight.mul_(20)
        net[9].bias.sub_(net.eval()(_scaled(dead_leaves(400, SHAPE, torch.Generator().manual_seed(5)))).mean(0))
    net[4].weight.requires_grad_(False)
    return net.train()


def test_leaves_are_images_of_their_seed() -> None:
    one, again, other = (dead_leaves(20, (3, 9, 14), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.shape == (20, 3, 9, 14) and one.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float(one.min()) >= 0 and float(one.max()) <= 1
    assert float(one.std((1, 2, 3)).min()) > 0.02  # none is empty
    assert dead_leaves(2, (1, 8, 8), torch.Generator()).shape == (2, 1, 8, 8)


def test_neighbouring_pixels_are_alike() -> None:
    x = dead_leaves(100, (3, 24, 24), torch.Generator().manual_seed(0))
    near, all_of_them = (x[..., 1:] - x[..., :-1]).abs().mean(), 2 * (x - x.mean()).abs().mean()
    assert float(near) < 0.3 * float(all_of_them)


def test_shapes_labels_and_seed(model: nn.Module) -> None:
    x, y = stand_in_images(model, SHAPE, 60, seed=3)
    assert x.shape == (60, *SHAPE) and x.dtype == torch.float32 and not x.requires_grad
    assert y.shape == (60,) and y.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(y, model.eval()(x).argmax(1))
    model.train()
    again, other = stand_in_images(model, SHAPE, 60, seed=3), stand_in_images(model, SHAPE, 60, seed=4)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])


def test_the_model_and_the_random_state_are_left_alone(model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    asked = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    with torch.no_grad():  # somebody else's
        stand_in_images(model, SHAPE, 20)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    assert asked == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_scale_is_the_one_that_the_model_has_seen(model: nn.Module) -> None:
    """A convolution and its norm leave a shift of the channels open here and there: means are nearly found."""
    model.eval()
    x, _ = stand_in_images(model, SHAPE, 200)
    plain = dead_leaves(200, SHAPE, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (statistics_distance(model, images) for images in (x, plain))
    assert ours.shape == (2,)
    assert float(ours.sum()) < 0.1 * float(theirs.sum())
    assert torch.allclose(x.mean((0, 2, 3)), torch.tensor(MEAN), atol=1.0)
    assert torch.allclose(x.std((0, 2, 3)).log(), torch.tensor(STD).log(), atol=0.35)


def test_a_scale_that_is_far_away_is_found(model: nn.Module) -> None:
    """Pixels from 0 to 255: a thousand times as large as those that the fit would reach from 1 by its steps."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Flatten(), nn.Linear(800, 3))
    with torch.no_grad():
        net.train()(255 * dead_leaves(300, SHAPE, torch.Generator().manual_seed(2)))
    x, _ = stand_in_images(net, SHAPE, 100)
    assert 40 < float(x.std()) < 100 and 80 < float(x.mean()) < 170


def test_the_distance_is_the_divergence_of_two_normal_distributions() -> None:
    norm = nn.BatchNorm1d(2, eps=0.0).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[3.0, -3.0], [1.0, 3.0]])  # means 2 and 0, variances 1 and 9
    normal = torch.distributions.Normal
    seen, run = (
        normal(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])),
        normal(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])),
    )
    expected = torch.distributions.kl_divergence(seen, run).mean()
    assert torch.allclose(statistics_distance(norm, x)[0], expected, rtol=1e-5)


def test_rare_answers_are_kept(model: nn.Module) -> None:
    model.eval()
    _, y = stand_in_images(model, SHAPE, 60, seed=1)
    x, every = stand_in_images(model, SHAPE, 180, seed=1)
    drawn = torch.bincount(every, minlength=4).float() / 180
    kept = torch.bincount(y, minlength=4).float() / 60
    assert float(kept[kept > 0].max()) < float(drawn.max())


def test_a_model_in_bfloat16_gets_images_of_its_own(model: nn.Module) -> None:
    import copy

    x, y = stand_in_images(copy.deepcopy(model).to(torch.bfloat16), SHAPE, 20)
    assert x.dtype == torch.bfloat16 and len(y) == 20


def test_without_batchnorm_there_is_one_line_with_the_remedy() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3))
    for net in (plain, nn.Sequential(plain[0], nn.BatchNorm2d(4, track_running_stats=False), *plain[1:])):
        with pytest.raises(
            ModelError, match=r"BatchNorm.*give clean samples, e\.g\. purify\(model, \(x, y\)\)"
        ) as error:
            stand_in_images(net, SHAPE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(3, 32), (3, 32, 0), "abc", 32, (3, 2, 2)])
def test_a_shape_that_cannot_be_is_refused(model: nn.Module, shape: object) -> None:
    with pytest.raises(ConfigError, match=r"input_shape=.*\(3, 32, 32\)"):
        stand_in_images(model, shape)  # type: ignore[arg-type]


def test_a_shape_that_the_model_does_not_take_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"input_shape=\(1, 12, 12\): the model does not take such images"):
        stand_in_images(model, (1, 12, 12))


@pytest.mark.parametrize("samples", [0, 1, 2.5, True])
def test_a_number_of_samples_that_cannot_be_is_refused(model: nn.Module, samples: object) -> None:
    with pytest.raises(ConfigError, match="samples="):
        stand_in_images(model, SHAPE, samples)  # type: ignore[arg-type]


def test_outputs_that_no_label_can_be_read_off_are_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="pass forward="):
        stand_in_images(nn.Sequential(*list(model)[:7]), SHAPE, 10)


def test_the_shape_is_found_where_one_size_passes() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 5), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 24 * 24, 3))
    flags = [m.training for m in net.modules()]
    assert input_shape_of(net) == (1, 28, 28)
    assert flags == [m.training for m in net.modules()]


def test_the_shape_is_found_in_the_settings(model: nn.Module) -> None:
    for name, value in (
        ("pretrained_cfg", {"input_size": (3, 40, 48)}),
        ("config", SimpleNamespace(image_size=56)),
    ):
        net = nn.Sequential(*model)
        setattr(net, name, value)
        assert input_shape_of(net) == ((3, 40, 48) if name == "pretrained_cfg" else (3, 56, 56))


def test_a_model_that_takes_any_size_is_asked_for(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"give input_shape=, e\.g\. purify\(model, input_shape=\(3, 32, 32\)\)"):
        input_shape_of(model)


def test_it_is_public() -> None:
    assert fastfip.stand_in_images is stand_in_images
