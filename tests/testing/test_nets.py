"""Nets with torchvision's names have the parameters of the published ones, and do what those do."""

import pytest
import torch
from torch import nn

from fastfip.testing import nets

SMALL = {
    "vgg": lambda: nets.VGG(7, (1, 1), (4, 8), hidden=12, pooled=2),
    "vgg without norm": lambda: nets.VGG(7, (1, 1), (4, 8), hidden=12, pooled=2, norm=False),
    "vision transformer": lambda: nets.VisionTransformer(7, size=16, dim=16, depth=2, heads=2),
    "behind a resize": lambda: nn.Sequential(nets.Resize(16), nets.VisionTransformer(7, 16, 4, 16, 1, 2)),
    "convnext": lambda: nets.ConvNeXt(7, (1, 2), (8, 12)),
    "preact": lambda: nets.PreActResNet(7, (1, 1), 8),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_samples_get_logits_of_their_own_and_every_weight_a_gradient(make):
    torch.manual_seed(0)
    net = make().eval()
    x = torch.randn(3, 3, 16, 16)
    out = net(x)
    assert out.shape == (3, 7)
    torch.testing.assert_close(net(x[1:]), out[1:], rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: nets.vgg(1000), 143_678_248),
        (lambda: nets.vgg(1000, 16, norm=False), 138_357_544),
        (lambda: nets.vgg(1000, 11, norm=False), 132_863_336),
        (lambda: nets.resized_vit(1000), 86_567_656),
        (lambda: nets.resized_vit(1000, 32), 88_224_232),
        (lambda: nets.resized_vit(1000, 16, 1024, 24, 16), 304_326_632),
        (lambda: nets.convnext_tiny(), 28_589_128),
    ],
)
def test_the_published_numbers_of_parameters(make, count):
    with torch.device("meta"):
        assert nets.parameter_count(make()) == count


def test_names_are_those_of_the_published_files():
    with torch.device("meta"):
        states = [net.state_dict() for net in (nets.vgg(43), nets.resized_vit(10), nets.convnext_tiny(10))]
        preact = nets.preact_resnet18().state_dict()
    vgg, vit, convnext = states
    assert list(vgg)[:3] == ["features.0.weight", "features.0.bias", "features.1.weight"]
    assert vgg["features.49.weight"].shape == (512, 512, 3, 3) and "features.52.weight" not in vgg
    assert [name for name in vgg if name.startswith("classifier")][::2] == [
        "classifier.0.weight", "classifier.3.weight", "classifier.6.weight",
    ]  # fmt: skip
    assert list(vit)[:4] == ["1.class_token", "1.conv_proj.weight", "1.conv_proj.bias", "1.encoder.pos_embedding"]
    block = "1.encoder.layers.encoder_layer_11"
    assert [name.removeprefix(f"{block}.") for name in vit if name.startswith(block)] == [
        "ln_1.weight", "ln_1.bias", "self_attention.in_proj_weight", "self_attention.in_proj_bias",
        "self_attention.out_proj.weight", "self_attention.out_proj.bias", "ln_2.weight", "ln_2.bias",
        "mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias",
    ]  # fmt: skip
    assert list(vit)[-2:] == ["1.heads.head.weight", "1.heads.head.bias"]
    assert convnext["features.5.8.layer_scale"].shape == (384, 1, 1) and "features.7.2.block.5.bias" in convnext
    assert list(preact)[:3] == ["conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"]
    assert "layer4.0.shortcut.0.weight" in preact and list(preact)[-1] == "linear.bias"


def test_a_resize_leaves_images_of_its_size_and_averages_where_they_shrink():
    resize = nets.Resize(4)
    x = torch.rand(2, 3, 4, 4)
    assert resize(x) is x
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    small = resize(board.expand(1, 3, 16, 16).float())
    assert small.shape == (1, 3, 4, 4) and bool(((small - 0.5).abs() < 0.05).all())
