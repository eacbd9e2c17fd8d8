"""Models that keep in eval mode what they computed of their weights: purified as if they kept nothing."""

import pytest
import torch

import fastfip
from tests.support.small_nets import BiasedAttention, same, values

pytestmark = pytest.mark.usefixtures("short_search")

METHODS = ["fine_tune", "fip", "ft_sam", "sau", "i_bau", "wfip", "fast_wfip"]


def setting():
    torch.manual_seed(0)
    model, plain = BiasedAttention().eval(), BiasedAttention(keeps=False).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(24, 5, 4)
    return model, plain, (x, torch.arange(24) % 3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_weights_figures_and_answers_are_those_of_a_model_that_keeps_nothing(method, inplace):
    model, plain, (x, y) = setting()
    with torch.no_grad():
        model(x)
    before, kept = values(model), dict(model.attention_bias_cache)
    options = {
        "steps": 3,
        "progress": False,
        "force": True,
        "test_loader": [(x, y)],
        "measure": ("acc", "fisher_trace"),
    }
    want = fastfip.purify(plain, (x, y), method, **options)
    got = fastfip.purify(model, (x, y), method, inplace=inplace, **options)
    assert same(values(got.model), values(want.model))
    assert (got.coverage, got.before, got.after) == (want.coverage, want.before, want.after)
    with torch.no_grad():
        assert torch.equal(got.model(x), want.model(x))
    assert not any(module._forward_pre_hooks for module in got.model.modules())
    if not inplace:
        assert same(values(model), before) and list(kept) == list(model.attention_bias_cache)
        assert all(model.attention_bias_cache[key] is kept[key] for key in kept)


@pytest.mark.parametrize("method", ["fine_tune", "fip", "ft_sam"])
def test_what_is_kept_of_a_parameter_does_not_keep_it_from_being_tuned(method):
    model, _, data = setting()
    result = fastfip.purify(model, data, method, steps=3, progress=False, force=True)
    assert "attention_biases" in result.coverage.tuned


def test_calls_of_a_part_compute_it_anew_as_well():
    model, plain, (x, y) = setting()
    options = {"steps": 3, "progress": False, "force": True, "forward": lambda model, batch: model[0](batch[0])}
    results = [
        fastfip.purify(torch.nn.Sequential(net).eval(), (x, y), "fine_tune", **options) for net in (model, plain)
    ]
    assert same(*(values(result.model) for result in results))
