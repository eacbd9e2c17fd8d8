"""The benchmarks of every method's time and of a thousand classes: ratios, tables, what they need."""

import subprocess
import sys

import pytest

from benchmarks import harness
from benchmarks.purification import bench_methods, bench_thousand


def test_ratios_are_to_the_packages_own_method_which_runs_first(monkeypatch):
    seconds, asked = {"fisher_steps": 10.0, "awm": 55.0}, []

    def run_apart(cell, threads, limit):
        asked.append(cell.method)
        if cell.method not in seconds:
            return [], "over the time limit"
        common = {"cpu_seconds": seconds[cell.method], "acc_before": 90, "acc": 89, "steps": 3}
        return [{**common, "asr_before": 100, "asr": left, "der": 90.0} for left in (2, 4)], ""

    monkeypatch.setattr(bench_methods, "run_apart", run_apart)
    monkeypatch.setattr(bench_methods, "prepare", lambda network: None)
    rows = bench_methods.measure("digits-badnets-all", 0.05, ["awm", "anp", "fisher_steps"])
    assert asked == ["fisher_steps", "awm", "anp"]
    assert [(row["method"], row["ratio"], row["asr"]) for row in rows] == [
        ("fisher_steps", "1.00", "3.00"), ("awm", "5.50", "3.00"),
    ]  # fmt: skip
    assert len({row["began"] for row in rows}) == 1
    seconds.clear()  # without the package's own there is nothing to compare with
    assert bench_methods.measure("digits-badnets-all", 0.05, ["awm"]) == []


def test_without_its_packages_or_images_it_is_skipped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.purification.bench_thousand", "--again"]
    environment = {"FASTFIP_DATA": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and "skipped: " in done.stdout, done.stderr


@pytest.mark.parametrize(("benchmark", "page"), [(bench_methods, "suite.md"), (bench_thousand, "results.md")])
def test_the_table_is_that_of_the_rows(benchmark, page):
    assert benchmark.show() in (harness.DOCS / page).read_text(encoding="utf-8")
    assert benchmark.RESULTS.read()
