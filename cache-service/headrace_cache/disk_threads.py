"""A thread with a bounded queue of jobs: the disk's work beside the event loop.

Invariant: jobs run one at a time in the order in which they came; what was submitted either runs or
is told that it will not. Rejected: an executor, whose queue has no bound.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import structlog

log = structlog.get_logger(__name__)


class _Job(NamedTuple):
    run: Callable[[], None]
    dropped: Callable[[], None]
    size_bytes: int


class JobThread:
    """Runs jobs on a thread of its own, from `start` until `stop`."""

    def __init__(self, name: str, jobs_max: int, bytes_max: int) -> None:
        self.failures = 0
        self._jobs_max = jobs_max
        self._bytes_max = bytes_max
        self._jobs: deque[_Job] = deque()
        self._bytes = 0
        self._stopping = False
        self._busy = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> tuple[int, int]:
        """Jobs that wait, and the bytes that they hold."""
        with self._changed:
            return len(self._jobs), self._bytes

    def takes(self, size_bytes: int) -> bool:
        """Whether `submit` would take a job that holds so many bytes."""
        with self._changed:
            return self._takes(size_bytes)

    def _takes(self, size_bytes: int) -> bool:
        fits = self._bytes + size_bytes <= self._bytes_max or not self._jobs
        return not self._stopping and len(self._jobs) < self._jobs_max and fits

    def submit(
        self, run: Callable[[], None], dropped: Callable[[], None], size_bytes: int = 0
    ) -> bool:
        """Queue a job; False if there is no room. `dropped` is called if it will never run."""
        with self._changed:
            if not self._takes(size_bytes):
                return False
            self._jobs.append(_Job(run, dropped, size_bytes))
            self._bytes += size_bytes
            self._changed.notify_all()
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                job.run()
            except Exception:
                self.failures += 1
                log.exception("a job of the disk failed")
            with self._changed:
                self._bytes -= job.size_bytes

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was submitted has run; whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def stop(self, settle_s: float = 0.0) -> None:
        """Let the queue run dry for that long, drop the rest, wait for the job that runs."""
        self.settle(settle_s)
        with self._changed:
            self._stopping = True
            dropped, self._jobs = self._jobs, deque()
            self._bytes -= sum(job.size_bytes for job in dropped)
            self._changed.notify_all()
        for job in dropped:
            job.dropped()
        if self._thread.ident is not None:
            self._thread.join()
