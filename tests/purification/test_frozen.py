"""What a user froze stays as it is, to the bit, where it is a part; a model that is frozen altogether is purified."""

import copy

import pytest
import torch
from torch import nn

import fastfip
from fastfip import methods
from fastfip.errors import ConfigError, ModelError
from tests.support.small_nets import CLASSES, conv_net, data, same, settings_of, values


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", methods.names())
def test_a_frozen_part_stays_to_the_bit_its_statistics_too(method, inplace):
    model = net()
    for part in (model[0], model[1], model[3].bias):
        part.requires_grad_(False)
    before = values(model)
    result = fastfip.purify(
        model, data(24), method, steps=3, inplace=inplace, progress=False, **settings_of(method, model)
    )
    after = result.state_dict()
    still = [name for name in before if name.startswith(("0.", "1.")) or name == "3.bias"]
    assert len(still) == 8 and all(torch.equal(before[name], after[name]) for name in still)
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in still)
    assert {"0.weight", "0.bias", "1.weight", "3.bias"} <= set(result.coverage.left)
    assert all("frozen" in result.coverage.left[name] for name in ("0.weight", "1.bias", "3.bias"))
    assert [p.requires_grad for p in result.model.parameters()][:4] == [False] * 4


@pytest.mark.parametrize("method", ["fine_tune", "fast_wfip", "anp"])
def test_frozen_tune_tunes_it_as_any_other(method):
    model = net()
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    a = fastfip.purify(frozen, data(24), method, steps=3, frozen="tune", progress=False)
    b = fastfip.purify(model, data(24), method, steps=3, progress=False)
    assert same(a.state_dict(), b.state_dict())
    with pytest.raises(ConfigError, match="'keep' or 'tune'"):
        fastfip.purify(model, data(24), method, frozen=True)


def test_a_frozen_classifier_is_refused_where_the_classifier_is_what_is_tuned():
    model = net()
    model[10].requires_grad_(False)
    for method in ("ngf", "fst", "d3"):
        with pytest.raises(ModelError, match="the classifier is frozen.*frozen='tune'"):
            fastfip.purify(model, data(24), method, steps=1, progress=False)


def test_a_frozen_batchnorm_stays_in_eval_mode():
    model = conv_net()
    model[1].requires_grad_(False)
    seen = []

    def look(run, record):
        seen.append(run.model[1].training)

    fastfip.purify(model, data(24), "fine_tune", epochs=1, callbacks=[look], progress=False)
    model[1].requires_grad_(True)
    fastfip.purify(model, data(24), "fine_tune", epochs=1, callbacks=[look], progress=False)
    assert seen[0] is False


class Adapter(nn.Linear):
    """A low-rank update beside a frozen weight, as LoRA has it."""

    def __init__(self, base, rank=2):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("method", ["fine_tune", "wfip", "fast_wfip", "fip", "sau"])
def test_of_a_model_with_adapters_only_the_adapters_move(method):
    model = net().requires_grad_(False)
    model[8], model[10] = Adapter(model[8]), Adapter(model[10])
    before = values(model)
    result = fastfip.purify(model, data(24), method, steps=3, progress=False)
    changed = {name for name, value in result.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora" in name for name in changed)


def test_what_saving_an_adapter_would_lose_is_refused():
    model = net().requires_grad_(False)
    model.peft_config = {"default": object()}
    with pytest.raises(ModelError, match=r"is_trainable=True.*merge_and_unload"):
        fastfip.purify(model, data(24), "fine_tune", steps=1, progress=False)
    model[8] = Adapter(model[8])
    assert fastfip.purify(model, data(24), "fine_tune", steps=1, progress=False).coverage.tuned
    with pytest.raises(ModelError, match="merge_and_unload"):
        fastfip.purify(model, data(24), "fine_tune", steps=1, frozen="tune", progress=False)
