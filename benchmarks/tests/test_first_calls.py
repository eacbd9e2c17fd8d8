"""The rows of the first calls are within what docs/fisher.md says of them, and a row can be measured."""

from __future__ import annotations

from benchmarks.fisher import bench_first_calls as bench


def test_what_the_document_says_of_the_rows():
    rows = [row for row in bench.RESULTS.read() if row["threads"] == "1"]
    both = [row for row in rows if row["way"] == "gradient and diagonal"]
    assert {(row["tokens"], row["samples"]) for row in both} == {
        (tokens, samples) for tokens in ("65", "197") for samples in ("4", "8", "16", "32")
    }
    for row in both:
        assert float(row["later"]) <= 1.15 and float(row["first"]) + float(row["second"]) <= 4, row
    (trace,) = [row for row in rows if row["way"] != "gradient and diagonal" and row["tokens"] == "197"]
    assert trace["samples"] == "4" and float(trace["later"]) <= 2.9


def test_a_row_is_measured():
    row = bench.measure("trace and its gradient", 5, 2, 1, tiny=True)
    assert row["tokens"] == 5 and row["samples"] == 2 and row["clock"] == "cpu"
    assert all(float(row[name]) > 0 for name in ("plain_ms", "first", "second", "later"))
