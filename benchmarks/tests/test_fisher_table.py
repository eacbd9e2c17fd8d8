"""The table of Fisher diagonals goes from the CSV into docs/fisher.md, and is what stands there."""

from __future__ import annotations

import sys

from benchmarks import harness
from benchmarks.fisher import bench_fisher_diagonal as bench


def test_the_table_is_that_of_the_rows():
    old = bench.DOCUMENT.read_text(encoding="utf-8")
    want = "python -m benchmarks.fisher.bench_fisher_diagonal --plot"
    assert harness.spliced(old, "fisher", bench.table()) == old, want


def test_plot_draws_the_rows_and_puts_the_table_between_the_marks(tmp_path, monkeypatch):
    file = tmp_path / "fisher.md"
    file.write_text("above\n<!-- fisher:begin -->\nold\n<!-- fisher:end -->\nbelow\n")
    drawn = []
    monkeypatch.setattr(bench, "DOCUMENT", file)
    monkeypatch.setattr(bench, "plot", drawn.append)
    monkeypatch.setattr(sys, "argv", ["bench_fisher_diagonal", "--plot"])
    bench.main()
    assert file.read_text() == f"above\n<!-- fisher:begin -->\n{bench.table()}\n<!-- fisher:end -->\nbelow\n"
    assert [path.name for path in drawn] == ["fisher_diagonal.png"]
