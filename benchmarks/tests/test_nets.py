"""The nets of the benchmarks have the names and shapes of the checkpoints that they stand for."""

import pytest
import torch

from benchmarks.purification import real_data
from fastfip.testing import nets

SHAPES = [
    (nets.SmallVGG(43), (2, 3, 32, 32), 43),
    (nets.WideResNet(), (2, 3, 32, 32), 10),
    (nets.BadNetMNIST(), (2, 1, 28, 28), 10),
    (nets.ResNet20(), (2, 3, 32, 32), 10),
    (nets.PreActResNet(10, width=8), (2, 3, 32, 32), 10),
    (nets.BottleneckResNet(10, (1, 2), width=4), (2, 3, 32, 32), 10),
    (nets.ViT(10), (2, 3, 32, 32), 10),
    (nets.ViT(10, fused=False), (2, 3, 32, 32), 10),
    (nets.PointNet(), (2, 64, 3), 10),
    (nets.MLP(12, 5, 4), (2, 3, 4), 4),
]


@pytest.mark.parametrize(
    ("net", "shape", "classes"), SHAPES, ids=lambda v: type(v).__name__ if hasattr(v, "eval") else ""
)
def test_logits_for_each_sample(net, shape, classes):
    x = torch.randn(shape)
    with torch.no_grad():
        out = net.eval()(x)
        torch.testing.assert_close(out[1:], net(x[1:]), rtol=1e-4, atol=1e-5)  # samples do not see each other
    assert out.shape == (2, classes)


def test_known_parameter_counts():
    assert nets.parameter_count(nets.preact_resnet18()) == 11_171_146
    assert nets.parameter_count(nets.ResNet20()) == 269_722
    assert nets.parameter_count(nets.vit_s16()) == 22_050_664
    with torch.device("meta"):  # the counts of the published ones
        assert nets.parameter_count(nets.vit_b16()) == 86_567_656
        assert nets.parameter_count(nets.resnet50()) == 25_557_032


def test_wide_resnet_can_return_its_stages():
    net = nets.WideResNet(activations=True).eval()
    x = torch.randn(1, 3, 32, 32)
    out = net(x)
    assert [tuple(o.shape[1:]) for o in out] == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (10,)]
    net.activations = False
    assert torch.equal(net(x), out[-1])


def test_clean_sets_are_balanced_and_seeded():
    y = torch.arange(1000).remainder(10).numpy()
    a, b, c = (real_data.sample_clean(y, 55, seed) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any() and len(set(a.tolist())) == 55
    assert set(torch.bincount(torch.from_numpy(y[a])).tolist()) == {5, 6}
    assert len(real_data.sample_clean(y, 500, 0, per_class=7)) == 70


@pytest.mark.skipif(not real_data.available(), reason="no ../shared/data (FASTFIP_DATA)")
@pytest.mark.parametrize("name", real_data.names())
def test_checkpoints_load_strictly(name):
    state = real_data.load_model(name).state_dict()
    assert all(torch.equal(state[k], v) for k, v in real_data.load_state(real_data.SPECS[name].file).items())


@pytest.mark.skipif(not real_data.available(), reason="no ../shared/data (FASTFIP_DATA)")
def test_a_received_net_is_what_it_is_said_to_be():
    real = real_data.load_real("ibau_gtsrb_badnets")
    x, y = real.test_set()
    bx, by = real.triggered_set()
    asked = torch.from_numpy(real.wanted(by.numpy()))
    assert (by != asked).all() and bx.shape[0] == (y.numpy() != real.wanted(y.numpy())).sum()
    with torch.no_grad():
        acc = (real.model(x[:400]).argmax(1) == y[:400]).float().mean()
        asr = (real.model(bx[:400]).argmax(1) == asked[:400]).float().mean()
    assert acc > 0.95 and asr > 0.95
