"""Jobs for workers, which import this file: it must not be slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def square(x):
    return x * x, os.getpid()


def broken(x):
    print("printed by the worker", flush=True)
    raise ValueError(f"no {x}")


def dies_once(path):
    """The first attempt is killed, the second one lives."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def dies(_):
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(_):
    print("the last word", flush=True)
    os._exit(3)


def sleeps(folder):
    """Never ends by itself, nor does what it starts; says which processes they are."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    part = Path(folder) / f"{os.getpid()}.part"
    part.write_text(f"{os.getpid()} {child.pid}")
    part.rename(Path(folder) / f"{os.getpid()}.pids")
    time.sleep(600)


def alive_or_sleeps(path):
    return "alive" if Path(path).is_file() else sleeps(path)


def cannot_be_sent(_):
    return lambda: None


def threads(_):
    return os.environ["OMP_NUM_THREADS"]


def pids(folder, count):
    """The processes of `count` jobs that sleep, once all of them do."""
    for _ in range(600):
        found = list(Path(folder).glob("*.pids"))
        if len(found) == count:
            return [int(word) for path in found for word in path.read_text().split()]
        time.sleep(0.1)
    raise AssertionError("the workers did not start")


def gone(processes):
    """Whether all of these processes end within a minute; a zombie has ended."""
    for _ in range(600):
        if not any(map(_runs, processes)):
            return True
        time.sleep(0.1)
    return False


def _runs(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


if __name__ == "__main__":  # two workers that sleep, of a process that a test kills
    from fastfip.cli.many.pool import Processes, outcomes
    from tests.support.many_jobs import sleeps as job

    list(outcomes(job, [sys.argv[1]] * 2, Processes(), workers=2))
