"""Drawn data are what their labels say, and the nets for them learn from every weight."""

from __future__ import annotations

import torch

from fastfip.testing import nets
from fastfip.testing.nets import clips_and_boxes as parts
from fastfip.testing.shapes import SOLIDS, moving_shapes, packed, shape_scenes, solid_clouds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes_move_the_way_that_the_class_says() -> None:
    x, y = moving_shapes(64, generator())
    assert (
        x.shape == (64, 3, 8, 24, 24)
        and float(x.min()) >= 0
        and float(x.max()) <= 1
        and set(y.tolist()) <= set(range(8))
    )
    bright = (x.mean(1) > 0.5).float()  # [N, T, H, W]
    for clip, label in zip(bright, (y % 4).tolist()):
        # The shift between two frames that fits best, on a torus.
        scores = {
            (d, r): float((clip[:-1].roll((2 * d, 2 * r), (1, 2)) * clip[1:]).sum())
            for d, r in ((0, 1), (0, -1), (1, 0), (-1, 0))
        }
        assert list(scores).index(max(scores, key=lambda way: scores[way])) == label


def test_boxes_hold_their_shapes() -> None:
    images, targets = shape_scenes(20, generator())
    for image, target in zip(images, targets):
        assert image.shape == (3, 48, 48) and 1 <= len(target["labels"]) <= 3
        bright = image.amax(0) > 0.56
        outside = bright.clone()
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            assert float(bright[y1:y2, x1:x2].float().mean()) > 0.25
            outside[y1:y2, x1:x2] = False
        assert float(outside.float().mean()) < 0.02
    x, y = packed(images, targets)
    assert x.shape == (20, 3, 48, 48) and torch.equal(
        (y[..., 0] > 0).sum(1), torch.tensor([len(t["labels"]) for t in targets])
    )


def test_solids_differ_and_lie_in_a_ball() -> None:
    x, y = solid_clouds(60, generator(), points=128)
    assert x.shape == (60, 128, 3) and bool(torch.isfinite(x).all()) and set(y.tolist()) == set(range(len(SOLIDS)))
    torch.testing.assert_close(x.norm(dim=2).amax(1), torch.ones(60))
    # A ring has no points near its axis, a cylinder with its lids has.
    near = (x[..., :2].norm(dim=2) < 0.25).float().mean(1)
    assert float(near[y == SOLIDS.index("ring")].max()) < float(near[y == SOLIDS.index("cylinder")].mean())


def test_a_video_net_answers_each_clip_and_trains_every_weight() -> None:
    torch.manual_seed(0)
    net = nets.VideoResNet(8, (4, 6, 8)).eval()
    x = torch.rand(3, 3, 8, 24, 24)
    out = net(x)
    assert out.shape == (3, 8)
    torch.testing.assert_close(net(x[1:]), out[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x.flip(2)), out)  # the order of frames counts
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


def test_a_detector_that_says_the_targets_has_no_loss_and_detects_them() -> None:
    images, targets = shape_scenes(6, generator(3))
    x, y = packed(images, targets)
    net = nets.SSD(width=4)
    anchors = net.anchors(48, 48)
    label, box = parts._matched(anchors, y)
    assert bool(((label > 0).sum(1) >= (y[..., 0] > 0).sum(1)).all())
    out = torch.cat(
        [20.0 * torch.nn.functional.one_hot(label, 5), parts._encoded(box, anchors) * (label > 0)[..., None]], 2
    )
    assert float(net.losses(out, (x, y)).max()) < 1e-3
    net.forward = lambda _: out  # type: ignore[method-assign]
    for got, target in zip(net.detections(x), targets):
        order = [int((got["boxes"] - b).abs().sum(1).argmin()) for b in target["boxes"]]
        assert len(got["labels"]) == len(order)
        torch.testing.assert_close(got["boxes"][order], target["boxes"], atol=1e-3, rtol=1e-3)
        assert torch.equal(got["labels"][order], target["labels"])


def test_the_loss_of_an_image_does_not_hang_on_the_others() -> None:
    torch.manual_seed(0)
    net = nets.SSD(width=4).eval()
    x, y = packed(*shape_scenes(5, generator(4)))
    whole = net.losses(net(x), (x, y))
    assert whole.shape == (5,) and bool((whole > 0).all())
    torch.testing.assert_close(net.losses(net(x[2:]), (x[2:], y[2:])), whole[2:], rtol=1e-4, atol=1e-5)
    whole.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
