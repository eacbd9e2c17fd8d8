"""The figures that the table of margins shows, on numbers that are known."""

from __future__ import annotations

import pytest

from benchmarks.purification import audit_margins as bench


def test_auc_counts_pairs_and_ties_half():
    assert bench.auc([3, 2], [1, 2]) == pytest.approx(3.5 / 4)
    assert bench.bootstrapped([3, 4], [1, 2]) == (1.0, 1.0)
    low, high = bench.bootstrapped([3, 1, 4, 2], [2, 1, 3, 0])
    assert low < bench.auc([3, 1, 4, 2], [2, 1, 3, 0]) < high


def test_intervals_are_wilsons():
    low, high = bench.wilson(9, 10)
    assert (low, high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))


def test_the_summary_keeps_sets_apart_and_counts_targets():
    def row(of, attack, target, first, score, suspicious):
        return {"set": of, "attack": attack, "target": target, "first": first, "score": score, "suspicious": suspicious}

    rows = [
        row("development", "badnets", "3", "3", "2", "yes"),
        row("held-out", "blend", "1", "2", "1", "no"),
        row("held-out", "badnets", "next", "2", "0.1", "no"),
        row("development", "none", "", "1", "0.5", "no"),
        row("held-out", "none", "", "4", "0.7", "yes"),
    ]
    lines = bench.summary(rows).splitlines()[2:]
    assert lines[0].startswith("| development | 1 + 1 | 1.00 (1.00 to 1.00) | 1 of 1") and "1 of 1" in lines[0]
    assert "| held-out | 2 + 1 | 0.50" in lines[1] and "0 of 1 (0 to 79 %)" in lines[1]
    assert "| held-out, one target | 1 + 1 | 1.00" in lines[2]
    assert "| all | 3 + 2 | 0.67" in lines[3] and "1 of 2" in lines[3]


def test_networks_have_names_of_their_own_and_both_sets_have_both_kinds():
    for of in ("development", "held-out"):
        kinds = {own.attack == "none" for own in bench.OWN.values() if own.set == of}
        assert kinds == {True, False}
    assert all(name == own.name for name, own in bench.OWN.items())
