"""Whole nets against a loop over samples, in float64."""

import pytest
import torch
from torch import nn

from fastfip.fisher import fisher_diagonal, fisher_trace
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal, loop_trace, worst_error

B = 4


class VGGBN(nn.Module):
    """VGG with BatchNorm, in-place ReLU and a dropout in eval mode."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(24, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5))

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class ConvNeXt(nn.Module):
    """Depthwise convolution, channels-last LayerNorm, two Linear layers, layer scale."""

    def __init__(self, dim=6):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.3))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.gamma * self.down(nn.functional.gelu(self.up(h)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """A text classifier of torch's own encoder, time first, with learned positions."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.encoder(h.transpose(0, 1)).mean(0))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ELU(), nn.Conv3d(3, 4, 2, stride=2)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3, 4)))


def images(c=3, size=16):
    return torch.randn(B, c, size, size)


NETS = {
    "mlp": (lambda: nets.MLP(12, 9, 7, 5), lambda: torch.randn(B, 12)),
    "small-vgg-elu": (lambda: nets.SmallVGG(5, width=4, size=16), images),
    "wide-resnet-16-1": (lambda: nets.WideResNet(5), images),
    "badnet-mnist": (lambda: logits_of(nets.BadNetMNIST(5)), lambda: images(1, 28)),
    "resnet20": (lambda: nets.ResNet20(5, blocks=1), images),
    "preact-resnet18": (lambda: nets.PreActResNet(5, width=4), images),
    "vgg-bn": (VGGBN, images),
    "convnext": (ConvNeXt, images),
    "vit-fused": (lambda: nets.ViT(5, size=16, dim=8, depth=2, heads=2), images),
    "vit-mha": (lambda: nets.ViT(5, size=16, dim=8, depth=2, heads=2, fused=False), images),
    "encoder": (Encoder, lambda: torch.randint(0, 11, (B, 6))),
    "pointnet": (lambda: nets.PointNet(5, (6, 8, 10), 7), lambda: torch.randn(B, 20, 3)),
    "volume": (Volume, lambda: torch.randn(B, 1, 5, 6, 5)),
}


def logits_of(model):
    """Without its last softmax: the definitions here take outputs for logits."""
    model.fc2[1] = nn.Identity()
    return model


def problem(name):
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model = nets.randomize_norms(make()).double().eval()
    x = inputs()
    return model, (x.double() if x.is_floating_point() else x, torch.randint(0, 5, (B,)))


@pytest.mark.parametrize("name", NETS)
def test_diagonal_trace_and_gradient(name):
    model, batch = problem(name)
    got = fisher_diagonal(model, batch)
    assert worst_error(got, loop_diagonal(model, batch, B), 1e-12) < 1e-10
    want, trace = loop_trace(model, batch, B), fisher_trace(model, batch)
    assert abs(trace - want) <= 1e-10 * want and abs(got.trace() - want) <= 1e-10 * want
    params = dict(model.named_parameters())
    mine, theirs = (dict(zip(params, torch.autograd.grad(v, list(params.values())))) for v in (trace, want))
    assert worst_error(mine, theirs, 1e-12) < 1e-8
    allowed = {"places.weight"} if name == "encoder" else set()
    assert {k for k, how in got.coverage.items() if "loop" in how or "one sample" in how} == allowed


@pytest.mark.parametrize("name", ["small-vgg-elu", "preact-resnet18", "vit-fused", "encoder"])
def test_float32_is_as_good_as_torch_itself(name):
    model, batch = problem(name)
    want = loop_diagonal(model, batch, B)
    single = (batch[0].float() if batch[0].is_floating_point() else batch[0], batch[1])
    theirs = worst_error(loop_diagonal(model.float(), single, B), want, 1e-6)
    got = fisher_diagonal(model, single)
    assert worst_error(got, want, 1e-6) <= 2 * theirs + 1e-6
    assert all(v.dtype == torch.float32 for v in got.values())
