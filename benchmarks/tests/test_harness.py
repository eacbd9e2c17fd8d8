"""What the benchmarks share: rows and documents lose nothing, clocks count what they say, changes are owned up to."""

import argparse
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Results


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Make a CSV of two measured columns in a folder of its own."""
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))

    def make(columns="way ms memory commit threads", run="way", **options):
        found = Results("some", columns, run, **options)
        found.path = tmp_path / "results" / "some.csv"
        return found

    return make


def test_rows_of_the_same_run_are_replaced_and_others_stay(results):
    file = results()
    assert file.read() == []
    file.add([{"way": "a", "ms": 1}, {"way": "b", "ms": 2}])
    file.add([{"way": "a", "ms": 3.5, "memory": None}])
    assert [(r["way"], r["ms"], r["memory"]) for r in file.read()] == [("b", "2", ""), ("a", "3.5", "")]
    assert file.path.read_text().splitlines()[0] == "way,ms,memory,commit,threads"
    assert [path.name for path in file.path.parent.iterdir()] == ["some.csv"]  # no half-written file is left
    with pytest.raises(ValueError, match="colour"):
        file.add([{"way": "a", "colour": "red"}])
    assert len(file.read()) == 2


def test_a_group_of_rows_is_replaced_as_one_and_a_file_without_runs_as_a_whole(results):
    file = results(run="threads")
    file.add([{"threads": 1, "way": way} for way in "ab"])
    file.add([{"threads": 2, "way": "c"}])
    file.add([{"threads": 1, "way": "d"}])
    assert [r["way"] for r in file.read()] == ["c", "d"]
    results(run="").add([{"way": "e"}])
    assert [r["way"] for r in file.read()] == ["e"]


def test_columns_of_other_passes_and_of_older_files_stay(results):
    file = results(kept="memory", order=lambda row: row["way"])
    file.path.parent.mkdir()
    file.path.write_text("way,memory,weather\nb,7,dry\nc,8,wet\n")  # no `ms` yet; `weather` is no longer measured
    assert file.read()[0] == {"way": "b", "ms": "", "memory": "7", "commit": "", "threads": "", "weather": "dry"}
    file.add([{"way": "b", "ms": 1}, {"way": "a", "ms": 2}])
    assert [(r["way"], r["ms"], r["memory"], r["weather"]) for r in file.read()] == [
        ("a", "2", "", ""), ("b", "1", "7", ""), ("c", "", "8", "wet"),
    ]  # fmt: skip
    file.add([{"way": "b", "memory": 9}])
    assert [(r["way"], r["memory"]) for r in file.read()] == [("a", ""), ("b", "9"), ("c", "8")]


def test_what_a_row_is_without_a_column_takes_part_in_its_name(results):
    file = results(run="way memory", absent={"memory": "none"})
    file.path.parent.mkdir()
    file.path.write_text("way,ms\na,1\n")
    file.add([{"way": "a", "ms": 2, "memory": "none"}, {"way": "a", "ms": 3, "memory": "some"}])
    assert [(r["ms"], r["memory"]) for r in file.read()] == [("2", "none"), ("3", "some")]


def test_rows_say_where_they_were_made_unless_they_know_better(results, monkeypatch):
    monkeypatch.setattr(harness.env, "collect", lambda: {"commit": "abc", "cpu": "Zen", "threads": 4, "torch": "2"})
    monkeypatch.setattr(harness, "code_changed", lambda: False)
    file = results("way machine cpu threads torch commit")
    file.add([{"way": "a", "threads": 2}])
    want = {"way": "a", "machine": "Zen", "cpu": "Zen", "threads": "2", "torch": "2", "commit": "abc"}
    assert file.read() == [want]


def test_a_commit_owns_up_to_changed_code(monkeypatch):
    for said, changed, want in (
        ("abc+changes", True, "abc+changes"), ("abc", True, "abc+changes"),
        ("abc+changes", False, "abc"), (None, True, ""),
    ):  # fmt: skip
        monkeypatch.setattr(harness.env, "collect", lambda said=said: {"commit": said, "cpu": ""})
        monkeypatch.setattr(harness, "code_changed", lambda changed=changed: changed)
        assert harness.here()["commit"] == want


def test_code_counts_as_changed_and_rows_do_not(tmp_path):
    files = ["fastfip/a.py", "benchmarks/ops/b.py", "csrc/c.cpp", "benchmarks/results/d.csv", "README.md"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all", "--no-gpg-sign"]):
        subprocess.run([*git, *command], check=True)
    for name in files:
        assert not harness.code_changed(tmp_path)
        (tmp_path / name).write_text("new")
        assert harness.code_changed(tmp_path) == (name not in files[3:])
        (tmp_path / name).write_text("old")
    (tmp_path / "fastfip" / "new_method.py").touch()
    assert harness.code_changed(tmp_path)


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb ü\n<!-- y:begin -->\n<!-- y:end -->\n", encoding="utf-8"
    )
    harness.splice(path, "x", harness.table(["", "way"], [["1", "two"]]))
    assert path.read_text(encoding="utf-8") == (
        "a\n<!-- x:begin -->\n|  | way |\n|---|---|\n| 1 | two |\n<!-- x:end -->\nb ü\n"
        "<!-- y:begin -->\n<!-- y:end -->\n"
    )


@pytest.mark.parametrize(
    "text",
    ["", "<!-- x:begin -->", "<!-- x:end -->", "<!-- x:end --><!-- x:begin -->", 2 * "<!-- x:begin --><!-- x:end -->"],
)
def test_a_document_without_its_marks_is_left_alone_and_said_so(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: it must hold <!-- x:begin --> once"):
        harness.splice(path, "x", "new")
    assert path.read_text() == text


def spend(seconds):
    """Use the processor, as far as its own clock says."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_ways_take_turns_and_a_slow_one_gives_up(monkeypatch):
    now = iter(range(10**6))
    cost = {"plain": 1, "ours": 2, "slow": 40}
    ticks = {"cpu": 0.0}
    monkeypatch.setattr(harness.time, "process_time", lambda: ticks["cpu"])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(now)))
    order, ended = [], []

    def way(name):
        def call():
            order.append(name)
            ticks["cpu"] += cost[name] + len(order)  # every call is slower than the one before
            return name

        return call

    times = harness.take_turns(
        {name: way(name) for name in cost}, 4, patience=5,
        before=lambda: ticks.update(cpu=ticks["cpu"] + 1000), after=lambda name, got: ended.append((name, got)),
    )  # fmt: skip
    assert order == [*cost, *reversed(cost), *cost, "ours", "plain", "plain", "ours"]
    assert ended == [(name, name) for name in order]
    # Least of the turns that count: calls 4, 5 and 6 were the first of them, the one before was to warm up.
    assert {name: found.cpu for name, found in times.items()} == {"slow": 44, "ours": 7, "plain": 7}
    assert all(found.wall == 1 for found in times.values())


def test_one_thread_counts_processor_time_and_more_the_clock():
    times = harness.take_turns({"work": lambda: spend(0.02), "rest": lambda: time.sleep(0.02)}, 1)
    assert times["work"].cpu > 0.019 and times["rest"].cpu < 0.01 and times["rest"].wall > 0.019
    assert [harness.clock(threads) for threads in (1, 2)] == ["cpu", "wall"]


def test_least_time_is_of_one_call_of_the_best_series():
    calls = []

    def call():
        calls.append(0)
        spend(0.02 if len(calls) < 4 else 0.002)

    assert 0.0019 < harness.least(call, 3, inner=2) < 0.012
    assert len(calls) == 7  # one of them to warm up


def test_the_device_clock_returns_a_median(monkeypatch):
    timer = harness.Clock("cpu", 3, 4.0)
    said = iter([0.0, 2.0, 9.0, 1.0, 5.0])  # to warm up, to see how long one takes, then three series
    many = []
    monkeypatch.setattr(timer, "run", lambda calls, count: many.append(count) or next(said))
    assert timer.ms([int, int]) == 5.0
    assert many == [2, 1, 2, 2, 2]


def test_peak_is_of_the_call_alone():
    def call():
        torch.ones(16 * 2**20).sum()

    harness.release()
    before = harness.resident()
    assert before > 2**20
    assert 50 * 2**20 < harness.peak(call) - before < 120 * 2**20
    harness.release()
    assert abs(harness.resident() - before) < 30 * 2**20


def test_a_fresh_process_returns_its_numbers_or_its_error(tmp_path, monkeypatch):
    (tmp_path / "prints.py").write_text("import os, sys\nprint('words')\nprint(*sys.argv[1:], os.environ['MORE'])\n")
    monkeypatch.chdir(tmp_path)
    assert harness.fresh("prints", 1, "2", MORE="3") == [1, 2, 3]
    with pytest.raises(SystemExit, match=r"exit code 1\n(.|\n)*KeyError"):
        harness.fresh("prints")


def test_options(monkeypatch, capsys):
    parser = harness.Parser("What it measures.", "threads", "repeat", "peak")
    parser.add_argument("--only")
    monkeypatch.setattr(sys, "argv", ["x", "--threads", "3", "--peak", "way"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: print("threads", threads))
    assert parser.parse() == argparse.Namespace(threads=3, repeat=5, peak="way", only=None)
    assert capsys.readouterr().out == "threads 3\n"
    text = parser.format_help()
    assert "What it measures." in text and "--repeat" in text and "--peak" not in text


def test_rows_are_shown_in_columns(capsys):
    harness.show({"way": "ours", "ms": 1.5}, 5, way=-8)
    assert capsys.readouterr().out == "ours        1.5\n"


def test_what_a_rival_says_is_one_line():
    assert harness.failure(ValueError("no " + 100 * "x" + "\nmore"), 5) == "ValueError: no xx"
    assert harness.failure(KeyError()) == "KeyError: "
