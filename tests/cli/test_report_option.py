"""`--report`: what stands in the page, and that it is not lost and costs no file of the user's."""

import hashlib
import json
import shlex

import pytest

from fastfip.cli import main
from fastfip.reporting.document import schema
from tests.support import schema as checker
from tests.support.command_line import NET, PURIFY, TRIGGER, fails, work

__all__ = ["work"]

AUDIT = ["audit", "in.pth", *NET, "--data", "data.npz", "--steps", "3", "--limit", "20", "--no-sharpness", "--quiet"]
COMPARE = ["compare", "in.pth", *NET, "--data", "data.npz", "--methods", "fine_tune", "--set", "fine_tune.steps=2"]
RUNS = {"purify": [*PURIFY, "--steps", "3"], "audit": AUDIT, "compare": [*COMPARE, "--quiet", "--ignore-fit"]}


@pytest.mark.parametrize("kind", RUNS)
def test_every_command_writes_a_page_and_the_same_as_json(kind, work, capsys):
    sums = []
    for name in ("r.html", "r.json"):
        command = [*RUNS[kind], "--report", name]
        assert main([*command, "--force", "--ignore-fit"] if kind == "purify" else command) == 0, capsys.readouterr()
        sums.append(hashlib.sha256((work / "in.pth").read_bytes()).hexdigest())
    page, document = (work / "r.html").read_text(), json.loads((work / "r.json").read_text())
    assert checker.errors(document, schema()) == [] and document["kind"] == kind
    received = document["received" if kind == "purify" else "model"]
    assert received["files"] == [{"name": "in.pth", "sha256": sums[0], "bytes": (work / "in.pth").stat().st_size}]
    assert sums[0] in page and "tiny_arch:net" in page and "x/255" in page and received["data"]["clean"] == "data.npz"
    typed = shlex.split(document["repeat"])
    assert typed[0] == "fastfip" and typed[1 : 1 + len(RUNS[kind])] == RUNS[kind] and "r.html" in page


def test_the_page_of_a_purification_has_classes_intervals_and_scaling(work, capsys):
    more = ["--test-data", "data.npz", *TRIGGER, "--epochs", "8", "--set", "lr=0.05", "--mean", "0.5", "--std", "0.5"]
    assert main([*PURIFY, *more, "--ignore-fit", "--report", "r.json"]) == 0
    document = json.loads((work / "r.json").read_text())
    assert [row["samples"] for row in document["classes"]] == [10, 10, 10]
    right = sum(row["samples"] * row["after"] for row in document["classes"])
    assert right == pytest.approx(document["after"]["acc"] * document["after"]["n"])
    low, high = document["after"]["intervals"]["asr"]
    assert low <= document["after"]["asr"] <= high
    assert document["received"]["images"]["formula"] == "(x/255 - [0.5]) / [0.5]"
    assert document["received"]["data"]["attack"] == "badnets:size=2,margin=1, target 1"
    assert document["received"]["inputs"]["shape"] == [3, 6, 6] and document["received"]["inputs"]["low"] == -1.0


def test_reports_spare_inputs_and_existing_files(work, capsys):
    (work / "old.html").write_text("mine")
    for run in (AUDIT, COMPARE):
        assert "exists" in fails(capsys, 2, *run, "--report", "old.html")
        assert "is an input" in fails(capsys, 2, *run, "--report", "data.npz", "--force")
        assert "does not exist" in fails(capsys, 2, *run, "--report", "none/r.html")
    assert "--picture and --report are both a.png" in fails(
        capsys, 2, *AUDIT, "--picture", "a.png", "--report", "a.png"
    )
    assert "--out and --report are both a.csv" in fails(capsys, 2, *COMPARE, "--out", "a.csv", "--report", "a.csv")
    assert (work / "old.html").read_text() == "mine"
