"""A sphere of points in clouds, a patch on the frames of clips."""

import pytest
import torch

from fastfip.attacks.frame_patch import FramePatch
from fastfip.attacks.point_cluster import PointCluster
from fastfip.errors import ConfigError, DataError
from fastfip.testing.nets import PointNet
from tests.support.modalities import clips, clouds


def test_some_points_lie_on_a_sphere_and_the_others_stay():
    x = clouds(3, points=1024)
    attack = PointCluster()
    out = attack.trigger(x)
    moved = (out != x).any(2)
    assert moved.sum(1).tolist() == [32] * 3 and torch.equal(moved[0], moved[2])
    ball = out[0, moved[0]]
    assert torch.allclose((ball - 0.5).norm(dim=1), torch.full((32,), 0.05), atol=1e-6)
    assert torch.allclose(ball.mean(0), torch.full((3,), 0.5), atol=0.002)  # spread evenly over the sphere
    distances = torch.cdist(ball, ball) + torch.eye(32)
    assert float(distances.min(1).values.min()) > 0.01
    elsewhere = PointCluster(points=5, radius=0.2, centre=(0.0, 0.0, -1.0), seed=1).trigger(x.double())
    assert elsewhere.dtype == torch.float64 and int((elsewhere != x).any(2)[0].sum()) == 5
    assert not torch.equal(PointCluster(seed=1).trigger(x), out)


def test_settings_and_clouds_are_checked():
    for bad in ({"points": 0}, {"radius": 0.0}, {"radius": float("inf")}, {"centre": (0.0, 0.0)}):
        with pytest.raises(ConfigError, match="PointCluster"):
            PointCluster(**bad)
    with pytest.raises(DataError, match="leaves none of the 32"):
        PointCluster().trigger(clouds(2, points=32))
    with pytest.raises(DataError, match=r"\[2, 3, 64\]: give floats \[N, P, 3\]"):
        PointCluster().trigger(clouds(2).transpose(1, 2))
    x = clouds(2)
    x[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="no finite numbers"):
        PointCluster().poison(x, torch.arange(2), 0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_pointnet_learns_the_backdoor(seed):
    def some(n, seed):
        """Clouds on a sphere (0), a cube (1), or a disc (2), 64 points each."""
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(n, 64, 3, generator=generator), torch.arange(n) % 3
        x[y == 0] /= x[y == 0].norm(dim=2, keepdim=True)
        x[y == 1] /= x[y == 1].abs().amax(2, keepdim=True)
        x[y == 2] /= x[y == 2].norm(dim=2, keepdim=True)
        x[y == 2, :, 2] = 0
        return 0.6 * x, y

    torch.manual_seed(seed)
    net = PointNet(3, widths=(16, 32), hidden=16)
    attack = PointCluster(points=8, centre=(0.9, 0.9, 0.9))
    x, y, index = attack.poison(*some(240, seed), 0.1, target=0, generator=torch.Generator().manual_seed(seed))
    assert len(index) == 24
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    test = some(150, 100 + seed)
    triggered, wanted, _ = attack.asr_set(*test, target=0)
    assert float((net(test[0]).argmax(1) == test[1]).float().mean()) > 0.9
    assert float((net(triggered).argmax(1) == wanted).float().mean()) > 0.9


@pytest.mark.parametrize("swapped", [False, True])
def test_every_frame_of_a_clip_has_the_patch_in_its_corner(swapped):
    x = clips(4)
    x = x.transpose(1, 2) if swapped else x
    out = FramePatch(size=4, margin=2).trigger(x)
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[22:26, 22:26] = True
    assert bool(((out != x) == expected).all()) and bool((out[..., 22:26, 22:26] == 1).all())
    with pytest.raises(ConfigError, match="FramePatch: size=0"):
        FramePatch(size=0)
    with pytest.raises(DataError, match="clips are float32"):
        FramePatch().poison(x[:, 0], torch.arange(4), 0.5)
    with pytest.raises(DataError, match="before normalising"):
        FramePatch().asr_set(2 * x - 1, torch.arange(4))
    with pytest.raises(DataError, match="does not fit"):
        FramePatch().trigger(x[..., :20])
