"""Jobs in processes of their own: what ends one costs one attempt, and nothing outlives the one that started it."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastfip.cli.many.keys import sha256
from fastfip.cli.many.pool import Processes, outcomes
from fastfip.errors import ConfigError
from tests.support import many_jobs

ROOT = Path(__file__).resolve().parents[3]


def test_each_job_has_a_process_of_its_own():
    found = list(outcomes(many_jobs.square, iter(range(4)), Processes(), workers=2))
    assert sorted((o.job, o.value[0]) for o in found) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert len({o.value[1] for o in found} | {os.getpid()}) == 5
    assert all(o.error == "" and o.attempts == 1 for o in found)


def test_a_killed_worker_costs_one_attempt_of_one_job(tmp_path):
    jobs = [str(tmp_path / "a"), str(tmp_path / "b")]
    Path(jobs[1]).touch()
    found = {o.job: o for o in outcomes(many_jobs.dies_once, jobs, Processes(), workers=2, retries=1)}
    assert [(found[job].value, found[job].attempts) for job in jobs] == [("alive", 2), ("alive", 1)]


@pytest.mark.parametrize(
    "job, retries, words",
    [
        (many_jobs.dies, 1, "stopped by SIGKILL"),
        (many_jobs.leaves, 0, "exit code 3: the last word"),
        (many_jobs.broken, 1, "ValueError: no 7"),
        (many_jobs.cannot_be_sent, 0, "pickle"),
    ],
)
def test_what_ends_a_worker_is_said_in_one_line(tmp_path, job, retries, words):
    place = Processes(log=lambda _: tmp_path / "log.txt")
    (found,) = outcomes(job, [7], place, retries=retries)
    assert words in found.error and "\n" not in found.error
    assert found.value is None and found.attempts == 1 + retries
    if job is many_jobs.broken:
        assert (tmp_path / "log.txt").read_text().count("printed by the worker") == 2


def test_a_job_over_its_time_is_ended_with_what_it_started_and_not_tried_again(tmp_path):
    (found,) = outcomes(many_jobs.sleeps, [str(tmp_path)], Processes(), timeout=8, retries=3)
    assert found.error == "over the time limit of 8 s" and found.attempts == 1
    processes = [int(word) for path in tmp_path.glob("*.pids") for word in path.read_text().split()]
    assert many_jobs.gone(processes)


def test_closing_ends_the_workers(tmp_path):
    def jobs():
        yield str(tmp_path / "there")
        yield str(tmp_path)

    (tmp_path / "there").touch()
    running = outcomes(many_jobs.alive_or_sleeps, jobs(), Processes(), workers=2)
    assert next(running).value == "alive"
    processes = many_jobs.pids(tmp_path, 1)
    running.close()
    assert many_jobs.gone(processes)


def test_workers_end_with_the_process_that_started_them_however_it_ends(tmp_path):
    parent = subprocess.Popen([sys.executable, "-m", "tests.support.many_jobs", str(tmp_path)], cwd=ROOT)
    processes = many_jobs.pids(tmp_path, 2)
    assert len(processes) == 4
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert many_jobs.gone(processes)


def test_threads_are_set_for_the_worker_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (found,) = outcomes(many_jobs.threads, [0], Processes(threads=3))
    assert found.value == "3" and os.environ["OMP_NUM_THREADS"] == "1"


def test_workers_have_the_package_that_runs_here(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    (tmp_path / "a").write_bytes(b"1")
    before = list(sys.path)
    (found,) = outcomes(sha256, [tmp_path / "a"], Processes(log=lambda _: tmp_path / "log.txt"))
    assert found.value == hashlib.sha256(b"1").hexdigest(), found.error
    assert sys.path == before


@pytest.mark.parametrize("bad", [{"workers": 0}, {"retries": -1}, {"timeout": 0.0}])
def test_numbers_that_cannot_be(bad):
    with pytest.raises(ConfigError, match="at least 1"):
        list(outcomes(many_jobs.square, [1], Processes(), **bad))
