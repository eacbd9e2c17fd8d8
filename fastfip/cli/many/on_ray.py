"""The same jobs as tasks of Ray: of a cluster inside this process, or of one that runs already."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastfip.cli.many.pool import Said, called
from fastfip.errors import BackendError, reason

__all__ = ["RayTasks"]


class RayTasks:
    """Tasks of Ray, each in a process of its own that ends after it; a context manager.

    Every machine of the cluster must see the same files under the same names.

    Args:
        address: of a cluster, see `ray.init`; None: one is started inside this process, and ends with it.
        workers: processors that the own cluster has; None: those of the machine. Of no account with `address`.
        threads: of each task.

    Raises:
        BackendError: ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, threads: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise BackendError("--ray needs ray: pip install 'fastfip[ray]'") from None
        self.ray, self.threads = ray, threads
        own = {"include_dashboard": False, "num_cpus": None if workers is None else workers * threads}
        try:
            self.own = not ray.is_initialized()
            if self.own:
                more = own if address is None else {}
                ray.init(address=address, log_to_driver=False, logging_level="warning", **more)
        except Exception as error:  # whatever a cluster makes of it
            raise BackendError(f"no cluster of Ray can be reached: {type(error).__name__}: {reason(error)}") from error
        variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        # A process for each task, as on one machine; attempts are counted by the pool.
        options = {"num_cpus": threads, "max_calls": 1, "max_retries": 0, "runtime_env": {"env_vars": variables}}
        self.task = ray.remote(**options)(called)

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(self, *error: object) -> None:
        if self.own:
            self.ray.shutdown()

    @property
    def room(self) -> int:
        """Return how many tasks the cluster can run at a time."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)) // self.threads)

    def start(self, function: Callable[[Any], Any], job: Any) -> Any:
        """Begin `function(job)` as a task."""
        return self.task.remote(function, job)

    def wait(self, handles: list[Any], seconds: float) -> list[tuple[Any, Said]]:
        """Return those that have ended, after at most so many seconds."""
        ended, _ = self.ray.wait(handles, num_returns=1, timeout=max(seconds, 0.01))
        more, _ = self.ray.wait(handles, num_returns=len(handles), timeout=0)
        return [(handle, self._said(handle)) for handle in dict.fromkeys([*ended, *more])]

    def _said(self, handle: Any) -> Said:
        try:
            said: Said = self.ray.get(handle)
            return said
        except Exception as error:  # a worker that died, a machine that is gone, a function that cannot be sent
            return Said(error=f"{type(error).__name__}: {reason(error)}")

    def stop(self, handle: Any) -> None:
        """End a task and its process."""
        self.ray.cancel(handle, force=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not self.ray.wait([handle], timeout=0.2)[0]:
            pass
