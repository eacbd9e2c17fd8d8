"""`purify` without data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastfip
from fastfip.errors import ConfigError, DataError, FastFIPError


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def test_a_network_with_batchnorm_is_purified_with_drawn_images() -> None:
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fastfip.purify(model, None, "fisher_steps", input_shape=(3, 16, 16), steps=3, unlearn=0.0, progress=False)
    assert result.settings["config"]["back"] == 0.0 and result.settings["config"]["steps"] == 3
    assert result.method == "fisher_steps" and result.settings["clean_samples"] == 1500
    assert result.alerts[0].startswith("WITHOUT DATA, 1500 drawn images 3x16x16")
    assert "WITHOUT DATA" in str(result).splitlines()[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(result.model[0].weight, model[0].weight)
    # The images are those of the public function with the same seed, and the settings those of no data.
    x, y = fastfip.stand_in_images(model, (3, 16, 16))
    same = fastfip.purify(model, (x, y), steps=3, unlearn=0.0, back=0.0, progress=False)
    assert torch.equal(result.model[0].weight, same.model[0].weight)


def test_the_shape_is_found_out_where_it_can_be() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    result = fastfip.purify(flat, progress=False)
    assert result.method == "clp" and "drawn images 1x28x28" in result.alerts[0]


def test_an_unknown_shape_is_one_line_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"give input_shape=, e\.g\. purify\(model, input_shape=\(3, 32, 32\)\)"
    ) as error:
        fastfip.purify(_model())
    assert "\n" not in str(error.value)


def test_without_batchnorm_there_is_one_line_with_the_remedy() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4 * 24 * 24, 3))
    for shape in (None, (1, 28, 28)):
        with pytest.raises(DataError, match=r"no BatchNorm.*give clean_loader=.*tensors \(x, y\)") as error:
            fastfip.purify(net, input_shape=shape)
        assert "\n" not in str(error.value)


def test_a_shape_beside_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="input_shape="):
        fastfip.purify(_model(), (torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])), input_shape=(3, 16, 16))


def test_what_is_no_model_is_refused_in_one_line() -> None:
    for thing in ("abc", _model().state_dict()):
        with pytest.raises(FastFIPError) as error:
            fastfip.purify(thing)
        assert "\n" not in str(error.value)


def test_one_logit_has_two_answers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    result = fastfip.purify(net, input_shape=(3, 8, 8), progress=False, force=True)
    assert result.method == "clp" and result.settings["clean_samples"] == 64


def test_outputs_of_another_form_are_not_taken_for_a_wrong_shape() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def forward(self, x: torch.Tensor) -> tuple[str, torch.Tensor]:
            return "logits", self.net(x)

    with pytest.raises(FastFIPError) as error:
        fastfip.purify(Two(), input_shape=(3, 8, 8))
    assert "input_shape=" not in str(error.value)
