"""`method="auto"`: which method is taken, from the number of clean samples, however they are passed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import fastfip
from fastfip.data.stores import count_of, first_of
from fastfip.data.task import Task
from fastfip.errors import ModelError
from fastfip.purification.door import by_data
from fastfip.testing.nets import PointNet
from tests.support.small_nets import conv_net, data

pytestmark = pytest.mark.usefixtures("short_search")

FORMS = [
    lambda x, y: (x, y),
    lambda x, y: {"x": x, "label": y},
    lambda x, y: x,
    lambda x, y: TensorDataset(x, y),
    lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
    lambda x, y: list(zip(x.split(7), y.split(7))),
    lambda x, y: [{"x": a, "label": b} for a, b in zip(x.split(7), y.split(7))],
]


@pytest.mark.parametrize("make", FORMS)
def test_the_samples_are_counted_without_reading_them(make: Any) -> None:
    assert count_of(make(*data(30))) == 30


#: How many samples each form gives of 30 where 5 are asked for: one batch is given whole, batches of 7 are as well.
GIVEN = (30, 30, 30, 5, 5, 7, 7)


@pytest.mark.parametrize("make, expected", zip(FORMS, GIVEN, strict=True))
def test_the_samples_that_are_looked_at_are_some_of_those_that_were_given(make: Any, expected: int) -> None:
    x, y = data(30)
    found = first_of(make(x, y), 5)
    values = list(found.values()) if isinstance(found, dict) else [found] if isinstance(found, torch.Tensor) else found
    which = [0, 7, 14, 22, 29] if expected == 5 else list(range(expected))
    for value, given in zip(values, (x, y)):
        assert torch.equal(value, given[which])


def test_single_samples_are_joined_and_what_a_sampler_leaves_out_is_not_read() -> None:
    x, y = data(30)
    assert torch.equal(first_of(list(zip(x.split(1), y.split(1))), 5)[0], x[:5])

    class Spoiled(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            assert 10 <= i < 25
            return super().__getitem__(i)

    found = first_of(DataLoader(Spoiled(x, y), batch_size=4, sampler=SubsetRandomSampler(range(10, 25))), 5)
    assert len(found[1]) == 5 and all(any(torch.equal(a, b) for b in x[10:25]) for a in found[0])


class Series(nn.Module):
    """Takes [N, P, 3] as a cloud does, in an order that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(96, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("make", FORMS)
def test_few_point_clouds_take_fisher_steps_and_series_do_not(make: Any) -> None:
    torch.manual_seed(0)
    given, y = torch.randn(30, 32, 3), torch.randint(10, (30,))
    for model, expected in ((PointNet(10, widths=(8, 8), hidden=8), "fisher_steps"), (Series(), "fast_wfip")):
        before, mode, state = copy.deepcopy(model.state_dict()), model.training, torch.get_rng_state()
        assert by_data(model, make(given, y), Task.of(), 0) == expected
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training == mode and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("how", ["bfloat16", "weight_norm", "compiled", "inference"])
def test_clouds_are_told_of_models_as_the_run_takes_them(how: str) -> None:
    torch.manual_seed(0)
    model: Any = PointNet(10, widths=(8, 8), hidden=8)
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    elif how == "weight_norm":
        torch.nn.utils.weight_norm(next(m for m in model.modules() if isinstance(m, nn.Linear)))
    elif how == "compiled":
        model = torch.compile(model)
    clouds = torch.randn(30, 32, 3), torch.randint(10, (30,))
    with torch.inference_mode(how == "inference"):
        assert by_data(model, clouds, Task.of(), 0) == "fisher_steps"
    assert seen == [8, 8], "a few of one batch, twice"


def test_what_is_no_model_and_data_that_raise_are_left_to_who_names_them() -> None:
    class Raises(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            raise OSError("gone")

    x, y = torch.randn(30, 32, 3), torch.randint(10, (30,))
    assert by_data(PointNet(10, widths=(8, 8), hidden=8), Raises(x, y), Task.of(), 0) == "fast_wfip"
    for wrong in (None, len):
        with pytest.raises(ModelError):
            fastfip.purify(wrong, (x, y), progress=False)  # type: ignore[arg-type]


def test_few_clouds_are_purified_by_fisher_steps_without_a_word_of_too_few() -> None:
    torch.manual_seed(0)
    clouds = torch.randn(30, 32, 3), torch.randint(10, (30,))
    result = fastfip.purify(PointNet(10, widths=(8, 8), hidden=8), clouds, steps=2, force=True, progress=False)
    assert result.method == "fisher_steps" and not any("fast_wfip" in note for note in result.notes)


def test_what_cannot_be_counted_is_many() -> None:
    x, y = data(30)
    sampler = SubsetRandomSampler(range(12))
    assert count_of(DataLoader(TensorDataset(x, y), batch_size=5, sampler=sampler)) == 12
    assert count_of(iter([(x, y)])) is None and count_of([]) is None and count_of(3) is None


def _taken(n: int, **options: Any) -> str:
    torch.manual_seed(0)
    return fastfip.purify(conv_net(), data(n), steps=2, force=True, progress=False, **options).method


def test_counting_draws_nothing() -> None:
    x, y = data(30)
    state = torch.get_rng_state()
    count_of(DataLoader(TensorDataset(x, y), batch_size=5, sampler=SubsetRandomSampler(range(12))))
    assert torch.equal(state, torch.get_rng_state())


def test_a_config_says_which_method_it_is_of_and_a_choice_is_said() -> None:
    few = fastfip.methods.get("fast_wfip").Config(steps=2)
    assert fastfip.purify(conv_net(), data(300), config=few, force=True, progress=False).method == "fast_wfip"
    said = "fast_wfip was taken for fewer than 200 clean samples"
    for n, expected in ((30, True), (300, False)):
        result = fastfip.purify(conv_net(), data(n), steps=2, force=True, progress=False)
        assert any(said in note for note in result.notes) == expected


def test_a_loss_of_ones_own_takes_fisher_steps_at_any_number() -> None:
    loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1], reduction="none")  # noqa: E731
    assert _taken(30, loss=loss) == "fisher_steps" and _taken(30) == "fast_wfip"
    few = fastfip.methods.get("fast_wfip").Config(steps=2)
    result = fastfip.purify(conv_net(), data(30), config=few, loss=loss, force=True, progress=False)
    assert result.method == "fast_wfip"  # a config says which method it is of


def test_few_samples_take_fast_wfip_unless_there_are_settings() -> None:
    assert _taken(199) == "fast_wfip" and _taken(200) == "fisher_steps"
    assert _taken(30, batch_size=8) == "fisher_steps" and _taken(30, config={"back": 0.0}) == "fisher_steps"
    assert fastfip.purify(conv_net(), iter([data(30)]), steps=2, force=True, progress=False).method == "fisher_steps"
