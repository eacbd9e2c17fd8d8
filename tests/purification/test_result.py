import json
import math
import sys

import pytest
import torch
from torch import nn

from fastfip.metrics import Evaluation
from fastfip.purification.result import PurifyResult


def result(**options):
    values = {
        "model": nn.Linear(2, 3),
        "method": "fine_tune",
        "before": Evaluation(acc=0.98, asr=1.0, ra=0.0, loss=0.1, fisher_trace=123.4),
        "after": Evaluation(acc=0.97, asr=0.02, ra=0.9, loss=0.2, fisher_trace=1.5),
        "history": [{"epoch": 1, "loss": 0.5, "score": 0.4}, {"epoch": 2, "loss": math.nan, "score": 0.3}],
        "seconds": {"fisher": 0.0, "train": 1.5, "evaluation": 0.25, "total": 2.0},
        "peak_memory": 300 * 2**20,
        "settings": {"clean_samples": 50, "best_epoch": 2, "config": {"lr": 0.1}},
        "versions": {"torch": "2.13"},
        "notes": ["a note"],
    }
    return PurifyResult(**{**values, **options})


def test_the_table():
    lines = str(result()).splitlines()
    assert lines[0] == "fine_tune on 50 clean samples"
    assert [line.split() for line in lines[1:7]] == [
        ["before", "after"],
        ["ACC", "98.00", "%", "97.00", "%"],
        ["ASR", "100.00", "%", "2.00", "%"],
        ["RA", "0.00", "%", "90.00", "%"],
        ["loss", "0.1", "0.2"],
        ["Tr(F)", "123.4", "1.5"],
    ]
    assert lines[7] == "DER 98.50 %, RIR 94.50 %"
    assert lines[8] == "2.00 s (train 1.50, evaluation 0.25), peak memory 300 MiB"
    assert lines[9] == "note: a note"


def test_what_was_not_measured_is_left_out():
    bare = result(before=Evaluation(acc=0.5), after=Evaluation(acc=0.5))
    assert "ASR" not in str(bare) and "DER" not in str(bare) and bare.der is None and bare.rir is None
    assert "before ACC 50.00 %" in repr(bare)


def test_json_is_strict_and_complete():
    found = json.loads(result().to_json())
    assert found["history"][1]["loss"] is None and found["before"]["asr"] == 1.0
    assert found["der"] == pytest.approx(0.985) and found["settings"]["config"]["lr"] == 0.1
    assert "model" not in found
    odd = result(settings={"path": torch.device("cpu"), "shape": (1, 2)})
    assert json.loads(odd.to_json())["settings"] == {"path": "cpu", "shape": [1, 2]}


def test_the_state_dict_is_the_models():
    one = result()
    assert list(one.state_dict()) == ["weight", "bias"]
    assert torch.equal(one.state_dict()["bias"], one.model.bias)


def test_rich_shows_the_same_table():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result())
    text = console.export_text()
    for word in ("fine_tune on 50 clean samples", "97.00 %", "DER 98.50 %", "note: a note"):
        assert word in text


def test_the_plot(tmp_path):
    figure = result().plot(tmp_path / "plot.png")
    course, bars = figure.axes
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert [line.get_ydata()[0] for line in course.lines[:2]] == [0.5, 0.4]
    assert [round(patch.get_height()) for patch in bars.patches] == [98, 100, 0, 97, 2, 90]
    assert result(history=[]).plot() is not None


def test_without_matplotlib_the_plot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result().plot()
