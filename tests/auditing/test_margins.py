"""`margins`: the largest margin of every class, exact where it is known, and a class that is too sure stands out."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import fastfip.auditing.margins as module
from fastfip.auditing.margins import SUSPICIOUS, margins
from fastfip.errors import ConfigError, DataError, ModelError
from tests.support.small_nets import conv_net, data, same


class Sure(nn.Module):
    """Logit c is a_c times the c-th pixel: over inputs in [0, 1] the largest margin of c is a_c."""

    def __init__(self, a: list[float]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x):
        return self.a * x.flatten(1)


def images(classes: int, n: int = 40):
    """Clean images whose range is [0, 1], and labels."""
    x = torch.rand(n, 1, 1, classes, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = 0, 1
    return x, torch.arange(n) % classes


A = [1.0, 1.1, 0.9, 4.0, 1.2, 0.8, 1.05, 0.95, 1.15, 0.85]


def test_margins_are_the_largest_there_are_and_the_score_is_index_times_logarithm():
    found = margins(Sure(A), [images(10)])
    assert all(0.9 * a <= margin <= a + 1e-5 for margin, a in zip(found.margin, A))
    log = torch.tensor(found.margin, dtype=torch.float64).log()
    median = log.quantile(0.5)
    spread = 1.4826 * (log - median).abs().quantile(0.5)
    apart = math.log(found.margin[3]) - float(median)
    assert found.ranking.classes[0] == 3
    assert found.score == pytest.approx(apart / float(spread) * apart, rel=1e-4)
    assert found.suspicious and found.score > SUSPICIOUS


def test_a_model_whose_classes_are_alike_is_not_suspicious():
    found = margins(Sure([1.0 if a == 4.0 else a for a in A]), [images(10)])
    assert not found.suspicious and 0 < found.score < SUSPICIOUS


@pytest.mark.parametrize("classes", [70, 21])
def test_many_classes_go_through_in_parts(classes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    a = [1 + 0.01 * c for c in range(classes)]
    a[17] = 3.0
    found = margins(Sure(a), [images(classes)])
    assert len(found.margin) == classes and found.ranking.classes[0] == 17
    assert all(margin <= bound + 1e-5 for margin, bound in zip(found.margin, a))
    assert found.settings["starts"] == module.FEW_STARTS


def test_units_of_the_inputs_do_not_matter():
    """Inputs a thousand times as large, weights as much smaller: the same search."""
    x, y = images(10)
    plain, wide = margins(Sure(A), [(x, y)]), margins(Sure([a / 1000 for a in A]), [(1000 * x, y)])
    assert wide.margin == pytest.approx(plain.margin, rel=1e-4)


def test_inputs_stay_in_the_range_of_the_clean_ones():
    seen = []

    class Watched(Sure):
        def forward(self, x):
            seen.append((float(x.detach().min()), float(x.detach().max())))
            return super().forward(x)

    margins(Watched(A), [images(10)])
    assert min(low for low, _ in seen) >= 0 and max(high for _, high in seen) <= 1


def test_the_model_is_left_alone_and_the_seed_decides():
    x, y = data(40)
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    first, second, other = (margins(net, [(x, y)], seed=seed) for seed in (3, 3, 4))
    assert same(before, net.state_dict()) and net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert first.margin == second.margin != other.margin


def test_probabilities_are_read_as_logits():
    x, y = images(10)
    net = nn.Sequential(Sure(A), nn.Softmax(dim=-1))
    found = margins(net, [(x, y)])
    assert found.margin == pytest.approx(margins(net[0], [(x, y)]).margin, rel=1e-4)
    assert any("softmax" in note for note in found.notes)


def test_it_says_what_it_found_and_where_it_cannot_tell():
    found = margins(Sure(A), [images(10)])
    said = str(found)
    assert "class 3 is first" in said and "suspicious" in said and "not a certificate" in said
    assert json.loads(json.dumps(found.to_dict()))["suspicious"] is True
    few = margins(Sure([1.0, 1.1, 9.0]), [images(3)])
    assert not few.suspicious and "too few to compare" in str(few)


class Blind(Sure):
    """Passes no gradient on."""

    def forward(self, x):
        return super().forward(x).detach()


def test_what_cannot_be_searched_is_refused():
    x, y = images(10)
    with pytest.raises(ModelError, match="passes none to them"):
        margins(Blind(A), [(x, y)])
    bad = x.clone()
    bad[3] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        margins(Sure(A), [(bad, y)])
    with pytest.raises(DataError, match="real numbers"):
        margins(nn.Sequential(nn.Embedding(5, 10), nn.Flatten()), [(torch.zeros(40, 1, dtype=torch.int64), y)])


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_a_number_of_samples_that_cannot_be_is_refused(samples):
    with pytest.raises(ConfigError, match="samples="):
        margins(nn.Linear(3, 5), [(torch.rand(4, 3), torch.arange(4))], samples=samples)
