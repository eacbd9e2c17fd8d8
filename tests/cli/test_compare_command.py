"""`fastfip compare` and `fastfip audit`: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import fastfip
from fastfip.cli import main
from fastfip.comparison.result import Comparison
from tests.cli.test_cli import NET, TRIGGER, fails, work  # noqa: F401 (a fixture)

COMPARE = ["compare", "in.pth", *NET, "--data", "data.npz"]
TWO = [
    "--methods",
    "fine_tune,fip",
    "--set",
    "fine_tune.steps=2",
    "--set",
    "fip.steps=2",
    "--set",
    "fip.eta_r=1",
]
AUDIT = ["audit", "in.pth", *NET, "--data", "data.npz", "--steps", "2", "--no-sharpness"]


def test_compare(work, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    more = ["--test-data", "data.npz", *TRIGGER, "--seeds", "0,1", "--out", "c.csv", "--plot", "c.png"]
    assert main([*COMPARE, *TWO, *more]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "─" not in out
    lines = out.splitlines()
    assert lines[0] == "60 clean samples" and lines[1].split()[:5] == ["method", "ACC", "ASR", "RA", "DER"]
    assert [line.split()[0] for line in lines[2:5]] == ["none", "fine_tune", "fip"] and "±" in lines[3]
    rows = Comparison.read("c.csv").rows
    assert [(row.method, row.seed) for row in rows] == [
        ("none", 0), ("fine_tune", 0), ("fip", 0), ("fine_tune", 1), ("fip", 1),
    ]  # fmt: skip
    assert rows[1].config["steps"] == 2 and rows[1].test_ra is not None and os.path.getsize("c.png") > 5000
    assert "--force replaces it, --resume continues" in fails(capsys, 2, *COMPARE, *TWO, "--out", "c.csv")
    before = [row.seconds for row in rows]
    assert main([*COMPARE, *TWO, *more[:-2], "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["rows"]
    assert [row["seconds"] for row in again] == before  # nothing ran again


def test_compare_when_methods_fail(work, capsys, monkeypatch):  # noqa: F811
    def broken(self, run, batch):
        raise MemoryError("no room")

    monkeypatch.setattr("fastfip.methods.fine_tune.FineTune.loss", broken, raising=False)
    assert main([*COMPARE, *TWO]) == 0
    assert "fine_tune (steps=2): MemoryError: no room" in capsys.readouterr().out
    assert main([*COMPARE, "--methods", "fine_tune"]) == 5
    assert "every method failed; the first error: MemoryError: no room" in capsys.readouterr().err


def test_compare_interrupted(work, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fastfip.methods.fip.FIP.setup", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*COMPARE, *TWO, "--out", "c.json"]) == 130
    assert "c.json holds the complete rows" in capsys.readouterr().err
    assert [row.method for row in Comparison.read("c.json").rows] == ["none", "fine_tune"]
    assert main([*COMPARE, *TWO]) == 130
    out, err = capsys.readouterr()
    assert "fine_tune (steps=2)" in out and "with --out FILE" in err and "--resume continues" in err


def test_compare_interrupted_while_scoring(work, capsys, monkeypatch):  # noqa: F811
    from fastfip.metrics import evaluate

    walks = []

    def stopped(*args, **options):
        walks.append(args)
        if len(walks) == 3:  # the model as received, fine_tune, fip
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr("fastfip.comparison.compare.evaluate", stopped)
    assert main([*COMPARE, *TWO, "--out", "c.csv"]) == 130
    out, err = capsys.readouterr()
    assert "c.csv holds the complete rows, and --resume continues from them" in err and "fine_tune" in out
    assert main([*COMPARE, *TWO, "--out", "c.csv", "--resume"]) == 0
    assert [row.method for row in Comparison.read("c.csv").rows] == ["none", "fine_tune", "fip"]


def test_audit(work, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    assert (
        main(["purify", "in.pth", "out.pth", *NET, "--data", "data.npz", "--method", "fine_tune", "--steps", "2"]) == 0
    )
    rng = np.random.default_rng(1)
    np.savez("bad.npz", x=rng.integers(0, 255, (6, 6, 6, 3), dtype=np.uint8), y=np.ones(6, int))
    capsys.readouterr()
    more = ["--purified", "out.pth", "--poisoned", "bad.npz", "--picture", "a.png"]
    assert main([*AUDIT, *more, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "not a certificate" in out and "re-tuned with 3 poisoned samples" in out
    assert os.path.getsize("a.png") > 5000
    assert main([*AUDIT, "--classes", "2,1", "--limit", "20", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["received"]["forms"]["patch"]["classes"] == [2, 1] and values["settings"]["samples"] == 20
    assert "--force replaces it" in fails(capsys, 2, *AUDIT, "--picture", "a.png")


def test_how_they_end(work, capsys):  # noqa: F811
    np.savez("one.npz", x=np.zeros((4, 6, 6, 3), np.uint8), y=np.zeros(4, int))
    for code, arguments, text in [
        (2, [*COMPARE, "--seeds", "a"], "--seeds=a"),
        (2, [*COMPARE, "--resume"], "--resume needs --out"),
        (2, [*COMPARE, "--out", "a.txt"], ".csv, .json"),
        (2, [*COMPARE, "--plot", "none/a.png"], "does not exist"),
        (2, [*COMPARE, "--set", "lr=1"], "METHOD.KEY=VALUE"),
        (2, [*COMPARE, "--methods", "fip", "--set", "fine_tune.lr=1"], "not one of the methods to run"),
        (5, [*COMPARE, "--methods", "fine_tuna"], "did you mean 'fine_tune'"),
        (5, [*COMPARE, "--methods", "fine_tune", "--set", "fine_tune.lrr=1"], "did you mean 'lr'"),
        (3, [*COMPARE, "--data", "none"], "there is no such"),
        (2, [*AUDIT, "--classes", "x"], "--classes=x"),
        (2, [*AUDIT, "--target", "1"], "give --poisoned"),
        (2, [*AUDIT, "--picture", "a.gif"], "must end in"),
        (5, [*AUDIT, "--classes", "9"], "labels from 0 to 2"),
        (5, [*AUDIT, "--reach", "0"], "reach=0"),
        (3, [*AUDIT, "--data", "one.npz"], "all clean samples are of one class"),
    ]:
        assert text in fails(capsys, code, *arguments), arguments
    (work / "c.csv").write_text("a,b\n1,2\n")
    assert "is not what fastfip compare writes" in fails(capsys, 3, *COMPARE, "--out", "c.csv", "--resume")


def test_a_table_that_grows(work, capsys, monkeypatch):  # noqa: F811
    """On a terminal the rows so far are shown on stderr, with what is running."""
    shown = []
    monkeypatch.setattr("rich.live.Live.update", lambda self, what, refresh: shown.append(what))
    found = fastfip.compare(
        *_model_and_data(), ["fine_tune"], seeds=[0], progress=True,
    )  # fmt: skip
    assert len(shown) == 2 and shown[0].renderables[1].plain == "running fine_tune, seed 0 ..."
    assert len(found.rows) == 2


def _model_and_data():
    from tests.support.small_nets import conv_net, loader

    return conv_net(), loader()
