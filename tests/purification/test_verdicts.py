"""The first line of a result says where it is not what was asked for, and its last ones what was tuned."""

import json

import pytest
import torch
from torch import nn

import fastfip
from fastfip.errors import DataError
from fastfip.metrics.evaluation import Evaluation
from fastfip.reporting.table import evaluation_sheet
from tests.support.small_nets import CLASSES, OneHot, conv_net, data, loader, plain_net, same, values


def first_line(result):
    assert result.alerts and json.loads(result.to_json())["alerts"] == result.alerts
    return str(result).splitlines()[0]


@pytest.mark.parametrize("method", ["wfip", "fast_wfip"])
def test_where_nothing_is_unlearned_the_first_line_says_so(method):
    result = fastfip.purify(
        OneHot(9, CLASSES), (torch.randint(0, 9, (24, 5)), data(24)[1]), method, steps=2, progress=False
    )
    assert "ONLY FINE-TUNED, nothing was unlearned" in first_line(result) and "ONLY FINE-TUNED" in repr(result)
    plain = fastfip.purify(conv_net(), data(24), method, steps=2, progress=False)
    assert not plain.alerts and str(plain).splitlines()[0] == f"{method} on 24 clean samples"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_result_that_equals_its_input_says_so_first(inplace):
    model = plain_net()
    before = values(model)
    result = fastfip.purify(model, data(24), "fine_tune", steps=2, lr=1e-30, weight_decay=0.0, inplace=inplace)
    assert same(result.state_dict(), before) and result.unchanged and not result.diverged
    assert "THE MODEL IS AS IT WAS GIVEN" in first_line(result) and "larger lr" in first_line(result)
    assert not fastfip.purify(model, data(24), "fine_tune", steps=2).unchanged


def test_a_run_that_diverges_says_so_first_and_names_the_setting():
    def raise_lr(run, record):
        if record["epoch"] == 2:
            run.model[3].weight.data.mul_(1e9)

    result = fastfip.purify(plain_net(), loader(), "fine_tune", epochs=9, callbacks=[raise_lr], progress=False)
    assert result.diverged and len(result.history) == 2 and not result.unchanged
    assert "DIVERGED, stopped in epoch 3 of 9" in first_line(result) and "lower lr (now 0.01)" in first_line(result)


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_without_clean_samples_one_line_says_what_is_needed(arguments):
    for call in (fastfip.purify, fastfip.purify_):
        with pytest.raises(DataError, match=r"needs clean samples: give clean_loader=.*tensors \(x, y\)"):
            call(plain_net(), *arguments)


def test_a_share_of_few_samples_is_shown_with_its_interval():
    few, many = (Evaluation(acc=0.9, asr=0.0, ra=0.5, n=n, n_triggered=n) for n in (20, 200))
    assert few.shown("acc") == "90.00 % (69.9 to 97.2)" and few.shown("asr") == "0.00 % (0.0 to 16.1)"
    assert many.shown("acc") == "90.00 %" and many.shown("ra") == "50.00 %" and Evaluation().shown("acc") == "-"
    assert "90.00 % (69.9 to 97.2)" in str(few) and "(69.9 to 97.2)" in str(evaluation_sheet(few, ""))
    result = fastfip.purify(plain_net(), data(24), "fine_tune", steps=1, progress=False)
    assert "held-out clean samples" in result.after.on and result.after.shown("acc").count(" to ") == 1
    assert result.after.shown("acc") in str(result)


class Partly(nn.Module):
    """A layer that nothing calls and a count that is no real number, beside a classifier."""

    def __init__(self):
        super().__init__()
        self.net = plain_net()
        self.unused = nn.Linear(3, 3)
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)

    def forward(self, x):
        return self.net(x)


def test_the_result_says_what_was_tuned_and_why_the_rest_was_not():
    model = Partly()
    model.net[0].bias.requires_grad_(False)
    coverage = fastfip.purify(model, data(24), "fine_tune", steps=2, weight_decay=0.0, progress=False).coverage
    assert coverage.tuned == ("net.0.weight", "net.3.weight", "net.3.bias")
    assert "frozen" in coverage.left["net.0.bias"] and coverage.left["count"] == "no real numbers"
    assert "no gradient moved it" in coverage.left["unused.weight"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert coverage.numbers == sum(sizes.values()) and coverage.tuned_numbers == sum(sizes[n] for n in coverage.tuned)
    text = str(coverage)
    assert text.startswith("tuned 3 of 7 parameters (") and "net.0.bias (frozen" in text and "\n" not in text


def test_a_print_names_the_coverage():
    result = fastfip.purify(conv_net(), data(24), "fine_tune", steps=2, progress=False)
    assert "\ntuned 5 of 5 parameters (100.0 % of the numbers)" in str(result)
