"""Universal perturbations: within their bounds, and they find a planted shortcut without seeing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastfip.data import Task
from fastfip.methods.wfip import search as searching
from fastfip.methods.wfip.config import WFIPConfig
from fastfip.worst_case import store, universal
from fastfip.worst_case.pixels import perturbable
from fastfip.worst_case.universal import Perturbations
from tests.support.fip_runs import make_run


def planted() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear net on 3 classes that goes to class 2 along one direction that clean data does not use."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 1, 2, 4, generator=generator) * 0.1
    y = torch.arange(90) % 3
    x[:, 0, 0, :3] += nn.functional.one_hot(y, 3).float()
    x[:, 0, 1, 3] = 0.5 + 0.5 * (torch.arange(90) % 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[:, :3] = 4 * torch.eye(3)
        net[1].weight[2, 4] = 30.0  # the shortcut: pixel (1, 0)
    return net, x, y


def test_the_planted_class_is_the_easiest_to_reach_and_bounds_hold() -> None:
    net, x, y = planted()
    generator = torch.Generator().manual_seed(1)
    found = Perturbations.of(x, 3, generator, radius=0.2)
    for _ in range(40):
        c = found.draw(y, 0.0)
        assert bool((c != y).all())
        found.improve(net, Task(), (x, y), c)
    delta = found.store.rows(torch.arange(3))
    assert bool((delta.flatten(1).norm(dim=1) <= found.radius * 1.001).all())
    assert int(found.success.argmax()) == 2 and float(found.success[2]) > 0.9
    assert float(found.success[:2].max()) < 0.5
    assert delta[2, 0, 1, 0].abs() == delta[2].abs().max()
    with found.moved(net, Task(), (x, y), torch.full((90,), 2)) as (_, batch):
        moved = batch[0].detach()
    assert float(moved.max()) <= float(x.max()) and float(moved.min()) >= float(x.min())


def test_improving_leaves_the_net_alone_and_draws_follow_success() -> None:
    net, x, y = planted()
    net[1].weight.requires_grad_(True)
    before = net[1].weight.detach().clone()
    found = Perturbations.of(x, 3, torch.Generator().manual_seed(1))
    found.improve(net, Task(), (x, y), found.draw(y, 0.0))
    assert torch.equal(net[1].weight, before) and net[1].weight.grad is None and net[1].weight.requires_grad
    found.success = torch.tensor([0.0, 0.0, 1.0])
    drawn = found.draw(torch.zeros(200, dtype=torch.long), 2.0)
    assert (drawn == 2).float().mean() > 0.95 and not bool((drawn == 0).any())


def test_same_generator_same_perturbations() -> None:
    net, x, y = planted()
    results = []
    for _ in range(2):
        torch.rand(3)
        found = Perturbations.of(x, 3, torch.Generator().manual_seed(4))
        for _ in range(3):
            found.improve(net, Task(), (x, y), found.draw(y, 1.0))
        results.append(found.store.values)
    assert torch.equal(*results)


def test_what_can_be_perturbed() -> None:
    assert perturbable(Task(), (torch.rand(2, 3), torch.zeros(2)))
    assert not perturbable(Task(), (torch.ones(2, 3, dtype=torch.long), torch.zeros(2)))
    assert not perturbable(Task(), {"text": "none"})


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that is made, but for views of those that were there."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.there, self.largest = {t.untyped_storage().data_ptr() for t in there}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = [t for t in made if t.untyped_storage().data_ptr() not in self.there]
        self.largest = max([self.largest, *(t.nbytes for t in made)])
        return out


def many(classes: int = 1000) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net on many classes, and a batch of eight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9 * 9, classes)).eval()
    return net, torch.rand(8, 3, 20, 20), torch.arange(8)


@pytest.mark.parametrize("large", [False, True])
def test_a_step_touches_and_allocates_the_rows_of_its_classes_only(large: bool, monkeypatch: Any) -> None:
    if large:
        monkeypatch.setattr(store, "LARGE_BYTES", 0)
    net, x, y = many()
    found = Perturbations.of(x, 1000, torch.Generator().manual_seed(1))
    assert found.store.values.nbytes == 1000 * x[0].numel() * (2 if large else 4)
    before = found.store.values.clone()
    c = torch.tensor([5, 5, 5, 17, 99, 500, 501, 999])
    with Sizes(found.store.values, *net.parameters()) as sizes:
        found.improve(net, Task(), (x, y), c)
    changed = (found.store.values != before).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [5, 17, 99, 500, 501, 999]
    assert 0 < sizes.largest <= x.nbytes, "as much as one batch at a time, never all classes"


def test_noise_for_many_classes_is_drawn_without_the_whole_in_float32(monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    x = 1e-3 * torch.rand(8, 3, 16, 16)  # so small that its perturbations would vanish in float16 as they are
    with Sizes() as sizes:
        found = Perturbations.of(x, 1000, torch.Generator().manual_seed(1))
    assert sizes.largest == 1000 * x[0].numel() * 2
    norms = found.store.rows(torch.arange(1000)).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((1000,), 1e-3 * found.radius), rtol=0.02, atol=0)


def as_before(delta: Tensor, gradient: Tensor, c: Tensor, radius: float) -> None:
    """The step that renormalises every class, whichever were drawn."""
    total = torch.zeros_like(delta).index_add_(0, c, gradient)
    delta -= 0.3 * radius * total / store.row_norms(total).clamp_min(1e-20)
    delta *= (radius / store.row_norms(delta).clamp_min(1e-20)).clamp(max=1)


def test_the_bits_are_those_of_renormalising_every_class_in_every_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 6, 6, generator=generator)
    found = Perturbations.of(x, 40, torch.Generator().manual_seed(1))
    delta, left = found.store.values.clone(), 0
    for step in range(200):
        c = torch.randint(0, 40, (8,), generator=generator)
        gradient = torch.randn(x.shape, generator=generator)
        as_before(delta, gradient, c, found.radius)
        left += len(found.outside)
        sums = found.sums(c)
        for part in gradient.split(5):  # as parts of a batch add to it
            sums.add(part)
        found.move(sums, 0.3)
        assert torch.equal(found.store.values, delta), step
        if step % 10 == 9:
            found.grow(1.1)
    assert left, "no row was left outside by rounding: this tests nothing"


def test_halves_find_the_same_shortcut_within_the_same_bound(monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    test_the_planted_class_is_the_easiest_to_reach_and_bounds_hold()


def test_a_large_batch_goes_through_the_model_in_parts_and_gives_the_same_step(monkeypatch: Any) -> None:
    net, x, y = many(50)
    c, results, sizes = torch.arange(8) + 10, [], []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for most in (universal.PASS_BYTES, 3 * x[0].nbytes):
        monkeypatch.setattr(universal, "PASS_BYTES", most)
        found = Perturbations.of(x, 50, torch.Generator().manual_seed(1))
        share = found.improve(net, Task(), (x, y), c)
        results.append((found.store.values, found.success, share))
    assert sizes == [8, 3, 3, 2]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_search_holds_no_more_clean_inputs_than_its_budget(monkeypatch: Any) -> None:
    net, x, y = many(4)
    run = make_run(WFIPConfig(), net)
    run.clean.batch_size = 2
    looked = []
    of = Perturbations.of
    monkeypatch.setattr(searching, "MOST_BYTES", 3)
    monkeypatch.setattr(searching, "ROUNDS", 0)
    monkeypatch.setattr(Perturbations, "of", lambda x, *args, **more: looked.append(len(x)) or of(x, *args, **more))
    searching.search(run, run.endless(), 1.0)
    assert looked == [2]
