"""What is passed to `purify` and cannot be used is one line, however late it comes, and the model stays as it was."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastfip
from fastfip.data import stores
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.methods import names
from tests.support.small_nets import settings_of

X, Y = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip


def batches(**late):
    """Four batches, of which the third has something changed."""
    out = [[X[i : i + 8].clone(), Y[i : i + 8].clone()] for i in range(0, 32, 8)]
    for place, value in late.items():
        out[2]["xy".index(place)] = value
    return out


class Listed(Dataset):
    """The samples of batches, one by one: a loader over them is live."""

    def __init__(self, batches):
        self.samples = [sample for x, y in batches for sample in zip(x, y)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


LATE = {
    "NaN": (
        {"x": torch.full((8, 3, 8, 8), torch.nan)},
        DataError,
        "batch 3 of the data: 8 of 8 samples hold NaN or Inf",
    ),
    "Inf": (
        {"x": torch.full((8, 3, 8, 8), torch.inf)},
        DataError,
        "batch 3 of the data: 8 of 8 samples hold NaN or Inf",
    ),
    "uint8": ({"x": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, DataError, "batch 3 of the data: images are uint8"),
    "floats for labels": ({"y": torch.rand(8)}, DataError, "batch 3 of the data: labels are float32"),
    "labels out of range": (
        {"y": Y[:8] + 3},
        DataError,
        r"labels run from 0 to 6, .* \(first in batch 3, at sample 2\)",
    ),
    "channels": ({"x": torch.rand(8, 1, 8, 8)}, ModelError, r"a batch of the clean data \(batch 3\)"),
    "size": ({"x": torch.rand(8, 3, 16, 16)}, ModelError, r"a batch of the clean data \(batch 3\)"),
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("what", LATE)
def test_a_fault_of_a_later_batch_is_one_line_with_its_number(what, live):
    change, error, said = LATE[what]
    data = batches(**change)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said) as found:
        fastfip.purify(model, DataLoader(Listed(data), batch_size=8) if live else data, steps=4, progress=False)
    assert "\n" not in str(found.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", [(1, 8, 8), (3, 16, 16)])
def test_test_data_that_the_model_does_not_take_is_one_line_with_the_batch(form):
    data = batches(x=torch.rand(8, *form))
    with pytest.raises(ModelError, match=r"the model fails on a batch of test_loader= \(batch 3\)") as found:
        fastfip.evaluate(net(), data)
    assert "\n" not in str(found.value)
    with pytest.raises(ModelError, match=r"a batch of asr_loader= \(batch 3\)"):
        fastfip.evaluate(net(), None, data)


def endless():
    while True:
        yield X, Y


def test_a_generator_without_an_end_is_one_line(monkeypatch):
    monkeypatch.setattr(stores, "MOST_BATCHES", 50)
    with pytest.raises(
        DataError, match="51 batches .* without reaching an end: pass fewer samples, a generator that ends"
    ):
        fastfip.purify(net(), endless(), steps=2, progress=False)
    with pytest.raises(DataError, match="without reaching an end"):
        fastfip.purify(net(), (X, Y), steps=2, test_loader=endless(), progress=False)
    monkeypatch.setattr(stores, "half_of_memory", lambda: 10 * X.nbytes)
    with pytest.raises(DataError, match="10 batches"):
        fastfip.purify(net(), endless(), steps=2, progress=False)
    monkeypatch.setattr("fastfip.data.task.MOST_SAMPLES", 100)
    with pytest.raises(DataError, match="the data gave 128 samples and no end"):
        fastfip.evaluate(net(), endless())


def test_images_that_require_a_gradient_are_detached():
    plain = fastfip.purify(net(), (X, Y), steps=8, progress=False)
    asking = X.clone().requires_grad_(True)
    for data in ((asking, Y), [(asking * 1, Y)], DataLoader(Listed([(asking * 1, Y)]), batch_size=128)):
        result = fastfip.purify(net(), data, steps=8, progress=False)
        assert asking.grad is None
        for one, other in zip(plain.model.parameters(), result.model.parameters()):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inplace", ["no", 0, 1, None])
def test_inplace_is_a_bool(inplace):
    model = net()
    before = model[0].weight.clone()
    with pytest.raises(ConfigError, match=f"inplace={inplace!r}: must be True or False"):
        fastfip.purify(model, (X, Y), inplace=inplace)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("short", [lambda losses: losses[:-1], lambda losses: losses.repeat(2)])
def test_losses_of_another_number_than_the_samples_are_refused(short):
    def loss(logits, batch):
        return short(nn.functional.cross_entropy(logits, batch[1], reduction="none"))

    with pytest.raises(DataError, match="losses for [0-9]+ samples: return one for each"):
        fastfip.purify(net(), (X, Y), "fine_tune", steps=2, loss=loss, progress=False)
    if len(short(torch.zeros(32))) % 32:  # the Fisher takes as many for each sample as for the others: tokens
        with pytest.raises(DataError, match="losses for 32 samples: return one for each"):
            fastfip.fisher_trace(net().eval(), (X, Y), loss=loss)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_running_statistics_that_are_not_finite_are_refused(name, value):
    model = net()
    getattr(model[1], name)[3] = value
    with pytest.raises(ModelError, match=f"1.{name} holds NaN or Inf"):
        fastfip.purify(model, (X, Y))


def test_a_mask_of_minus_infinity_is_no_broken_statistic():
    model = net()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    fastfip.purify(model, (X, Y), "fine_tune", steps=1, progress=False)


def test_seeds_of_numpy_are_taken_and_those_beyond_the_generators_refused():
    results = [
        fastfip.purify(net(), (X, Y), "fine_tune", steps=2, seed=seed, progress=False)
        for seed in (3, np.int64(3), np.uint8(3))
    ]
    for result in results[1:]:
        assert torch.equal(result.model[0].weight, results[0].model[0].weight)
        assert result.settings["seed"] == 3 and type(result.settings["seed"]) is int
    fastfip.purify(net(), (X, Y), "fine_tune", steps=1, seed=2**64 - 1, progress=False)
    for seed in (2**64, -1, 1.0, True, "1", None, np.float64(1)):
        with pytest.raises(ConfigError, match=r"must be a whole number from 0 to 2\*\*64 - 1"):
            fastfip.purify(net(), (X, Y), seed=seed)
        with pytest.raises(ConfigError, match="must be a whole number"):
            fastfip.audit(net(), (X, Y), seed=seed)


@pytest.mark.parametrize("method", [None, 3, nn.Linear, object()])
def test_what_is_no_method_is_one_line(method):
    with pytest.raises(
        ConfigError, match="give the name of a method, such as 'fisher_steps', 'auto', or a class of one"
    ):
        fastfip.purify(net(), (X, Y), method)


def test_no_callbacks_may_be_none():
    assert fastfip.purify(net(), (X, Y), "fine_tune", steps=1, callbacks=None, progress=False).model is not None


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", names())
def test_a_default_dtype_of_float64_changes_nothing(method, doubles):
    model = net().float()
    result = fastfip.purify(model, (X.float(), Y), method, progress=False, **short_of(method, model))
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_a_default_dtype_of_float64_changes_no_figure(doubles):
    model, data = net().float().eval(), (X.float(), Y)
    assert fastfip.audit(model, data, steps=3, purified=model, poisoned=data).received is not None
    doubled = (
        fastfip.fisher_trace(model, data),
        fastfip.fisher_diagonal(model, data).trace(),
        fastfip.evaluate(model, data),
    )
    torch.set_default_dtype(torch.float32)
    plain = (
        fastfip.fisher_trace(model, data),
        fastfip.fisher_diagonal(model, data).trace(),
        fastfip.evaluate(model, data),
    )
    assert [float(x.detach()) for x in doubled[:2]] == pytest.approx([float(x.detach()) for x in plain[:2]], rel=1e-5)
    assert doubled[2] == plain[2]


def short_of(method, model):
    """Settings that make a method short, and those that it needs."""
    from fastfip.methods import get

    short = {"steps": 4} if get(method).Config.STEPS is not None else {"epochs": 1}
    return {**short, **settings_of(method, model)}


@pytest.mark.parametrize("fails", [True, False])
def test_in_place_the_values_are_in_the_memory_where_they_were(fails):
    model = net()
    views = {name: value.flatten() for name, value in model.state_dict().items()}  # they share the memory
    before = {name: value.clone() for name, value in model.state_dict().items()}
    where = {name: value.data_ptr() for name, value in model.state_dict().items()}

    def stop(run, record):
        if fails:
            raise KeyError("mine")

    try:
        fastfip.purify(model, (X, Y), "fine_tune", epochs=1, inplace=True, callbacks=stop, progress=False)
    except KeyError:
        assert fails
    for name, value in model.state_dict().items():
        assert value.data_ptr() == where[name] and torch.equal(views[name], value.flatten()), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) == fails
