"""The benchmark of sharded models: what its rows and its table say. No process is started."""

from benchmarks.fisher import bench_sharded


def test_a_row_has_the_peak_as_a_multiple_of_all_parameters():
    row = bench_sharded.row("`fisher_diagonal`", 2, 16, 2, size=1000, parts=500, peak=1450)
    assert (row["parameters"], row["parts"], row["multiple"]) == (1000, 500, "1.45")


def test_every_row_of_the_table_has_its_columns(monkeypatch):
    row = {"what": "`purify`", "world": "2", "parameters": "2500000", "parts": "1000", "peak": "10", "multiple": "1.5"}
    monkeypatch.setattr(bench_sharded.RESULTS, "read", lambda: [row])
    lines = bench_sharded.show().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "2.5 MB" in lines[2]
