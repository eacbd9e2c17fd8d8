"""The same jobs as tasks of Ray; the names of the tests of the pool hold here too."""

import sys

import pytest

from fastfip.cli.many import on_ray
from fastfip.cli.many.pool import outcomes
from fastfip.errors import BackendError
from tests.support import many_jobs


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"pip install 'fastfip\[ray\]'"):
        on_ray.RayTasks()


def test_tasks_end_as_processes_do(tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    with on_ray.RayTasks(workers=2) as tasks:
        assert tasks.room == 2
        found = list(outcomes(many_jobs.square, range(3), tasks, workers=2))
        assert sorted(o.value[0] for o in found) == [0, 1, 4] and len({o.value[1] for o in found}) == 3
        (found,) = outcomes(many_jobs.dies_once, [str(tmp_path / "there")], tasks, retries=1)
        assert (found.value, found.attempts) == ("alive", 2)
        (found,) = outcomes(many_jobs.dies, [0], tasks)
        assert "WorkerCrashedError" in found.error and "\n" not in found.error
        (found,) = outcomes(many_jobs.broken, [7], tasks)
        assert found.error == "ValueError: no 7"
        (found,) = outcomes(many_jobs.sleeps, [str(tmp_path)], tasks, timeout=30)
        assert found.error == "over the time limit of 30 s"
        assert many_jobs.gone(many_jobs.pids(tmp_path, 1)[:1])
