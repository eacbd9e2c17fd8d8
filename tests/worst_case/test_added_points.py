"""Points at learned places in clouds: what is written where, what a step is, and that they find a planted trigger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.data import Task
from fastfip.testing.nets import PointNet
from fastfip.worst_case import added_points
from fastfip.worst_case.added_points import AddedPoints, PointPlace, scores
from fastfip.worst_case.goals import TowardsClass
from fastfip.worst_case.universal import GradientSums

#: Where a point has to be, for the planted net to answer 2.
PLANTED = torch.tensor([0.7, -0.6, 0.8])


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(n: int = 60, points: int = 32) -> Tensor:
    """Clouds [n, points, 3] in the unit box, with two of its corners in them and no point close to PLANTED."""
    x = 0.4 * (2 * torch.rand(n, points, 3, generator=generator(0)) - 1)
    x[:, 0], x[:, 1] = 1.0, -1.0
    return x


class Planted(nn.Module):
    """Three classes by the mean of the first coordinate; a point near PLANTED outweighs it, the nearer the more."""

    def forward(self, x: Tensor) -> Tensor:
        plain = 4 * x[..., 0].mean(1, keepdim=True) * x.new_tensor([1.0, -1.0, 0.0])
        near = (-(x - PLANTED.to(x)).square().sum(2) / 0.5).exp().amax(1)
        return plain + torch.stack([torch.zeros_like(near), torch.zeros_like(near), 12 * (near - 0.5)], 1)


def place(axis: int = 1, dtype: torch.dtype = torch.float32) -> PointPlace:
    return PointPlace(axis, torch.full((3,), -1.0, dtype=dtype), torch.ones(3, dtype=dtype), generator())


@pytest.mark.parametrize("axis", [1, 2])
def test_points_at_the_given_places_take_those_of_points_that_are_drawn_anew(axis: int) -> None:
    x = torch.rand(50, 20, 3, generator=generator(0), dtype=torch.float64)
    given = 5 + torch.rand(50, 4, 3, generator=generator(2), dtype=torch.float64)
    batch = (x if axis == 1 else x.transpose(1, 2).contiguous(), torch.arange(50))
    before, here, seen = batch[0].clone(), place(axis), []
    for _ in range(2):
        with here.moved(nn.Identity(), Task(), batch, given) as moved:
            assert torch.equal(moved[1], batch[1]) and moved[0].shape == batch[0].shape
            out = moved[0] if axis == 1 else moved[0].transpose(1, 2)
        for cloud, was, points in zip(out, x, given):
            new = (cloud != was).any(1)
            assert sorted(cloud[new].tolist()) == sorted(points.tolist())  # each place once, all others as they were
        seen.append((out != x).any(2))
    assert torch.equal(batch[0], before)
    assert not torch.equal(*seen) and bool((seen[0] != seen[0][:1]).any())  # other points each time, and in each cloud
    hits = seen[0].float().mean(0) + seen[1].float().mean(0)
    assert float(hits.min()) > 0  # any point of a cloud may be the one


def test_gradients_of_places_are_those_of_differences() -> None:
    x = torch.rand(12, 20, 3, generator=generator(0), dtype=torch.float64)
    y, c = torch.zeros(12, dtype=torch.int64), torch.full((12,), 2)
    start = (torch.rand(3, 4, 3, generator=generator(3), dtype=torch.float64) - 0.5).float()
    found = started(x, start)

    def loss(rows: Tensor) -> Tensor:
        found.place.generator.manual_seed(7)
        with found.place.moved(model, Task(), (x, y), rows[c]) as moved:
            return nn.functional.cross_entropy(model(moved[0]), c, reduction="sum")

    model = Planted()
    found.place.generator.manual_seed(7)
    with found.moved(model, Task(), (x, y), c) as (used, moved):
        sums = found.sums(c)
        sums.add(found.gradient(Task(), model(moved[0]), moved, used, c))
    assert sums.classes.tolist() == [2]
    wanted, step = torch.zeros(4, 3), 1e-5
    for k in range(4):
        for j in range(3):
            more, less = start.double(), start.double()
            more[2, k, j] += step
            less[2, k, j] -= step
            wanted[k, j] = (loss(more) - loss(less)) / (2 * step)
    torch.testing.assert_close(sums.total[0].float(), wanted, rtol=1e-4, atol=1e-5)


def started(x: Tensor, rows: Tensor) -> AddedPoints:
    """Places as given, [C, K, 3]."""
    batches = iter([(x, torch.zeros(len(x), dtype=torch.int64))] * 20)
    found = AddedPoints.among(Planted(), Task(), batches, x, 1, TowardsClass(len(rows)), generator())
    found.store.values = rows.clone()
    return found


def test_a_step_is_along_the_gradient_of_each_place_and_ends_in_the_box() -> None:
    x = clouds()
    rows = torch.tensor([[[0.0, 0.0, 0.0], [0.99, 0.5, 0.5]], [[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]]])[[0, 1, 1]]
    found = started(x, rows)
    assert found.radius == pytest.approx(1 / 3)  # the box is two wide
    gradient = torch.tensor([[[0.0, 4.0, 0.0], [-1.0, 0.0, 0.0]]])
    found.move(GradientSums(torch.tensor([0]), torch.zeros(1, dtype=torch.int64), gradient, 1), 0.3)
    # The first moves by 0.3 radii, the second, with a quarter of its gradient, by half of that, and no further than 1.
    torch.testing.assert_close(found.store.values[0], torch.tensor([[0.0, -0.1, 0.0], [1.0, 0.5, 0.5]]))
    assert torch.equal(found.store.values[1:], rows[1:])


def test_sets_are_scored_by_the_log_probability_on_clouds_of_other_classes() -> None:
    """All points of a cloud are one point, so that it does not matter which of them go: a plain loop is the truth."""
    x = torch.rand(3, 1, 3, generator=generator(0), dtype=torch.float64).expand(-1, 8, -1).contiguous()
    y = torch.tensor([0, 1, 1])
    sets = 2 * torch.rand(11, 2, 3, generator=generator(4)) - 1
    here = place(dtype=torch.float64)
    got = scores(Planted(), Task(), iter([(x, y)] * 9), here, sets, TowardsClass(3))
    here.generator.manual_seed(1)
    for first in range(0, 11, 8):
        some = sets[first : first + 8]
        few = torch.randint(0, 3, (8 * len(some),), generator=here.generator)
        torch.rand(8 * len(some), 8, generator=here.generator)
        for s, points in enumerate(some):
            seen: list[list[float]] = [[], [], []]
            for i in few[8 * s : 8 * s + 8].tolist():
                cloud = torch.cat([x[i, 2:], points.double()])
                answers = Planted()(cloud[None])[0].log_softmax(0)
                for c in range(3):
                    if int(y[i]) != c:
                        seen[c].append(float(answers[c]))
            for c in range(3):
                mean = sum(seen[c]) / len(seen[c]) if seen[c] else -float("inf")
                assert float(got[first + s, c]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_places_are_learned_and_find_what_was_planted(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two starts alone the planted place is not met: only steps along the gradient get there."""
    monkeypatch.setattr(added_points, "STARTS", 2)
    x, y = clouds(), torch.arange(60) % 2
    task = Task() if axis == 1 else Task(lambda model, batch: model(batch[0].transpose(1, 2)))
    batch = (x if axis == 1 else x.transpose(1, 2).contiguous(), y)
    found = AddedPoints.among(Planted(), task, iter([batch] * 9), batch[0], axis, TowardsClass(3), generator(8))
    before = (found.store.values[2] - PLANTED).norm(dim=1).min()
    first = [float(found.improve(Planted(), task, batch, torch.full((60,), 2)))]
    for _ in range(20):
        first.append(float(found.improve(Planted(), task, batch, torch.full((60,), 2))))
    nearest = (found.store.values[2] - PLANTED).norm(dim=1).min()
    assert first[0] < 0.1 and first[-1] > 0.9 and float(before) > 0.6 and float(nearest) < 0.3
    assert float(found.success[2]) > 0.8 > float(found.success[:2].max())
    assert float(found.store.values.abs().max()) <= 1


def test_many_starts_meet_it_without_a_step() -> None:
    x, y = clouds(), torch.arange(60) % 2
    found = AddedPoints.among(Planted(), Task(), iter([(x, y)] * 9), x, 1, TowardsClass(3), generator())
    assert float((found.store.values[2] - PLANTED).norm(dim=1).min()) < 0.5
    again = AddedPoints.among(Planted(), Task(), iter([(x, y)] * 9), x, 1, TowardsClass(3), generator())
    assert torch.equal(found.store.values, again.store.values)
    few = AddedPoints.among(Planted(), Task(), iter([(x[:, :8], y)] * 9), x[:, :8], 1, TowardsClass(3), generator())
    assert few.store.values.shape == (3, 2, 3)  # a quarter of the points of a cloud at most


@pytest.mark.parametrize("method", ["fisher_steps", "wfip", "fast_wfip"])
def test_clouds_in_float64_are_purified(method: str) -> None:
    torch.manual_seed(0)
    model, x, y = PointNet(3, widths=(8, 16), hidden=16).double(), clouds().double(), torch.arange(len(clouds())) % 3
    result = fastfip.purify(model, (x, y), method, steps=4, batch_size=8, force=True, progress=False)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in result.model.parameters())
    assert any("reached_by_points" in record for record in result.history)
