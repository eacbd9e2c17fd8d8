"""The benchmark of the decomposition: its ways find the same, and the table is that of the rows. No ViT-B is needed."""

import pytest
import torch
from torch import nn

from benchmarks import harness
from benchmarks.purification import bench_spectral_setup as bench
from fastfip.spectral import decompose, leading


@pytest.mark.parametrize("spectrum", bench.SPECTRA)
def test_all_ways_find_the_same_values(spectrum, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RANK", 12)
    matrices = bench.problem(spectrum, lambda: nn.Sequential(nn.Linear(300, 280), nn.Conv2d(8, 16, 3)))
    assert [tuple(m.shape) for m in matrices] == [(1, 280, 300), (1, 16, 72)]
    if spectrum == "decaying":
        assert all(s[0, 0] / s[0, -1] == pytest.approx(100, rel=1e-3) for s in map(torch.linalg.svdvals, matrices))
    asked = []
    monkeypatch.setattr(decompose, "largest", lambda m, k: asked.append(k) or leading.largest(m, k))
    ways = bench.ways(str(tmp_path))
    right = torch.linalg.svdvals(matrices[0].double())[:, :12]
    for way in [*ways, "cache"]:  # the second time from its file
        asked.clear()
        found = ways[way](matrices)
        torch.testing.assert_close(found[0][1].double(), right, rtol=1e-5, atol=0)
        assert bench.worst_residual(matrices, found) < 1e-4
        assert len(asked) == (way in ("iteration", "cache") and not (tmp_path / "seen").exists())
        if way == "cache":
            (tmp_path / "seen").touch()
    factors = [tuple(t.clone() for t in three) for three in found]
    factors[1][0][0, 0, -1] += 0.1
    assert bench.worst_residual(matrices, factors) > 0.05


def test_the_table_is_that_of_the_rows():
    assert bench.table() in (harness.DOCS / "performance.md").read_text()
