"""Batches that go through the model in parts: the same steps, less memory."""

import copy

import pytest
import torch
from torch import nn

import fastfip
from fastfip.errors import ConfigError
from fastfip.methods import get
from fastfip.methods._space import Spectral
from fastfip.methods.base import Method
from tests.support.small_nets import pretrained_for

pytestmark = pytest.mark.usefixtures("short_search")

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4


def small_net(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 96),
        nn.GELU(),
    ]
    return nn.Sequential(*layers[: 1 if not norm else 2], *layers[2:], nn.Linear(96, 4)).eval()


def purified(method: str, model: nn.Module | None = None, **options) -> fastfip.PurifyResult:
    model = small_net() if model is None else model
    options |= pretrained_for(method, model)
    return fastfip.purify(model, (X, Y), method, steps=5, batch_size=8, force=True, progress=False, **options)


def distance(a: fastfip.PurifyResult, b: fastfip.PurifyResult) -> float:
    pairs = [(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()) if p.is_floating_point()]
    return max(float((p - q).norm() / (q.norm() + 1e-12)) for p, q in pairs)


@pytest.mark.parametrize("method", ["fine_tune", "super_fine_tune", "wfip", "fast_wfip", "fisher_steps", "fine_mixing"])
@pytest.mark.parametrize("together", [1, 3])
def test_parts_of_a_batch_make_the_step_of_the_whole(method, together):
    options = {"bn_mode": "eval"}
    if method in (
        "fast_wfip",
        "fine_mixing",
    ):  # Adam's first steps are the signs of gradients, those of rounding included
        options |= {"optimizer": "sgd", "lr": 0.01}
    whole, parts = purified(method, **options), purified(method, micro_batch=together, **options)
    assert distance(parts, whole) < 1e-5
    assert distance(whole, purified(method, seed=1, **options)) > 1e-4
    assert parts.settings["micro_batch"] == together and whole.settings["micro_batch"] is None
    shown = [record["loss"] for record in whole.history]
    assert [record["loss"] for record in parts.history] == pytest.approx(shown, rel=1e-4)


def test_the_fisher_diagonal_is_the_same_in_parts(monkeypatch):
    """That of biases and norms as well, of labels that are drawn from the model."""
    found = []
    plain = Spectral.diagonal
    monkeypatch.setattr(Spectral, "diagonal", lambda *args: found.append(plain(*args)) or found[-1])
    for together in (None, 2):
        purified("fast_wfip", micro_batch=together, bn_mode="eval")
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-8)
    assert len(found[0]) > 3  # three weights, and what lies beside them


def test_no_more_samples_than_asked_for_go_through_the_model_together():
    for method in ("fine_tune", "fast_wfip", "fisher_steps"):
        model, sizes = small_net(), []
        model.register_forward_pre_hook(lambda module, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        purified(method, model, bn_mode="eval", micro_batch=3, test_loader=[(X, Y)], inplace=True)
        assert max(sizes) == 3, method


def test_batchnorm_in_train_mode_is_spoken_of_and_never_sees_one_sample_alone():
    result = purified("fine_tune", micro_batch=1)
    assert any("takes its statistics from each part" in note for note in result.notes)
    assert not any("each part" in note for note in purified("fine_tune", micro_batch=1, bn_mode="eval").notes)
    assert not any("each part" in note for note in purified("fine_tune").notes)


def test_methods_whose_step_is_no_sum_over_samples_refuse():
    for method in ("i_bau", "sau"):
        with pytest.raises(ConfigError, match="no sum over samples"):
            purified(method, micro_batch=2)
        assert get(method).backward is not Method.backward


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "4"])
def test_a_micro_batch_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="micro_batch"):
        purified("fine_tune", micro_batch=wrong)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", ["fast_wfip", "fast_fip"])
def test_weights_that_are_shared_meanwhile_are_nobody_elses_afterwards(method, inplace):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 400), nn.GELU(), nn.Linear(400, 400), nn.GELU(), nn.Linear(400, 4)
    )
    model[3].requires_grad_(False)  # one that is not tuned: its memory is shared to the end
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    result = purified(method, model, inplace=inplace)
    assert [p.data_ptr() for p in model.parameters()] == places
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert ("1.weight" in changed) == inplace and "3.weight" not in changed
    assert "1.weight" in result.coverage.tuned
    if not inplace:
        assert not {p.data_ptr() for p in result.model.parameters()} & set(places)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_in_the_middle_leaves_shared_weights_as_they_were(inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.GELU(), nn.Linear(400, 4)).eval()
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]

    def fail(run, record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        purified("fast_wfip", model, inplace=inplace, callbacks=[fail])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places


class Words(nn.Module):
    """Token ids [N, T] to logits [N, 2], by the mean of their vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(torch.relu(self.table(ids)).mean(1))


@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip", "wfip"])
def test_the_worst_case_of_tokens_is_looked_for_in_parts_as_well(method):
    ids = torch.randint(1, 30, (40, 6), generator=torch.Generator().manual_seed(1))
    data = [(ids, ids[:, 0] % 2)]
    result = fastfip.purify(Words(), data, method, steps=2, micro_batch=8, progress=False, force=True)
    assert not any("ONLY FINE-TUNED" in alert for alert in result.alerts)


def test_a_softmax_in_the_model_is_looked_through_in_parts_as_well():
    x = torch.rand(40, 5, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.Softmax(1))
    data = [(x, x[:, :3].argmax(1))]
    whole, parts = (
        fastfip.purify(net, data, "fine_tune", steps=3, micro_batch=m, progress=False, force=True) for m in (None, 8)
    )
    assert [n for n in whole.notes if "softmax" in n] == [n for n in parts.notes if "softmax" in n] != []
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value)
