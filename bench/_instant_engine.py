"""A worker whose engine answers at once: all of a real one but the model.

Consumer, engine thread and publisher are the worker's own, so that what they add to a first token
can be told from what the gateway adds: `_instant_worker.py` is without them. Each step gives every
running job its next token; with `--step-ms` the steps keep that distance, as those of a model do.
`python -m bench gateway --consumer` starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import dataclass
from typing import Any, cast

from bench._instant_worker import JOBS_MAX, KV_TOKENS, SAID_MAX, output, record
from headrace import logs, loops, telemetry
from headrace.clock import SystemClock
from headrace.config import load_or_exit
from headrace.types import Delta, Finish, FinishReason, Job, JobProgress
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine
from headrace_worker.membership import Capacity
from headrace_worker.results import JobStory, Outlook, StepResult, StepWork
from headrace_worker.settings import WorkerSettings


@dataclass(slots=True)
class _Running:
    job: Job
    made: int
    added_ns: int
    first_ns: int = 0


class InstantEngine:
    """What a Consumer needs of an Engine. `step_s`: the distance between two steps."""

    layout = b"instant"
    block_bytes = 1

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._due_s = 0.0
        self._said = output(SAID_MAX)
        self._jobs: dict[str, _Running] = {}
        self._ended: list[Delta] = []
        self._stories: list[JobStory] = []

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._ended)

    def counts(self) -> tuple[int, int, int]:
        return len(self._jobs), 0, KV_TOKENS

    def outlook(self) -> Outlook:
        return Outlook()

    def refuse(self, job: Job) -> str | None:
        return "too long" if job.sampling.max_tokens > len(self._said) else None

    def add(self, job: Job, *_: object) -> None:
        self._jobs[job.id] = _Running(job, len(job.logged), time.time_ns())

    def cancel(self, job_id: str) -> bool:
        running = self._jobs.get(job_id)
        if running is not None:
            delta = Delta(job_id, running.job.attempt, running.made)
            self._end(running, delta, FinishReason.CANCELLED)
        return running is not None

    def abort_all(self) -> None:
        self._jobs.clear()
        self._ended.clear()
        self._stories.clear()

    def check_integrity(self) -> None:
        """There is nothing that could leak."""

    def step(self) -> StepResult:
        self._wait()
        began_ns = time.time_ns()
        for running in list(self._jobs.values()):
            job, at = running.job, running.made
            running.made += 1
            running.first_ns = running.first_ns or began_ns
            delta = Delta(job.id, job.attempt, at, (self._said[at],))
            if running.made == job.sampling.max_tokens:
                self._end(running, delta, FinishReason.LENGTH)
            else:
                self._ended.append(delta)
        deltas, self._ended = self._ended, []
        stories, self._stories = self._stories, []
        work = StepWork(
            moved=tuple(_progress(running) for running in self._jobs.values()),
            busy_ns=time.time_ns() - began_ns,
            output_tokens=len(deltas),
        )
        return StepResult(deltas, [], stories, work)

    def _wait(self) -> None:
        """For the next step's time; the first one after a pause comes at once."""
        now_s = time.perf_counter()
        if now_s < self._due_s:
            time.sleep(self._due_s - now_s)
        self._due_s = max(self._due_s, now_s - self._step_s) + self._step_s

    def _end(self, running: _Running, delta: Delta, reason: FinishReason) -> None:
        job = running.job
        del self._jobs[job.id]
        self._ended.append(Delta(job.id, job.attempt, delta.first, delta.tokens, Finish(reason)))
        now_ns = time.time_ns()
        self._stories.append(
            JobStory(
                job=job.id,
                attempt=job.attempt,
                reason=reason,
                progress=_progress(running),
                added_ns=running.added_ns,
                scheduled_ns=running.added_ns,
                first_token_ns=running.first_ns,
                finished_ns=now_ns,
                chunks=(),
                preemptions=0,
                cached_local=0,
                cached_imported=0,
                output_tokens=running.made,
            )
        )


def _progress(running: _Running) -> JobProgress:
    return JobProgress(running.job.id, len(running.job.prompt), 0, running.made)


async def serve(settings: WorkerSettings, step_s: float) -> None:
    engine: Any = InstantEngine(step_s)
    capacity = Capacity(KV_TOKENS, JOBS_MAX)
    consumer = Consumer(
        settings, cast(Engine, engine), record(), capacity, SystemClock(), None, threads=1
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, consumer.drain)
    await consumer.run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    settings = load_or_exit(WorkerSettings)
    logs.setup("worker", level=settings.log_level, json=settings.log_json)
    telemetry.setup("worker", settings.otlp_endpoint, settings.worker_id)
    loops.run(serve(settings, args.step_ms / 1000))


if __name__ == "__main__":
    main()
