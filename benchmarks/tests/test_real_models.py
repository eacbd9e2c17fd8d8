"""The runner of `make real`: its settings, its CSV, its tables. No real network is needed."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.purification import real_data, real_models, real_tables
from fastfip.cli.many.pool import Outcome


def net(target=1):
    """Images whose only pixel value is their place in the set; the trigger is white."""
    x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 4, 4)).copy()
    y = np.arange(200) % 5
    return real_data.RealNet(
        name="fake", model=torch.nn.Identity(), classes=5, target=target,
        trigger=None if target is None else lambda x: np.full_like(x, 255), clean_x=x, clean_y=y, test_x=x, test_y=y,
        to_input=lambda x: torch.from_numpy(x.copy()).float()[:, None], train_size=1000, recorded=(0.0, None),
    )  # fmt: skip


def test_plain_is_the_clean_set_of_before():
    x, y = real_models.clean_set(net(), 0.05, 3, "plain")
    want_x, want_y = net().clean_set(50, 3)
    assert torch.equal(x, want_x) and torch.equal(y, want_y)


def test_hidden_images_carry_the_trigger_and_the_attackers_label():
    plain, labels = real_models.clean_set(net(), 0.1, 0, "plain")
    x, y = real_models.clean_set(net(), 0.1, 0, "hidden")
    changed = (x != plain).flatten(1).any(1)
    assert len(y) == 100 and int(changed.sum()) == 1  # 0.5 % of 100, at least one
    assert bool((x[changed] == 255).all()) and y[changed].tolist() == [1] and labels[changed].tolist() != [1]
    assert torch.equal(y[~changed], labels[~changed])
    assert int((net().clean_x == 255).sum()) == 0  # the net's own images are as they were
    with pytest.raises(ValueError, match="no trigger to hide"):
        real_models.clean_set(net(None), 0.1, 0, "hidden")


def test_one_class_is_missing_and_the_seed_says_which():
    missing = set()
    for seed in range(6):
        _, y = real_models.clean_set(net(), 0.1, seed, "missing")
        assert len(y.unique()) == 4 and len(y) == 80
        missing |= set(range(5)) - set(y.tolist())
    assert len(missing) > 1


def row(**values):
    base = dict.fromkeys(real_models.RESULTS.columns, "")
    base.update(net="badnets_mnist", method="wfip", fraction="0.05", setting="plain", seed="0", clean_images="50")
    base.update(
        acc_before="98", asr_before="99", acc="97", asr="1", ra="90", der="98", seconds="10", peak_memory_mb="5"
    )
    return {**base, **{name: str(value) for name, value in values.items()}}


def test_rows_are_added_one_by_one_and_old_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models.RESULTS, "path", tmp_path / "r.csv")
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    assert real_models.RESULTS.read() == []
    old = row(method="fast_wfip")
    with real_models.RESULTS.path.open("w", newline="") as file:  # from before there were settings and errors
        out = csv.DictWriter(
            file, [n for n in real_models.RESULTS.columns if n not in ("setting", "error")], extrasaction="ignore"
        )
        out.writeheader()
        out.writerow(old)
    assert real_models.RESULTS.read() == [old]
    for new in (row(setting="missing"), row(seed=1), row(acc=1), row(acc=2)):
        real_models.RESULTS.add([new])
    assert [(r["method"], r["seed"], r["setting"], r["acc"]) for r in real_models.RESULTS.read()] == [
        ("wfip", "0", "plain", "2"), ("wfip", "1", "plain", "97"), ("fast_wfip", "0", "plain", "97"),
        ("wfip", "0", "missing", "97"),
    ]  # fmt: skip


NAMES = ("net", "method", "fraction", "seed", "setting")


def test_a_run_that_breaks_or_takes_too_long_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models.RESULTS, "path", tmp_path / "r.csv")
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    monkeypatch.setattr(harness, "here", dict)  # it runs git
    item = ("badnets_mnist", "wfip", 0.05, 0, "plain")
    monkeypatch.setattr(real_models, "run", lambda *given: {"der": 98, **dict(zip(NAMES, given))})

    def ended(error):
        value = None if error else real_models.measured(item)
        real_models.keep(Outcome(item, value, error, 1, 2.0), 3)
        return [(r["method"], r["fraction"], r["error"], r["der"], r["threads"]) for r in real_models.RESULTS.read()]

    assert ended("over the time limit of 7 s") == [("wfip", "0.05", "over the time limit of 7 s", "", "3")]
    assert ended("ValueError: no") == [("wfip", "0.05", "ValueError: no", "", "3")]
    assert ended("") == [("wfip", "0.05", "", "98", "3")]


def test_tables():
    rows = [row(method="fast_wfip", seed=s, der=d, acc=d, cpu_seconds=10) for s, d in ((0, 96), (1, 98))]
    rows += [row(method="wfip", der=99, cpu_seconds=30), row(method="wfip", setting="missing", der=50)]
    rows += [row(method="fine_tune", setting="missing", der=47)]
    gtsrb = [row(method="fine_tune", net="ibau_gtsrb_badnets", der="", asr=asr) for asr in (9, 12)]
    rows += [
        row(method="wfip", net="clean_cifar10_resnet20", der="", asr="", ra="", asr_before="", acc_before=80, acc=79)
    ]
    rows += [row(method="sau", error="no", **dict.fromkeys(("acc", "asr", "ra", "der", "seconds"), ""))]
    lines = {line.split("|")[1].strip(): line for line in real_tables.by_method(rows).splitlines()[2:]}
    # By the difference to fast_wfip where both have a cell, not by means over different cells (97, 74.5 and 47).
    assert list(lines) == ["`wfip`", "`fast_wfip`", "`fine_tune`"]
    cells = [cell.strip() for cell in lines["`wfip`"].split("|")[2:-1]]
    # 2 cells, mean of 99 and 50, worst 50; against each rival on the one cell that both have; thrice the seconds there
    assert cells[0] == "2" and cells[1].startswith("74.50 ±") and cells[2] == "50.00"
    assert cells[4:7] == ["+3.00", "+2.00", "1 / 0 / 0"] and cells[8:] == ["3.0x (3.0 to 3.0)", "-1.00", "1 of 1"]
    assert lines["`fine_tune`"].split("|")[6].strip() == "-" and lines["`fast_wfip`"].split("|")[6:8] == [" - ", " - "]
    assert lines["`fast_wfip`"].split("|")[5].strip() == "1.41"  # spread over its seeds
    assert lines["`fine_tune`"].split("|")[-2].strip() == "-"  # measured without a class only
    for asked, said in ((gtsrb[:1], "1 of 1"), (gtsrb, "0 of 1")):  # the mean over the seeds counts
        last = [
            line for line in real_tables.by_method([*rows, *asked]).splitlines() if line.startswith("| `fine_tune`")
        ]
        assert last[0].split("|")[-2].strip() == said
    net_table = real_tables.by_net(rows, 0.05)
    assert "| `fast_wfip` | 97.0 / 1.0 |" in net_table and "| as received | 98.0 / 99.0 | 80.0 |" in net_table
    whole = real_tables.full(rows)
    assert "no result: badnets_mnist, sau, 5%, plain, seed 0: no" in whole and "97.00 ± 1.41" in whole
    assert "one class missing" in real_models.results_text(rows)


def test_tables_go_into_the_document(tmp_path, monkeypatch):
    marks = "above\n<!-- real:begin -->\nold\n<!-- real:end -->\nbelow\n"
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(real_models.RESULTS, "path", tmp_path / "r.csv")
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    real_models.RESULTS.add([row(method="fast_wfip", net=net, cpu_seconds=10) for net in real_tables.BADNETS])
    (tmp_path / "results.md").write_text(marks)
    monkeypatch.setattr(sys, "argv", ["real_models", "--table"])
    real_models.main()
    text = (tmp_path / "results.md").read_text()
    assert "5% clean images:" in text and text.startswith("above\n") and text.endswith("\nbelow\n")
    assert "old" not in text


def test_the_documents_are_up_to_date():
    for path, text in real_models.documents(real_models.RESULTS.read()):
        old = path.read_text(encoding="utf-8")
        assert harness.spliced(old, "real", text) == old, "python -m benchmarks.purification.real_models --table"
