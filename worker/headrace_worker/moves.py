"""A worker's part in moving jobs: its role, the KV that it takes in and sends, the move itself.

Invariant: a job moves in one step of Redis, behind its tokens in the same outbox, and only when its
KV is where it goes; until then this worker has it, and goes on with it whenever the step is refused
(docs/adr/0014). So either side may die at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import structlog
from opentelemetry.trace import SpanKind

from headrace import keys, telemetry, wire
from headrace.clock import Clock
from headrace.types import Delta, Job, WorkerRole
from headrace_worker.cache_link import CacheLink
from headrace_worker.engine import Engine
from headrace_worker.kv.export import Export
from headrace_worker.membership import Capacity
from headrace_worker.metrics import Counts
from headrace_worker.moving.inbox import Inbox
from headrace_worker.moving.mover import Mover
from headrace_worker.publisher import Moving, Publisher
from headrace_worker.results import JobStory
from headrace_worker.ticket import Ticket

log = structlog.get_logger()

OK, CANCELLED, STALE = "ok", "cancelled", "stale"
ROOM_FACTOR = 2
"""Times a worker's own limits may be reserved there: the dispatcher, which predicts how much of it
will be needed, decides below that."""
WRITE_WAIT_S_MAX = 1.0
"""For how long a move waits for what the job wants written into the cache service."""


class Moves:
    """One worker's. Belongs to the event loop."""

    def __init__(
        self, engine: Engine, publisher: Publisher, cache: CacheLink | None, clock: Clock
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._cache = cache
        self._clock = clock
        self._mover = Mover(engine.layout, engine.block_bytes, clock)
        self._inbox: Inbox | None = None
        self.role = WorkerRole.BOTH
        self.moved_out = 0
        self.stayed = 0

    async def open(
        self, capacity: Capacity, listen: str, send: Callable[[Callable[[Engine], None]], None]
    ) -> Capacity:
        """Take KV in at `listen`, if this worker's role ever lets it; what it offers then."""
        self.role = capacity.role
        if capacity.role is WorkerRole.BOTH:
            return capacity
        self._inbox = Inbox(
            self._engine,
            listen,
            kv_tokens=capacity.kv_tokens,
            max_jobs=capacity.max_jobs,
            send=send,
        )
        return replace(capacity, kv_address=await self._inbox.start())

    async def close(self) -> None:
        await self._mover.close()
        if self._inbox is not None:
            await self._inbox.stop()

    def drain(self) -> None:
        if self._inbox is not None:
            self._inbox.closed_for = "the worker leaves"

    def take_role(self, word: str) -> None:
        """What the dispatcher wants this worker to be from now on."""
        with contextlib.suppress(ValueError):
            role = WorkerRole(word)
            if role is WorkerRole.BOTH or self._inbox is not None:
                log.info("role changes", before=self.role.value, now=role.value)
                self.role = role

    def count(self, counts: Counts) -> Counts:
        """`counts` with what moved."""
        return replace(
            counts,
            moved_out=self.moved_out,
            stayed=self.stayed,
            sent_blocks=self._mover.sent_blocks,
            taken_blocks=0 if self._inbox is None else self._inbox.taken_blocks,
        )

    # jobs that will leave

    def begin(self, job: Job) -> None:
        """The engine is about to compute the prompt of a job that moves."""
        if job.move_to:
            self._mover.begin(job)

    def lend(self, exports: Iterable[Export]) -> None:
        self._mover.lend(exports)

    def forget(self, job_id: str) -> None:
        self._mover.forget(job_id)

    async def move(self, ticket: Ticket, story: JobStory, job: Job) -> str:
        """Hand `job`, as it stands after its last token here, to where it goes; OK, CANCELLED,
        STALE (it is another's already), or why it stays."""
        try:
            return await self._move(ticket, story, job)
        except Exception as error:
            # our bug, but not this job's: it goes on here, and behind the fence if it did move
            log.error("a move failed", job=job.id, error=repr(error), exc_info=error)
            self.stayed += 1
            return f"{type(error).__name__}: {error}"

    async def _move(self, ticket: Ticket, story: JobStory, job: Job) -> str:
        arrived = await self._mover.finish(job.id)
        ticket.span.set_attributes(
            {
                "headrace.move.to": job.move_to,
                "headrace.move.blocks": arrived.blocks,
                "headrace.move.shared_memory": arrived.shared,
            }
        )
        if arrived.reason:
            self.stayed += 1
            return arrived.reason
        written = await self._written(job)
        send = telemetry.tracer().start_span(
            f"send jobs {job.model}",
            telemetry.under(ticket.span),
            SpanKind.PRODUCER,
            {
                "messaging.system": "redis",
                "messaging.operation.type": "send",
                "messaging.destination.name": keys.jobs(job.model, job.move_to),
                "headrace.worker": job.move_to,
            },
        )
        attempt = job.attempt + 1
        there = replace(
            job,
            attempt=attempt,
            move_to="",
            move_address="",
            found_tokens=story.progress.cached,
            trace=telemetry.inject(send) or job.trace,
        )
        moving = Moving(
            ticket.to,
            job.move_to,
            wire.encode_job(there),
            Delta(job.id, attempt, len(job.logged), cache_write_tokens=written),
            story.progress,
            ROOM_FACTOR * arrived.kv_tokens,
            ROOM_FACTOR * arrived.max_jobs,
            asyncio.get_running_loop().create_future(),
        )
        try:
            answer = await self._publisher.move(moving)
        finally:
            send.end()
        self.moved_out += answer == OK
        self.stayed += answer not in (OK, CANCELLED, STALE)
        return answer

    async def _written(self, job: Job) -> int:
        """Tokens of the prompt that the cache service has got, after a wait for those it wants."""
        if self._cache is None:
            return 0
        if job.cache_until_tokens and self._cache.is_writing(job.id):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_WAIT_S_MAX):
                    await self._cache.written(job.id)
        return self._cache.written_tokens(job.id)

    def check_integrity(self) -> None:
        self._mover.check_integrity()
        if self._inbox is not None:
            self._inbox.check_integrity()
