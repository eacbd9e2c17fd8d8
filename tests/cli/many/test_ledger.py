"""The folder of results: a row is there once, whatever moment a run is killed at."""

import csv
import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from fastfip.cli.many.ledger import COLUMNS, Ledger
from fastfip.cli.many.rows import ManyRow
from fastfip.errors import ConfigError

ROW = dataclasses.asdict(ManyRow(checkpoint="in.pth", settings=("lr=1",)))


class Killed(BaseException):
    """The run ends here; nothing after it is done."""


def left_by_a_worker(folder, key="k1", out="in.pth", content=b"weights", error=""):
    """The files of an attempt that is complete."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    record = {
        "key": key, "row": ROW, "out": out, "error": error, "file": "" if error else f"{key}.aa.pth",
        "sha256": hashlib.sha256(content).hexdigest(), "seconds": 1.5, "versions": {"torch": "2"},
        "report": {"before": {"acc": 0.5}, "after": {"acc": 0.75}, "method": "clp", "settings": {"steps": 3}},
    }  # fmt: skip
    if not error:
        (folder / "work" / f"{key}.aa.pth").write_bytes(content)
    (folder / "work" / f"{key}.aa.json").write_text(json.dumps(record))
    return f"{key}.aa.json"


def lines(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_gets_its_line_and_its_file(tmp_path):
    with Ledger(tmp_path / "out") as ledger:
        ledger.commit(left_by_a_worker(tmp_path / "out"), 2)
    (line,) = lines(tmp_path / "out")
    assert tuple(line) == COLUMNS and line["status"] == "done" and line["key"] == "k1"
    assert (line["acc_before"], line["acc"], line["method"], line["steps"]) == ("0.5", "0.75", "clp", "3")
    assert (line["attempts"], line["settings"], line["torch"]) == ("2", "lr=1", "2")
    assert (tmp_path / "out" / "in.pth").read_bytes() == b"weights"
    assert list((tmp_path / "out" / "work").iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "published", "line", "half a line"])
def test_killed_at_any_moment_the_row_is_there_once(tmp_path, monkeypatch, moment):
    folder = tmp_path / "out"
    append, publish = Ledger._append, Ledger._publish

    def killed_append(self, row):
        append(self, row)
        raise Killed

    def killed_publish(self, record):
        assert publish(self, record) == ""
        raise Killed

    if moment == "published":
        monkeypatch.setattr(Ledger, "_publish", killed_publish)
    elif moment != "before":
        monkeypatch.setattr(Ledger, "_append", killed_append)
    with pytest.raises(Killed), Ledger(folder) as ledger:
        name = left_by_a_worker(folder)
        if moment == "before":
            raise Killed
        ledger.commit(name, 1)
    monkeypatch.undo()
    if moment == "half a line":
        whole = (folder / "results.csv").read_bytes()
        (folder / "results.csv").write_bytes(whole[:-20])
    with Ledger(folder) as ledger:
        assert list(ledger.rows) == ["k1"]
    assert [line["key"] for line in lines(folder)] == ["k1"] and lines(folder)[0]["status"] == "done"
    assert (folder / "in.pth").read_bytes() == b"weights" and list((folder / "work").iterdir()) == []


def test_a_worker_that_was_killed_after_its_record_is_no_failure(tmp_path):
    with Ledger(tmp_path / "out") as ledger:
        left_by_a_worker(tmp_path / "out")
        ledger.give_up(ROW, "k1", "in.pth", "killed", 2, 1.0)
    (line,) = lines(tmp_path / "out")
    assert (line["status"], line["error"], line["attempts"]) == ("done", "", "2")
    assert list((tmp_path / "out" / "work").iterdir()) == []


def test_what_an_attempt_left_without_a_record_is_removed(tmp_path):
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    (work / "k1.aa.pth").write_text("half")
    (work / ".k1.aa.json.1.00000000.tmp").write_text("half")
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.rows == {} and list(work.iterdir()) == []


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    with Ledger(tmp_path / "out") as ledger:
        (tmp_path / "out" / "in.pth").write_text("mine")
        ledger.commit(left_by_a_worker(tmp_path / "out"), 1)
    (line,) = lines(tmp_path / "out")
    assert line["status"] == "failed" and "already exists and does not belong to this row" in line["error"]
    assert (tmp_path / "out" / "in.pth").read_text() == "mine"


def test_rows_to_be_tried_again_are_taken_out(tmp_path):
    with Ledger(tmp_path / "out") as ledger:
        ledger.commit(left_by_a_worker(tmp_path / "out", error="no"), 1)
        ledger.commit(left_by_a_worker(tmp_path / "out", key="k2", out="b.pth"), 1)
        ledger.give_up(ROW, "k3", "c.pth", "a,\nb", 3, 1.0)
        ledger.forget({"k1"})
    assert [(line["key"], line["error"]) for line in lines(tmp_path / "out")] == [("k2", ""), ("k3", "a, b")]


def test_two_runs_in_one_folder(tmp_path):
    with Ledger(tmp_path / "out"):
        with pytest.raises(ConfigError, match=r"process \d+ on .* is running in it"):
            Ledger(tmp_path / "out").__enter__()
    with Ledger(tmp_path / "out"):
        pass


def test_the_lock_of_a_killed_run_says_nothing(tmp_path):
    script = (
        "import os, signal, sys; from fastfip.cli.many.ledger import Ledger; Ledger(sys.argv[1]).__enter__();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")])
    assert done.returncode == -9 and "process" in (tmp_path / "out" / ".lock").read_text()
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.rows == {}


def test_another_file_of_results_is_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="is not a file of results that this version can continue"):
        Ledger(tmp_path).__enter__()
    assert (tmp_path / "results.csv").read_text() == "a,b\n1,2\n"
