"""What took long to compute is not lost: a full disk, Ctrl-C while it is written, SIGTERM."""

import contextlib
import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import fastfip.auditing.audit
import fastfip.checkpoint.save
from fastfip.checkpoint import load_checkpoint
from fastfip.cli import main
from fastfip.cli.errors import undisturbed
from tests.support.command_line import NET, PURIFY, fails, work
from tests.support.peak_memory import in_child

__all__ = ["work"]
ROOT = Path(__file__).resolve().parents[2]
STEP = ["--steps", "1", "--ignore-fit"]


@pytest.fixture
def full(work, monkeypatch):
    """The folder is on a disk that is full; the one for temporary files is not."""
    spare = work / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    real = torch.save

    def save(value, file, **options):
        if Path(file.name).parent == work:
            file.write(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(value, file, **options)

    monkeypatch.setattr(torch, "save", save)
    return spare


def test_a_full_disk(full, capsys):
    assert main([*PURIFY, *STEP]) == 4
    out, err = capsys.readouterr()
    assert "fine_tune on 60 clean samples" in out
    (kept,) = full.rglob("out.pth")
    assert err.count("\n") == 1 and "out.pth: cannot be written: [enforce fail" in err and f"is in {kept}" in err
    assert list(load_checkpoint(kept)) == list(load_checkpoint("in.pth"))
    assert not [name for name in os.listdir() if name.startswith(".")]
    assert main(["fisher", "in.pth", "f.pth", *NET, "--data", "data.npz"]) == 4
    assert len(list(full.rglob("f.pth"))) == 1 and "wrote" not in capsys.readouterr().out


def test_a_disk_that_is_full_everywhere(full, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert main([*PURIFY, *STEP]) == 4
    assert "it is lost" in capsys.readouterr().err


def test_a_limit_of_the_system_on_the_size_of_files(work, monkeypatch):
    """As `ulimit -f`: every write beyond it fails, that of safetensors too."""
    monkeypatch.setattr(tempfile, "tempdir", str(work))

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
            return main([*arguments]), *(text.getvalue() for text in said)

    for name in ("out.pth", "out.safetensors"):
        (code, out, err), _ = in_child(functools.partial(limited, "purify", "in.pth", name, *PURIFY[3:], *STEP))
        assert code == 4 and "unexpected" not in err, err
        assert f"{name}: cannot be written" in err and "fine_tune on 60" in out
        assert not Path(name).exists()


def test_a_report_that_cannot_be_written_is_an_error(work, capsys, monkeypatch):
    real = fastfip.checkpoint.save.replacing
    monkeypatch.setattr("fastfip.reporting.table.replacing", lambda path: real(Path("gone") / path))
    monkeypatch.setattr(tempfile, "tempdir", str(work / "gone too"))
    assert main([*PURIFY, *STEP, "--report", "r.json"]) == 4
    assert "r.json: cannot be written" in capsys.readouterr().err
    assert load_checkpoint("out.pth")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_write_waits_for_its_end(work, capsys, monkeypatch, number):
    real = torch.save

    def save(value, file):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        real(value, file)

    monkeypatch.setattr(torch, "save", save)
    before = signal.getsignal(number)
    assert main([*PURIFY, *STEP, "--report", "r.json"]) == 130
    out, err = capsys.readouterr()
    assert "the result is being written first" in err and "out.pth holds the result, which is complete" in err
    assert load_checkpoint("out.pth") and json.loads((work / "r.json").read_text()) and "fine_tune" in out
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_wait(capsys):
    with pytest.raises(KeyboardInterrupt), undisturbed():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_writes_the_last_good_state(work):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = """
import sys
from fastfip.cli import main
from fastfip.reporting import progress
progress.LONGEST = progress.SHORTEST = 0.1
sys.exit(main())
"""
    run = [sys.executable, "-c", code, *PURIFY, "--epochs", "30000", "--ignore-fit"]
    process = subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    while said.startswith("fastfip: fine_tune, step ") and int(said.split()[3]) < 1000:
        said = process.stderr.readline()  # until there is a better state than the first
    assert said.startswith("fastfip: fine_tune, step "), said
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "out.pth holds the last good state" in err and "interrupted in epoch" in out
    assert not torch.equal(load_checkpoint("out.pth")["4.weight"], load_checkpoint("in.pth")["4.weight"])


def test_an_audit_that_is_interrupted_shows_what_is_complete(work, capsys, monkeypatch):
    real, calls = fastfip.auditing.audit.invert, []

    def invert(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return real(*arguments, **options)

    monkeypatch.setattr(fastfip.auditing.audit, "invert", invert)
    command = ["audit", "in.pth", *NET, "--data", "data.npz", "--steps", "2"]
    assert main([*command, "--json"]) == 130
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert list(figures["received"]["forms"]) == ["patch"] and figures["interrupted"]
    assert err == "fastfip: interrupted: the searches that were complete are shown\n"
    calls[:] = [None]  # now in the first search: there is nothing to show
    assert fails(capsys, 130, *command) == "fastfip: interrupted\n"


def test_rows_of_compare_are_shown_where_the_file_cannot_be_written(work, capsys, monkeypatch):
    def write(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastfip.comparison.result.write_text", write)
    command = ["compare", "in.pth", *NET, "--data", "data.npz", "--methods", "fine_tune", "--set", "fine_tune.steps=1"]
    assert main([*command, "--out", "c.csv"]) == 4
    out, err = capsys.readouterr()
    assert "fine_tune (steps=1)" in out and "c.csv: cannot be written: No space left on device" in err


@pytest.mark.parametrize("name", ["x" * 300, "in.pth/report"])
def test_names_that_no_system_takes_are_one_line_before_the_work(work, capsys, name):
    for arguments in ([*PURIFY, "--report", f"{name}.json"], ["audit", "in.pth", *NET, "--data", "data.npz",
                                                              "--picture", f"{name}.png"]):  # fmt: skip
        assert "no file can be written there" in fails(capsys, 2, *arguments)


def test_devices_and_inputs_are_not_overwritten(work, capsys):
    os.mkfifo("pipe.json")
    (work / "c.json").write_text("{}")
    (work / "images" / "0").mkdir(parents=True)
    (work / "images" / "0" / "a.png").write_bytes(b"x")
    force = ["--force", "--config", "c.json"]
    for report, words in (
        ("pipe.json", "device or a pipe"),
        ("/dev/null", "device or a pipe"),
        ("data.npz", "is an input"),
        ("c.json", "is an input"),
    ):
        assert words in fails(capsys, 2, *PURIFY, *force, "--report", report), report
    picture = ["audit", "in.pth", *NET, "--data", "images", "--force", "--picture", "images/0/a.png"]
    assert "is a file inside the input images" in fails(capsys, 2, *picture)
    os.rename("data.npz", "data.pth")
    os.symlink("data.pth", "data.npz")
    same = ["purify", "in.pth", "data.pth", *NET, "--data", "data.npz", "--force"]
    assert "OUT data.pth is an input" in fails(capsys, 2, *same)
