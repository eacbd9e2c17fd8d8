"""`make gpu` on a machine without a GPU: it says so, and the program itself is known to work before one is at hand."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    assert run(monkeypatch) == gpu.NO_GPU
    assert capsys.readouterr().out.splitlines() == [f"no GPU to measure: {gpu.why_not()}"]


def test_rehearsal(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.RESULTS, "path", tmp_path / "gpu.csv")
    assert run(monkeypatch, "--rehearse") == 0
    printed = capsys.readouterr()
    rows = [dict(cell.split("=", 1) for cell in line.split("  ") if "=" in cell) for line in printed.err.splitlines()]
    rows = [r for r in rows if "part" in r]
    others = {"spectral_grad", "spectral_apply", "spectral_adjoint", "grad_norm_squared", "gram_apply"}
    assert {r["part"] for r in rows} == {"ceiling", "dense", "conv", "pass", "purify", *others}
    for op in others:  # each has its reference, timed, and right
        assert any(r["part"] == op and r["way"] == "reference" and float(r["ratio"]) == 1 for r in rows)
    assert sum(r["part"] == "purify" and float(r["ms"]) > 0 for r in rows) == 3
    for piece in gpu.EXPECTED:
        assert f"{piece}: " in printed.err
    for r in rows:
        if r.get("way", "").endswith(("reference", "reference + gradient")):
            assert float(r["ms"]) > 0 and float(r["error"]) < 1e-2
    assert sum("cannot run: it runs on CUDA devices" in r.get("error", "") for r in rows) >= 6
    assert not gpu.RESULTS.path.exists()  # a rehearsal's numbers mean nothing


def test_a_piece_alone(monkeypatch, capsys):
    assert run(monkeypatch, "--rehearse", "--piece", "purify") == 0
    printed = capsys.readouterr().err
    assert "part=purify" in printed and "part=ceiling" not in printed


def test_a_piece_ends_with_its_time(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LIMIT", -1)
    assert run(monkeypatch, "--rehearse", "--piece", "ops") == 0
    printed = capsys.readouterr().err
    assert "workload=left out" in printed and "part=dense" not in printed


def test_a_failed_test_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda: "")
    monkeypatch.setattr(gpu, "save", lambda row: None)
    monkeypatch.setattr(gpu, "table", lambda found, title: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    for said, code in (("3 passed", 0), ("FAILED (exit 1): 1 failed", 1)):
        monkeypatch.setattr(gpu, "tests", lambda said=said: iter([{"part": "tests", "error": said}]))
        assert run(monkeypatch, "--piece", "tests") == code


def test_shares_of_the_ceiling_compare_equal_types():
    rows = [
        {"part": "ceiling", "dtype": "bfloat16", "rate": 100.0},
        {"part": "dense", "dtype": "bfloat16", "rate": 25.0},
        {"part": "dense", "dtype": "float32", "rate": 25.0},
    ]
    best = {}
    rows = [gpu.with_ceiling(row, best) for row in rows]
    assert rows[1]["of_ceiling"] == 0.25 and "of_ceiling" not in rows[2]


def test_rows_are_kept_with_the_device_they_are_of(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu.RESULTS, "path", tmp_path / "gpu.csv")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    for ms in (1.0, 1234.5):
        gpu.save({"part": "dense", "ms": ms})
        gpu.save({"part": "tests", "ms": 0.12345, "error": "3 passed"})
    rows = [(r["part"], r["ms"], r["error"], r["device"], r["torch"]) for r in gpu.RESULTS.read()]
    assert sorted(rows) == [("dense", "1234", "", "some GPU", torch.__version__),
                            ("tests", "0.123", "3 passed", "some GPU", torch.__version__)]  # fmt: skip


def alive(process):
    """Whether a process still runs: one that has ended stays listed, as a zombie, until its parent asks for it."""
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_tests_that_take_too_long_are_ended_with_what_they_started(tmp_path):
    started = tmp_path / "pid"
    (tmp_path / "test_long.py").write_text(
        "import pathlib, subprocess, time\n"
        "def test_long():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        f"    pathlib.Path({str(started)!r}).write_text(str(child.pid))\n"
        "    time.sleep(600)\n"
    )
    until = time.monotonic() + 12
    assert gpu.pytest(until, str(tmp_path / "test_long.py")).startswith("left out: not done after")
    child = started.read_text()
    patience = time.monotonic() + 30  # a killed process ends when it is next scheduled, which a busy machine puts off
    while alive(child) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not alive(child)
    assert gpu.pytest(time.monotonic(), str(tmp_path)).startswith("left out: the time of the piece was over")
