"""docs/scale.md is what the cost model says, and the cost model is the package's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import scale_doc
from benchmarks.purification import bench_memory
from fastfip.methods import get


def test_the_page_is_up_to_date():
    text = scale_doc.FILE.read_text(encoding="utf-8")
    assert scale_doc.page(text) == text, "python -m benchmarks.scale_doc"


def test_models_have_the_sizes_that_they_are_named_for():
    sizes = {}
    for large in scale_doc.MODELS:
        with torch.device("meta"):
            sizes[large.name.split()[0]] = sum(p.numel() for p in large.make().parameters())
    assert sizes == {
        "ViT-H/14": pytest.approx(632e6, rel=0.01), "7B": pytest.approx(6.74e9, rel=0.01),
        "70B": pytest.approx(68.98e9, rel=0.01),
    }  # fmt: skip


def test_spectral_methods_send_thousands_of_numbers_where_others_send_all():
    large = scale_doc.MODELS[0]
    with torch.device("meta"):
        model = large.make()
    everything = sum(p.numel() for p in model.parameters())
    assert scale_doc.traffic("fisher_steps", model, None) == everything
    assert scale_doc.traffic("fast_wfip", model, 64) < scale_doc.traffic("fast_wfip", model, None) < everything / 500


def test_terms_that_the_table_adds_up_are_those_of_a_run():
    large = scale_doc.MODELS[0]
    with torch.device("meta"):
        model = large.make()
    terms, numbers = scale_doc.memory(large, "fisher_steps", None, model)
    assert (
        terms.copies == 4 * numbers
        and terms.optimiser == 3 * 4 * numbers
        and terms.step == 2 * 4 * numbers
        and terms.factors == 0
    )
    spectral, _ = scale_doc.memory(large, "fast_wfip", None, model)
    assert spectral.copies == 0 and spectral.factors > numbers * 4 > 100 * spectral.optimiser
    assert get("fisher_steps").lends_weights is False


def test_a_case_is_measured_and_foretold(monkeypatch):
    def small() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.GELU(), nn.Linear(128, 10))

    monkeypatch.setitem(bench_memory.MAKE, "small", (small, 8))
    size, peak, expected = bench_memory.measure_here("small", "fine_tune", 2)
    numbers = 193 * 128 + 129 * 10
    assert size == 4 * numbers and peak >= 0
    assert 5 * size < expected < 6 * size  # the copy, four buffers, and a pass of two samples
    assert bench_memory.measure_here("small", "adam", 2)[2] == 0


def test_tables_show_every_row_once():
    cases, budgets = bench_memory.tables()
    rows = bench_memory.RESULTS.read()
    assert len(cases.splitlines()) + len(budgets.splitlines()) == len(rows) + 4
