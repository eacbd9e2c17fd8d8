"""`fastfip purify` says by its exit code that what it was given does not fit, or that there is no purified network."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastfip
from fastfip.cli import main
from fastfip.methods.fine_tune import FineTune

ARCH = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(108, 3))\n"
PURIFY = ["purify", "in.pth", "out.pth", "--arch", "outcome_arch:net", "--data", "data.npz", "--method", "fine_tune"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with an untrained network and images whose brightest channel is their class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "outcome_arch.py").write_text(ARCH)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).state_dict(), "in.pth")
    y = np.arange(60) % 3
    x = np.random.default_rng(0).integers(0, 100, (60, 6, 6, 3), dtype=np.uint8)
    for i, c in enumerate(y):
        x[i, :, :, c] += 120
    np.savez("data.npz", clean_x=x, clean_y=y)
    yield tmp_path
    sys.modules.pop("outcome_arch", None)


@pytest.mark.fit
def test_a_network_that_does_not_fit_is_refused_and_ignore_fit_goes_on(work, capsys):
    assert main(PURIFY) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "do not fit each other, check how images are scaled" in err
    assert not (work / "out.pth").exists()
    assert main([*PURIFY, "--steps", "1", "--ignore-fit"]) == 0 and (work / "out.pth").exists()
    assert "note: the received model" in capsys.readouterr().out
    compare = ["compare", *PURIFY[1:2], *PURIFY[3:7], "--methods", "fine_tune", "--set", "fine_tune.epochs=1"]
    assert main(compare) == 5 and "do not fit each other" in capsys.readouterr().err
    assert main([*compare, "--ignore-fit"]) == 0


def test_a_network_that_is_as_it_was_is_not_written(work, capsys):
    assert main([*PURIFY, "--steps", "1", "--set", "lr=1e-30", "--set", "weight_decay=0"]) == 7
    out, err = capsys.readouterr()
    assert "THE MODEL IS AS IT WAS GIVEN" in out.splitlines()[0] and err.count("\n") == 1
    assert "nothing was written" in err and not (work / "out.pth").exists()


def test_an_interrupted_network_that_is_as_it_was_is_said_not_to_be_written(work, capsys, monkeypatch):
    own = FineTune.backward

    def backward(self, run, batch):
        if run.epoch == 2:
            raise KeyboardInterrupt
        return own(self, run, batch)

    monkeypatch.setattr(FineTune, "backward", backward)
    assert main([*PURIFY, "--epochs", "9", "--set", "lr=1e-30", "--set", "weight_decay=0", "--ignore-fit"]) == 130
    out, err = capsys.readouterr()
    assert "THE MODEL IS AS IT WAS GIVEN" in out.splitlines()[0]
    assert err == "fastfip: interrupted while the model was as it was given: nothing was written\n"
    assert not (work / "out.pth").exists()


def test_a_run_that_diverged_is_written_and_ends_with_a_code_of_its_own(work, capsys, monkeypatch):
    own = FineTune.backward

    def backward(self, run, batch):
        values = own(self, run, batch)
        return {**values, "loss": 1e30} if run.epoch == 2 else values

    monkeypatch.setattr(FineTune, "backward", backward)
    assert main([*PURIFY, "--epochs", "9"]) == 7
    out, err = capsys.readouterr()
    assert "DIVERGED, stopped in epoch 2 of 9" in out.splitlines()[0] and "lower lr" in err
    assert "out.pth holds the last good state" in err and (work / "out.pth").exists()


@pytest.fixture
def before(work):
    """A file with the weights before fine-tuning, under the prefix of another wrapper."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    torch.save({"state_dict": {f"module.{name}": t for name, t in net.state_dict().items()}}, work / "before.pth")
    return net


def test_weights_before_fine_tuning_choose_the_method_that_takes_them(work, before, capsys):
    command = [*PURIFY[:-2], "--pretrained", "before.pth", "--ignore-fit", "--steps", "1"]
    assert main([*command, "--set", "lr=1e-12", "--set", "hold=0"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("fine_mixing on 60 clean samples")
        and "pretrained= has 100.0 % of the weights that are tuned" in out
    )
    written = torch.load("out.pth")
    assert all(torch.allclose(written[name], t) for name, t in before.state_dict().items())
    assert main([*command, "--method", "fine_tune", "--force"]) == 5
    assert "fine_tune does not ask for it" in capsys.readouterr().err
    assert main([*PURIFY[:-2], "--pretrained", "data.npz", "--ignore-fit", "--force"]) == 4
    assert "data.npz" in capsys.readouterr().err


def test_compare_runs_it_with_them_and_leaves_it_out_without(work, before, capsys, monkeypatch):
    pairs = [["fine_tune", "fine_mixing"], ["fine_tune"]]
    monkeypatch.setattr("fastfip.comparison.compare.names", lambda: ["fine_mixing", "fine_tune"])
    compare = ["compare", *PURIFY[1:2], *PURIFY[3:7], "--ignore-fit", "--set", "fine_tune.steps=1", "--json"]
    for more, methods in zip((["--pretrained", "before.pth"], []), pairs, strict=True):
        assert main([*compare, *more]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert sorted(row["method"] for row in rows if row["method"] != "none") == sorted(methods)
        assert not any(row["error"] for row in rows)
        names = {row["method"]: "pretrained" in row["config"] for row in rows}
        assert names.get("fine_mixing", True) and not names["fine_tune"]


def test_a_row_of_many_takes_them(work, before):
    row = {"checkpoint": "in.pth", "arch": "outcome_arch:net", "data": "data.npz", "ignore_fit": True, "steps": 1}
    result = fastfip.purify_many([{**row, "pretrained": "before.pth"}, {**row, "method": "fine_tune"}], "out")
    assert [line["method"] for line in result.done] == ["fine_mixing", "fine_tune"]
