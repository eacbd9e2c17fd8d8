"""The benchmark of several processes: what its rows and its table say. No process is started."""

import torch

from benchmarks.purification import bench_ranks


def test_a_row_says_bytes_of_a_step_and_what_ddp_sends_for_one_of_ours():
    sent = {"gradients": 400, "outputs": 40, "batchnorm": 80, "perturbations": 900, "control": 7}
    row = bench_ranks.row("resnet20", "fast_fip", 2, sent, 1000, [0.5, 1e-7])
    assert (row["gradients"], row["others"], row["ratio"]) == (100, 30, "10")
    assert (row["parameters"], row["weights"], row["answers"]) == (269722, "5.0e-01", "1.0e-07")
    assert row["perturbations"] == 300  # one step that unlearns, and two of the search


def test_apart_is_a_share():
    assert bench_ranks.apart(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 0.1


def test_every_row_of_the_table_has_its_columns(monkeypatch):
    row = {"net": "vit", "parameters": "1000", "method": "fast_fip", "world": "2", "gradients": "100", "ddp": "4000",
           "perturbations": "0", "others": "10", "ratio": "40", "weights": "1e-7", "answers": "1e-7"}  # fmt: skip
    monkeypatch.setattr(bench_ranks.RESULTS, "read", lambda: [row])
    lines = bench_ranks.show().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "1,000" in lines[2] and "4.0 kB" in lines[2]
