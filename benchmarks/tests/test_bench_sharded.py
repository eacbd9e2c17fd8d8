"""The benchmark of sharded models: what its rows and its table say. No process is started."""

from benchmarks import harness
from benchmarks.fisher import bench_sharded


def test_a_row_has_the_peak_as_a_multiple_of_all_parameters():
    row = bench_sharded.row("`fisher_diagonal`", 2, 16, 2, size=1000, parts=500, peak=1450)
    assert (row["parameters"], row["parts"], row["multiple"]) == (1000, 500, "1.45")


def test_every_row_of_the_table_has_its_columns(monkeypatch):
    row = {"what": "`purify`", "world": "2", "parameters": "2500000", "parts": "1000", "peak": "10", "multiple": "1.5"}
    monkeypatch.setattr(bench_sharded.RESULTS, "read", lambda: [row])
    lines = bench_sharded.show().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "2.5 MB" in lines[2]


def test_the_table_of_methods_says_which_of_them_gather_all_weights(monkeypatch):
    rows = [
        {"what": what, "parameters": "1000", "parts": "500", "multiple": multiple}
        for what, multiple in (("`fisher_diagonal`", "1"), ("`purify`, `wfip`", "2.5"), ("`purify`, `fast_wfip`", "6"))
    ]
    monkeypatch.setattr(bench_sharded.RESULTS, "read", lambda: rows)
    lines = bench_sharded.purifications().splitlines()[2:]
    assert lines == ["| `wfip` | its parts | 0.50 | 2.5 |", "| `fast_wfip` | all weights | 0.50 | 6 |"]


def test_both_documents_have_the_tables_of_the_rows():
    for name, mark, made in (
        ("distributed.md", "sharded", bench_sharded.show()),
        ("scale.md", "parts", bench_sharded.purifications()),
    ):
        text = (harness.DOCS / name).read_text()
        assert harness.spliced(text, mark, made) == text, "python -m benchmarks.fisher.bench_sharded --table"
