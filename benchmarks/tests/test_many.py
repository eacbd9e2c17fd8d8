"""The benchmark that kills many purifications half-way: what it makes and counts."""

from __future__ import annotations

from pathlib import Path

from benchmarks import harness, many
from fastfip.cli.many.keys import Digests
from fastfip.cli.many.rows import read_manifest

FIGURES = ("acc_before", "acc", "asr_before", "asr")


def test_the_manifest_names_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(many, "EPOCHS", 1)
    (row,) = read_manifest(many.make(tmp_path, 1))
    assert Digests(tmp_path).key(row) and (row.method, row.settings[1]) == ("fine_tune", "steps=150")


def test_what_is_missing_doubled_or_not_the_right_file_is_counted(tmp_path, monkeypatch):
    done = {"status": "done", "sha256": many.digest(Path(__file__)), "out": __file__, **dict.fromkeys(FIGURES, "0.5")}
    rows = [
        {**done, "key": "a", "checkpoint": "digits-000.pth"},
        {**done, "key": "a", "checkpoint": "digits-000.pth"},
        {**done, "key": "b", "checkpoint": "digits-001.pth", "sha256": "another"},
        {**done, "key": "c", "checkpoint": "digits-002.pth", "status": "failed"},
    ]
    monkeypatch.setattr(many, "make", lambda folder, models: folder / "m.csv")
    monkeypatch.setattr(many, "run", lambda command, out, stop: 1.0)
    monkeypatch.setattr(many, "lines", lambda out: rows)
    row = many.measure(tmp_path, 4, 2, "processes")
    counted = {name: row[name] for name in ("twice", "missing", "wrong_files", "failed", "done")}
    assert counted == {"twice": 1, "missing": 1, "wrong_files": 1, "failed": 1, "done": 3}
    assert (row["asr"], row["lines_when_resumed"]) == (50.0, 4)


def test_the_table_is_that_of_the_rows():
    assert many.show() in (harness.DOCS / "many.md").read_text(encoding="utf-8")
    assert {row["way"] for row in many.RESULTS.read()} == {"processes", "ray"}
    wrong = ("twice", "missing", "failed", "wrong_files")
    assert all(row[name] == "0" for row in many.RESULTS.read() for name in wrong)
