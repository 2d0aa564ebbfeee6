"""A job as the worker's event loop holds it, from its arrival to its last words."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from opentelemetry.trace import Span

from headrace.types import Delta, Finish, Job
from headrace_worker.cache_link import Fetched
from headrace_worker.publisher import Delivery


@dataclass(slots=True)
class Ticket:
    """A job that this worker has: where its output goes, its span, and how it is being prepared.

    `added`: the engine has it. `fetched`: what the cache service had of it; whoever adds it to the
    engine sees to it that it is given back. `ending`: the engine is done with it, its end waits for
    what it wants written. `moving`: the engine is done with it, another worker is to go on;
    `cancelled` is heard meanwhile: where the move is refused, it ends.
    """

    job: Job
    to: Delivery
    span: Span
    preparing: asyncio.Task[None] | None = None
    added: bool = False
    fetched: Fetched | None = None
    ending: asyncio.Task[None] | None = None
    moving: asyncio.Task[None] | None = None
    cancelled: bool = False

    def stop_tasks(self) -> None:
        for task in (self.preparing, self.ending, self.moving):
            if task is not None:
                task.cancel()

    def left_s(self, now_ms: int) -> float | None:
        """Seconds from wall-clock `now_ms` to the job's first deadline; None without one."""
        ttft_by_ms = 0 if self.job.logged else self.job.ttft_by_ms
        deadlines = [deadline for deadline in (ttft_by_ms, self.job.done_by_ms) if deadline]
        return (min(deadlines) - now_ms) / 1000 if deadlines else None


def last_words(delta: Delta, finish: Finish, written_tokens: int) -> Delta:
    """The end of a job whose last tokens have been sent with `delta`."""
    return Delta(
        delta.job,
        delta.attempt,
        delta.first + len(delta.tokens),
        (),
        finish,
        delta.cached_tokens,
        cache_write_tokens=written_tokens,
    )
