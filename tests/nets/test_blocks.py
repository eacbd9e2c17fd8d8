"""Checkpointed blocks: which are found, that they keep less, and that nothing is left of it afterwards."""

import copy
import pickle
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from fastfip.nets.blocks import best_blocks, checkpointed
from fastfip.nets.counting import tensor_peak
from fastfip.nets.process import computed_again_alike

CPU = torch.device("cpu")


class Tower(nn.Module):
    """A stem and stages of blocks, each with a wide middle; the first stage is used twice."""

    def __init__(self, stages: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(depth)))
            for _ in range(stages)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in [*self.stages, self.stages[0]]:
            x = stage(x)
        return self.head(x)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [*model.parameters()]))


def test_the_blocks_found_are_those_that_keep_least_and_the_count_is_right():
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(1000, 8)
    saving = best_blocks(model, lambda: model(x))
    assert list(saving.blocks) == [block for stage in model.stages for block in stage]  # not the stages
    # Of each block the tanh of its middle is kept, 64 numbers, and its input, which is the output of the one before.
    assert saving.plain == 4 * 1000 * (8 + 8 * (16 + 64) + 16)
    assert saving.peak == 4 * 1000 * (8 + 8 * 16 + 16 + 16 + 64)
    plain = tensor_peak(lambda: gradients(model, x), CPU)
    with checkpointed(saving.blocks):
        assert tensor_peak(lambda: gradients(model, x), CPU) < plain / 2


def test_the_look_for_them_keeps_nothing():
    model, kept = Tower(), []
    for module in model.modules():
        if isinstance(module, nn.Tanh):  # keeps its output for its backward pass
            module.register_forward_hook(lambda m, given, out: kept.append(weakref.ref(out)))
    best_blocks(model, lambda: model(torch.randn(4, 8)))
    assert len(kept) == 8 and not any(one() is not None for one in kept)


def test_nothing_is_found_where_nothing_would_be_saved():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert best_blocks(model, lambda: model(torch.randn(5, 8))).blocks == ()


def test_gradients_hooks_names_and_copies_are_those_without():
    torch.manual_seed(0)
    model, x = Tower(1, 2), torch.randn(5, 8)
    right, keys, kinds = gradients(model, x), list(model.state_dict()), [type(m) for m in model.modules()]
    outside, inside = [], []
    blocks = tuple(model.stages[0])
    blocks[0].register_forward_hook(lambda *_: outside.append(1))
    blocks[0][0].register_forward_hook(lambda *_: inside.append(1))
    with checkpointed(blocks):
        assert list(model.state_dict()) == keys and isinstance(blocks[0], nn.Sequential)
        torch.testing.assert_close(gradients(model, x), right, rtol=0, atol=0)
        assert (len(outside), len(inside)) == (2, 4)  # used twice; what is inside runs again in the backward pass
        twin = copy.deepcopy(model)
        assert [type(m) for m in twin.modules()] == kinds
        with torch.no_grad():
            model(x)
        assert (len(outside), len(inside)) == (4, 6)  # no graph, nothing to compute again
    assert [type(m) for m in model.modules()] == kinds
    with torch.no_grad():
        twin.stages[0][0][0].weight.zero_()
    torch.testing.assert_close(gradients(model, x), right, rtol=0, atol=0)  # a copy computes with its own weights
    assert not torch.equal(twin(x), model(x))


def test_classes_are_the_models_own_again_after_an_error():
    model = Tower()
    with pytest.raises(KeyError), checkpointed(tuple(model.stages)):
        raise KeyError
    assert {type(stage) for stage in model.stages} == {nn.Sequential}


def test_what_is_pickled_meanwhile_is_of_the_models_own_classes() -> None:
    model, x = Tower(), torch.randn(3, 8)
    with checkpointed(tuple(model.stages)):
        loaded = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


class Registered(nn.Sequential):
    """A class that is told of those below it, and asks each for its kind."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, kind: str) -> None:
        cls.known.append(kind)


def test_classes_are_not_told_of_those_that_take_their_place() -> None:
    model = nn.Sequential(Registered(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    right = gradients(model, x)
    with checkpointed((model[0],)):
        assert isinstance(model[0], Registered) and type(model[0]) is not Registered
        torch.testing.assert_close(gradients(model, x), right, rtol=0, atol=0)
    assert type(model[0]) is Registered and Registered.known == []


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean((2, 3)))


def test_batchnorm_counts_a_batch_once_dropout_draws_the_same_and_modes_are_those_of_the_first_time():
    x = torch.randn(6, 2, 5, 5)
    results = []
    for blocks in (False, True):
        model = Noisy().train()
        torch.manual_seed(1)
        with computed_again_alike(model), checkpointed((model.block,) if blocks else ()):
            out = model(x)
            model.eval()  # in the backward pass other modes hold
            out.square().sum().backward()
            assert not model.block[1].training
        results.append(([p.grad for p in model.parameters()], [*model.buffers()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
