"""The worker's event loop side: jobs in, tokens out, a lease that only a working engine keeps.

Invariant: a job entry stays in this worker's stream until its finish stands in the reply stream, so
that whatever happens to this process the dispatcher finds the job there and hands it on.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from operator import methodcaller

import structlog
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.clock import Clock
from headrace.errors import CallerError, WireError
from headrace.grammars import Matcher
from headrace.policy import priority
from headrace.streams import REDIS_DOWN, Entry, Tail, connect
from headrace.types import (
    Delta,
    Finish,
    FinishReason,
    Job,
    JobProgress,
    ModelRecord,
    WorkerState,
    WorkerStatus,
    pack_tokens,
)
from headrace_worker.cache_link import CacheLink
from headrace_worker.engine import Engine
from headrace_worker.engine_thread import EngineThread
from headrace_worker.express import Express
from headrace_worker.line import Line
from headrace_worker.membership import Capacity, Membership, new_worker_id
from headrace_worker.metrics import Counts
from headrace_worker.moves import CANCELLED, OK, STALE, Moves
from headrace_worker.preparing import Preparation
from headrace_worker.publisher import Addressed, Delivery, Publisher
from headrace_worker.reporter import Reporter
from headrace_worker.results import JobStory, MissingRun, StepResult
from headrace_worker.settings import WorkerSettings
from headrace_worker.story import close_span, open_span, tell_story
from headrace_worker.ticket import Ticket, last_words

log = structlog.get_logger()

JOIN_RETRY_S = 0.5
WRITE_WAIT_S_MAX = 1.0
"""For how long the end of a job waits for what it wants written; its tokens do not."""


class Consumer:
    """Connects one engine to the fleet."""

    def __init__(
        self,
        settings: WorkerSettings,
        engine: Engine,
        record: ModelRecord,
        capacity: Capacity,
        clock: Clock,
        cache: CacheLink | None,
        *,
        threads: int,
    ) -> None:
        """`threads`: cores that the engine's steps may use."""
        self._settings = settings
        self._engine = engine
        self._record = record
        self._capacity = capacity
        self._clock = clock
        self._cache = cache
        self._threads = threads
        self._redis: Redis = connect(settings.redis_url)
        self._counts = Counts()
        self._tickets: dict[str, Ticket] = {}
        self._state = WorkerState.READY
        self._stop = asyncio.Event()
        line = Line[list[Addressed]](settings.redis_url)
        self._publisher = Publisher(self._redis, record.name, self._note_sent, line)
        self._express = Express(self._tickets, self._publisher, cache)
        self._reporter = Reporter(self._redis, record.name, clock)
        self._preparation = Preparation(record, cache, self._reporter, clock)
        self._moves = Moves(engine, self._publisher, cache, clock)
        self._thread: EngineThread | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._next_id = settings.worker_id or new_worker_id()

    def drain(self) -> None:
        """Take nothing new, finish what runs, leave."""
        self._state = WorkerState.DRAINING
        self._moves.drain()
        self._stop.set()

    async def run(self) -> None:
        """Serve until drained. Raises RuntimeError when a part of this worker died."""
        self._thread = EngineThread(
            self._engine,
            self._clock,
            self._on_result,
            threads=self._threads,
            nice=self._settings.nice,
            debug=self._settings.debug,
            express=self._express.take,
        )
        self._thread.start()
        self._capacity = await self._moves.open(
            self._capacity, self._settings.kv_listen, self._thread.send
        )
        self._loops = [asyncio.create_task(self._publisher.run())]
        if self._cache is not None:
            self._loops.append(asyncio.create_task(self._cache.run()))
        try:
            while not self._stop.is_set():
                await self._live_once()
        finally:
            self._thread.stop()
            for loop in self._loops:
                loop.cancel()
            await asyncio.gather(*self._loops, return_exceptions=True)
            await self._moves.close()
            if self._cache is not None:
                await self._cache.close()
            await self._redis.aclose()

    async def _live_once(self) -> None:
        """One incarnation: join, serve until drained or the lease is lost, leave."""
        member = await self._join()
        if member is None:
            return
        log.info("worker joined", worker=member.id, model=self._record.name)
        tail = Tail(self._settings.redis_url, keys.jobs(self._record.name, member.id))
        own = [
            asyncio.create_task(self._read(tail, member)),
            asyncio.create_task(self._reporter.run(member.id)),
        ]
        self._loops += own
        try:
            drained = await self._beat_until_over(member)
        finally:
            for loop in own:
                self._loops.remove(loop)
                loop.cancel()
            await asyncio.gather(*own, return_exceptions=True)
            await tail.close()
        if drained:
            with contextlib.suppress(*REDIS_DOWN):
                await member.leave()
            log.info("worker left", worker=member.id, handed_back=len(self._tickets))
            self._drop_tickets("handed back")
        else:
            log.warning("lease lost, starting over under a new id", worker=member.id)
            await self._reporter.withdraw(member.id)
            await self._forget_everything()

    async def _join(self) -> Membership | None:
        """Join under an id that nobody had; None when told to stop meanwhile."""
        while not self._stop.is_set():
            member = Membership(
                self._redis,
                self._record,
                self._next_id,
                self._capacity,
                self._settings.lease_ms,
                self._clock,
            )
            try:
                if await member.join(self.status()):
                    self._next_id = new_worker_id()
                    return member
                log.info("this worker id was used before, taking another", worker=member.id)
                self._next_id = new_worker_id()
            except REDIS_DOWN as error:
                log.warning("cannot join, redis is away", error=str(error))
                await asyncio.sleep(JOIN_RETRY_S)
        return None

    async def _beat_until_over(self, member: Membership) -> bool:
        """Heartbeats; True when drained, False when the lease is lost."""
        beat_s = self._settings.lease_ms / 3000
        drain_until_ms: int | None = None
        while True:
            self._check_loops()
            if not self._hung():
                with contextlib.suppress(*REDIS_DOWN):
                    if not await member.beat(self.status()):
                        return False
            if self._stop.is_set():
                now = self._clock.now_ms()
                drain_until_ms = drain_until_ms or now + self._settings.drain_ms
                if not self._tickets or now >= drain_until_ms:
                    await self._settle()
                    return True
                await asyncio.sleep(min(beat_s, 0.05))
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_s):
                        await self._stop.wait()

    def _check_loops(self) -> None:
        """Raise RuntimeError when a part has died: a worker that only beats is a trap for jobs."""
        assert self._thread is not None, "heartbeats start after the engine"
        if self._thread.failure is not None:
            raise RuntimeError("the engine's thread died") from self._thread.failure
        for loop in self._loops:
            if loop.done():
                raise RuntimeError("a loop of this worker ended") from loop.exception()

    async def _settle(self) -> None:
        """Give the last tokens and blocks a moment to leave."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._publisher.flushed()
                if self._cache is not None:
                    await self._cache.flushed()

    def _hung(self) -> bool:
        assert self._thread is not None, "heartbeats start after the engine"
        stalled_ms = self._thread.stalled_ms()
        if stalled_ms > self._settings.stall_ms:
            log.error("the engine hangs, the lease is let go", stalled_ms=stalled_ms)
            return True
        return False

    @property
    def model(self) -> str:
        return self._record.name

    def counts(self) -> Counts:
        """For `/metrics`."""
        counts = self._moves.count(self._counts)
        return counts if self._cache is None else replace(counts, cache=self._cache.counts)

    def status(self) -> WorkerStatus:
        """What the fleet is told of this worker."""
        running, waiting, free_tokens = (
            self._thread.counts if self._thread is not None else self._engine.counts()
        )
        return WorkerStatus(
            state=self._state,
            running=running,
            waiting=waiting,
            free_tokens=free_tokens,
            steps=self._thread.steps if self._thread is not None else 0,
            role=self._moves.role,
        )

    def _drop_tickets(self, why: str) -> None:
        """Jobs that are another worker's from now on: their spans end here, and say why."""
        for ticket in self._tickets.values():
            self._leave(ticket, why)
        self._tickets.clear()

    def _leave(self, ticket: Ticket, why: str) -> None:
        ticket.stop_tasks()
        self._moves.forget(ticket.job.id)
        if self._cache is not None:
            self._cache.forget(ticket.job.id)
        ticket.span.set_attribute("headrace.moved_on", why)
        ticket.span.end()

    async def _forget_everything(self) -> None:
        self._drop_tickets("lease lost")
        assert self._thread is not None, "an incarnation ends while the engine runs"
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def abort(engine: Engine) -> None:
            engine.abort_all()
            loop.call_soon_threadsafe(done.set)

        self._thread.send(abort)
        await done.wait()

    async def _read(self, tail: Tail, member: Membership) -> None:
        async for entries in tail:
            for entry in entries:
                await self._take(entry, tail.stream, member.id)

    async def _take(self, entry: Entry, stream: str, worker: str) -> None:
        if entry.kind in ("cancel", "role"):
            word = entry.data.decode(errors="replace")
            if entry.kind == "role":
                self._moves.take_role(word)
            else:
                self._cancel(word)
            with contextlib.suppress(*REDIS_DOWN):
                await self._redis.xdel(stream, entry.id)
            return
        try:
            job = wire.decode_job(entry.data)
        except WireError as error:
            log.error("job unreadable, dropped", entry=entry.id, error=error.message)
            with contextlib.suppress(*REDIS_DOWN):
                await self._redis.xdel(stream, entry.id)
            return
        to = Delivery(job.id, worker, entry.id, job.gateway, job.attempt, job.cost_tokens)
        if not self._make_way(job, to):
            return
        span = open_span(job, stream, entry.id, worker, self._clock.wall_ns())
        ticket = Ticket(job, to, span)
        self._tickets[job.id] = ticket
        reason = self._engine.refuse(job)
        if reason is not None:
            self._end(ticket, Finish(FinishReason.ERROR, error=reason))
            return
        if priority.is_late(job, self._clock.wall_ms(), len(job.logged)):
            self._end(ticket, Finish(FinishReason.DEADLINE))
            return
        missing = self._engine.missing_blocks(job) if self._cache is not None else None
        if (missing and missing.hashes) or job.sampling.grammar:
            ticket.preparing = asyncio.create_task(self._prepare_then_add(ticket, missing))
        else:
            self._add(ticket, None)

    def _make_way(self, job: Job, to: Delivery) -> bool:
        """Whether `job` has to be started; it may be here, when Redis forgot its last second."""
        ticket = self._tickets.get(job.id)
        if ticket is None:
            return True
        if ticket.to.attempt >= job.attempt:
            if ticket.to.attempt == job.attempt:
                ticket.to = to  # it goes on, and its end is written where it stands now
            return False
        if ticket.added:
            assert self._thread is not None, "jobs are read while the engine runs"
            self._thread.send(methodcaller("cancel", job.id))
        self._leave(ticket, "a later attempt")
        return True

    async def _prepare_then_add(self, ticket: Ticket, missing: MissingRun | None) -> None:
        try:
            async with asyncio.timeout(ticket.left_s(self._clock.wall_ms())):
                await self._prepare(ticket, missing)
        except TimeoutError:
            self._end(ticket, Finish(FinishReason.DEADLINE))
        finally:
            if ticket.fetched is not None and not ticket.added:
                ticket.fetched.close()

    async def _prepare(self, ticket: Ticket, missing: MissingRun | None) -> None:
        """What the engine needs of others, both at a time: the grammar, and KV that is cached."""
        assert self._thread is not None, "jobs are read while the engine runs"
        job = ticket.job
        compiled, _ = await asyncio.gather(
            self._preparation.compile(job, ticket.span),
            self._preparation.fetch(ticket, missing, self._thread.outlook),
            return_exceptions=True,
        )
        if isinstance(compiled, CallerError):
            # gateways have compiled it before, so this is rare; nobody else may notice
            self._end(ticket, Finish(FinishReason.ERROR, error=compiled.message))
        elif isinstance(compiled, BaseException):
            log.error("grammar not compiled", job=job.id, error=repr(compiled), exc_info=compiled)
            self._end(ticket, Finish(FinishReason.ERROR, error="the grammar could not be compiled"))
        elif self._tickets.get(job.id) is ticket:
            self._add(ticket, compiled)

    def _add(self, ticket: Ticket, matcher: Matcher | None) -> None:
        assert self._thread is not None, "jobs are read while the engine runs"
        loop = asyncio.get_running_loop()
        job, fetched = ticket.job, ticket.fetched
        ticket.preparing = None
        ticket.added = True
        self._moves.begin(job)

        def add(engine: Engine) -> None:
            try:
                engine.add(job, fetched.blocks if fetched is not None else (), matcher)
            finally:
                # the engine reads what is lent, so nobody but the engine says that it is done
                if fetched is not None:
                    loop.call_soon_threadsafe(fetched.close)

        self._thread.send(add)

    def _cancel(self, job_id: str) -> None:
        ticket = self._tickets.get(job_id)
        if ticket is None:
            return
        ticket.cancelled = True
        if ticket.moving is not None:
            return
        if ticket.added:
            assert self._thread is not None, "jobs are read while the engine runs"
            self._thread.send(methodcaller("cancel", job_id))
            return
        ticket.stop_tasks()
        self._end(ticket, Finish(FinishReason.CANCELLED))

    def _end(self, ticket: Ticket, finish: Finish) -> None:
        """End a job that never reached the engine."""
        job = ticket.job
        if job.id not in self._tickets:
            return  # it moved on while it was prepared
        delta = Delta(job.id, job.attempt, len(job.logged), (), finish)
        del self._tickets[job.id]
        self._moves.forget(job.id)
        self._counts.late_jobs += finish.reason is FinishReason.DEADLINE
        close_span(ticket.span, None, finish, self._clock.wall_ns())
        progress = JobProgress(job.id, 0, 0, len(job.logged))
        self._publisher.put([Addressed(delta, ticket.to, progress)], steps=0)

    def _on_result(self, result: StepResult) -> None:
        """In the event loop, after each step."""
        self._reporter.note(result)
        stories = {story.job: story for story in result.stories}
        for story in result.stories:
            self._counts.late_jobs += story.reason is FinishReason.DEADLINE
            self._counts.guessed += story.guessed
            self._counts.guessed_right += story.guessed_right
            self._counts.forced += story.forced
        self._store(result)
        self._moves.lend(result.lent)
        handed = {story.job: story for story in result.handed}
        step = []
        for delta in result.deltas:
            ticket = self._tickets.get(delta.job)
            if ticket is None or ticket.to.attempt != delta.attempt:
                continue
            step += self._addressed(ticket, delta, stories.get(delta.job))
            if delta.job in handed:
                ticket.moving = asyncio.create_task(self._move(ticket, delta, handed[delta.job]))
        if step:
            self._publisher.put(step, steps=1)
        else:
            self._note_sent(1)

    async def _move(self, ticket: Ticket, delta: Delta, story: JobStory) -> None:
        """Let a job go on elsewhere, or here where that is refused."""
        job = ticket.job
        logged = pack_tokens((*job.logged, *delta.tokens))
        answer = await self._moves.move(ticket, story, replace(job, logged=logged))
        ticket.moving = None
        ticket.job = replace(job, logged=logged, move_to="", found_tokens=story.progress.cached)
        if answer == CANCELLED or (ticket.cancelled and answer not in (OK, STALE)):
            self._end(ticket, Finish(FinishReason.CANCELLED))
        elif answer in (OK, STALE):
            del self._tickets[job.id]
            tell_story(ticket.span, story)
            self._leave(ticket, "to the worker that decodes" if answer == OK else answer)
        else:
            log.info("a job stays", job=job.id, to=job.move_to, reason=answer)
            ticket.added, ticket.fetched = False, None
            ticket.preparing = asyncio.create_task(self._prepare_then_add(ticket, None))

    def _store(self, result: StepResult) -> None:
        """What the engine offers is written; that of jobs which have moved on without a count."""
        if self._cache is None or not result.blocks:
            return
        self._cache.store_later(result.blocks)
        for job_id in {export.facts.job for export in result.blocks} - self._tickets.keys():
            self._cache.forget(job_id)

    def _addressed(self, ticket: Ticket, delta: Delta, told: JobStory | None) -> list[Addressed]:
        """What is sent of `delta` now. The end of a job that wants to be cached may come later."""
        if self._cache is not None:
            written = self._cache.written_tokens(delta.job)
            delta = replace(delta, cache_write_tokens=written) if written else delta
        finish = delta.finish
        if finish is None:
            return [Addressed(delta, ticket.to)]
        if ticket.job.cache_until_tokens and self._cache and self._cache.is_writing(delta.job):
            ticket.ending = asyncio.create_task(self._end_written(ticket, delta, told, finish))
            return [Addressed(replace(delta, finish=None), ticket.to)] if delta.tokens else []
        self._close(ticket, told, finish)
        return [Addressed(delta, ticket.to, told.progress if told else None)]

    async def _end_written(
        self, ticket: Ticket, delta: Delta, told: JobStory | None, finish: Finish
    ) -> None:
        """End a job when what it wants cached is written, or when that takes too long."""
        assert self._cache is not None, "only with a cache is anything written"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WRITE_WAIT_S_MAX):
                await self._cache.written(ticket.job.id)
        written = self._cache.written_tokens(ticket.job.id)
        self._close(ticket, told, finish)
        progress = told.progress if told else None
        last = last_words(delta, finish, written)
        self._publisher.put([Addressed(last, ticket.to, progress)], steps=0)

    def _close(self, ticket: Ticket, told: JobStory | None, finish: Finish) -> None:
        """The job has ended: nothing of it is left here but its last words."""
        del self._tickets[ticket.job.id]
        self._moves.forget(ticket.job.id)
        if self._cache is not None:
            written = self._cache.written_tokens(ticket.job.id)
            ticket.span.set_attribute("headrace.cache.written_tokens", written)
            self._cache.forget(ticket.job.id)
        close_span(ticket.span, told, finish, self._clock.wall_ns())

    def _note_sent(self, steps: int) -> None:
        assert self._thread is not None, "steps come from the engine"
        self._thread.results_done(steps)
