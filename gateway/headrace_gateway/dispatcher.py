"""The dispatcher of one model: one gateway leads, the others stand by.

Invariant: a job leaves the queue only through the hand-off script, which checks in one step that
we still lead, that the worker lives and has room, and that the job was not cancelled or taken; so
two gateways that both believe they lead can slow each other down but never run a job twice. All
state here can be lost: the intake stream and the worker streams are the queue, a new term reads
them from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import structlog
from opentelemetry.trace import Span, SpanKind
from redis.asyncio import Redis

from headrace import keys, scripts, telemetry, wire
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.streams import REDIS_DOWN, Entry, Scripts, Tail
from headrace.types import Board, Delta, Finish, FinishReason
from headrace_gateway.leadership import Deposed, Lease
from headrace_gateway.policy.fair_queue import FairQueue, Queued
from headrace_gateway.policy.routing import Route, choose
from headrace_gateway.rescue import Rescuer
from headrace_gateway.roster import Roster

log = structlog.get_logger()

REFRESH_MS = 250
STAND_BY_MS = 400
RATE_HALF_LIFE_MS = 5_000
QUEUE_WAIT_MS_MAX = 600_000
"""A job that found no room for this long ends with an error: nobody waits for ever."""


class Dispatcher:
    """Runs for election, and leads while elected."""

    def __init__(self, url: str, redis: Redis, model: str, gateway_id: str, clock: Clock) -> None:
        self._url = url
        self._redis = redis
        self._lua = Scripts(redis)
        self._model = model
        self._lease = Lease(redis, self._lua, model, gateway_id)
        self._clock = clock
        self.term: Term | None = None

    async def run(self) -> None:
        """Lead whenever the lease is free. Runs until cancelled."""
        try:
            while True:
                try:
                    if await self._lease.take():
                        await self._lead()
                except REDIS_DOWN as error:
                    log.warning("dispatcher lost redis", model=self._model, error=str(error))
                await asyncio.sleep(STAND_BY_MS / 1000)
        finally:
            with contextlib.suppress(*REDIS_DOWN):
                await self._lease.release()

    async def _lead(self) -> None:
        log.info("dispatcher leads", model=self._model)
        self.term = Term(
            self._url, self._redis, self._lua, self._model, self._lease.token, self._clock
        )
        # a task of its own: a cancel that arrives as a task group fails would be lost with it
        leading = asyncio.create_task(self._run_term(self.term))
        try:
            await asyncio.wait({leading})
        finally:
            leading.cancel()
            await asyncio.wait({leading})
            await self.term.close()
            self.term = None
        try:
            leading.result()
        except* Deposed:
            log.info("dispatcher deposed", model=self._model)
        except* REDIS_DOWN as group:
            log.warning("dispatcher steps down", model=self._model, error=str(group.exceptions[0]))

    async def _run_term(self, term: Term) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew())
            for part in term.parts():
                tasks.create_task(part)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(keys.LEADER_LEASE_MS / 4000)
            if not await self._lease.renew():
                raise Deposed


class Term:
    """One leader's term: the queue, the roster and the loops that move jobs."""

    def __init__(
        self, url: str, redis: Redis, lua: Scripts, model: str, token: str, clock: Clock
    ) -> None:
        self._redis = redis
        self._lua = lua
        self._model = model
        self._token = token
        self._clock = clock
        self.queue = FairQueue()
        self.roster = Roster(redis, model)
        self._rescuer = Rescuer(redis, lua, model, token)
        self._intake = Tail(url, keys.intake(model))
        self._events = Tail(url, keys.events(model), after="$")
        self._wake = asyncio.Event()
        self._refresh_now = asyncio.Event()
        self._released_tokens = 0
        self._tokens_per_s = 0.0
        self._rated_ms = clock.now_ms()

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        """The loops of a term; all end when one fails."""
        return [
            self._read_intake(),
            self._read_events(),
            self._refresh_loop(),
            self._dispatch_loop(),
        ]

    async def close(self) -> None:
        await self._intake.close()
        await self._events.close()

    async def _read_intake(self) -> None:
        async for entries in self._intake:
            for entry in entries:
                await self._take(entry)
            self._wake.set()

    async def _take(self, entry: Entry) -> None:
        stream = self._intake.stream
        if entry.kind == "cancel":
            item = self.queue.remove(entry.data.decode(errors="replace"))
            if item is not None:
                await self._end(item, Finish(FinishReason.CANCELLED))
            await self._redis.xdel(stream, entry.id)
            return
        try:
            job = wire.decode_job(entry.data)
        except WireError as error:
            log.error("intake entry unreadable, dropped", entry=entry.id, error=error.message)
            await self._redis.xdel(stream, entry.id)
            return
        self.queue.push(Queued(job, stream, entry.id, self._clock.wall_ns()))

    async def _read_events(self) -> None:
        async for entries in self._events:
            for entry in entries:
                self._note(entry)
            self._wake.set()

    def _note(self, entry: Entry) -> None:
        """A finish frees room at once; anything else means: look again."""
        try:
            event = wire.unpack(entry.data)
        except WireError:
            event = None
        match event:
            case ["done", str(worker), int(cost)]:
                self.roster.adjust(worker, -cost, -1)
                self._released_tokens += cost
            case _:
                self._refresh_now.set()

    async def _refresh_loop(self) -> None:
        while True:
            self._refresh_now.clear()
            await self.roster.refresh()
            for worker in self.roster.dead:
                await self._rescue(worker)
            await self._expire()
            await self._publish()
            if not len(self.queue):
                self.queue.check_integrity()
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_MS / 1000):
                    await self._refresh_now.wait()

    async def _rescue(self, worker: str) -> None:
        for rescued in await self._rescuer.rescue(worker):
            item = Queued(rescued.job, rescued.stream, rescued.entry, self._clock.wall_ns(), worker)
            if rescued.failure:
                await self._end(item, Finish(FinishReason.ERROR, error=rescued.failure))
            else:
                self.queue.push(item)
        if await self._rescuer.bury(worker):
            log.info("worker buried", model=self._model, worker=worker)

    async def _expire(self) -> None:
        limit_ns = QUEUE_WAIT_MS_MAX * 1_000_000
        for item in self.queue.queued_before(self._clock.wall_ns() - limit_ns):
            self.queue.remove(item.job.id)
            reason = f"no worker had room for this job within {QUEUE_WAIT_MS_MAX / 1000:.0f} s"
            await self._end(item, Finish(FinishReason.ERROR, error=reason))

    async def _publish(self) -> None:
        board = Board(
            leader=self._token,
            published_ms=self._clock.wall_ms(),
            queued=self.queue.counts,
            queued_tokens=self.queue.tokens,
            capacity_tokens=self.roster.capacity_tokens,
            reserved_tokens=self.roster.reserved_tokens,
            workers=self.roster.ready_count,
            tokens_per_s=self._rate(),
        )
        await self._redis.set(
            keys.board(self._model), wire.encode_board(board), px=keys.BOARD_TTL_MS
        )

    def _rate(self) -> float:
        """Tokens released per second, averaged with a half-life."""
        now = self._clock.now_ms()
        elapsed = now - self._rated_ms
        if elapsed >= REFRESH_MS:
            keep = 0.5 ** (elapsed / RATE_HALF_LIFE_MS)
            measured = self._released_tokens * 1000 / elapsed
            self._tokens_per_s = keep * self._tokens_per_s + (1 - keep) * measured
            self._released_tokens, self._rated_ms = 0, now
        return self._tokens_per_s

    async def _dispatch_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (item := self.queue.peek()) is not None:
                route = choose(item.job.affinity, item.job.cost_tokens, self.roster.candidates())
                if not route.worker:
                    break
                await self._hand_off(item, route)

    async def _hand_off(self, item: Queued, route: Route) -> None:
        job, worker, m = item.job, route.worker, self._model
        view = self.roster.live[worker]
        trace = self._trace_hop(item, route)
        answer = await self._lua.call(
            scripts.HANDOFF,
            [
                keys.leader(m),
                keys.job(m, job.id),
                item.stream,
                keys.jobs(m, worker),
                keys.load(m, worker),
                keys.lease(m, worker),
            ],
            [
                self._token,
                item.entry,
                wire.encode_job(replace(job, trace=trace.carrier) if trace.carrier else job),
                job.attempt,
                job.cost_tokens,
                view.record.kv_tokens,
                view.record.max_jobs,
            ],
        )
        trace.end(answer.decode())
        await self._conclude(answer, item, worker)

    async def _conclude(self, answer: bytes, item: Queued, worker: str) -> None:
        """What the hand-off's answer means for the queue and the picture of the worker."""
        job = item.job
        match answer:
            case b"ok":
                self.queue.remove(job.id)
                self.roster.adjust(worker, job.cost_tokens, 1)
            case b"cancelled":
                self.queue.remove(job.id)
                await self._end(item, Finish(FinishReason.CANCELLED))
            case b"stale" | b"taken":
                self.queue.remove(job.id)
                await self._redis.xdel(item.stream, item.entry)
            case b"gone":
                self.roster.forget(worker)
                self._refresh_now.set()
            case b"full":
                await self.roster.refresh_load(worker)
            case _:
                raise Deposed

    async def _end(self, item: Queued, finish: Finish) -> None:
        """End a job that no worker has."""
        job, m = item.job, self._model
        delta = Delta(job.id, job.attempt, len(job.logged), (), finish)
        await self._lua.call(
            scripts.FINISH,
            [
                keys.job(m, job.id),
                item.stream,
                keys.load(m, ""),
                keys.replies(m, job.gateway),
                keys.events(m),
                keys.lease(m, ""),
            ],
            [
                job.attempt,
                item.entry,
                wire.encode_deltas([delta]),
                0,
                keys.JOB_LINGER_MS,
                keys.REPLIES_TTL_MS,
                wire.pack(["ended", job.id]),
            ],
        )

    def _trace_hop(self, item: Queued, route: Route) -> _Hop:
        return _Hop(item, route, self._clock.wall_ns()) if telemetry.enabled() else _NO_HOP


class _Hop:
    """The dispatch spans of one hand-off: process (consumer) → route, send (producer)."""

    carrier: dict[str, str]

    def __init__(self, item: Queued | None, route: Route | None, now_ns: int) -> None:
        self.carrier = {}
        self._spans: list[Span] = []
        if item is None or route is None:
            return
        job = item.job
        process = telemetry.consumer_span(f"process intake {job.model}", job.trace, item.queued_ns)
        process.set_attributes(
            {
                "messaging.destination.name": item.stream,
                "messaging.message.id": item.entry,
                "headrace.job.id": job.id,
                "headrace.job.attempt": job.attempt,
                "headrace.queue.wait_ms": (now_ns - item.queued_ns) / 1e6,
                "headrace.band": job.band.label,
                "headrace.rescued_from": item.rescued_from,
            }
        )
        route_span = telemetry.tracer().start_span("route", telemetry.under(process))
        route_span.set_attributes(route_attributes(route))
        route_span.end()
        send = telemetry.tracer().start_span(
            f"send jobs {job.model}",
            telemetry.under(process),
            SpanKind.PRODUCER,
            {
                "messaging.system": "redis",
                "messaging.operation.type": "send",
                "messaging.destination.name": keys.jobs(job.model, route.worker),
                "headrace.worker": route.worker,
            },
        )
        self.carrier = telemetry.inject(send)
        self._spans = [send, process]

    def end(self, answer: str) -> None:
        for span in self._spans:
            span.set_attribute("headrace.handoff", answer)
            span.end()


_NO_HOP = _Hop(None, None, 0)


def route_attributes(route: Route) -> dict[str, str | list[str]]:
    """A routing decision, readable in a trace viewer."""
    return {
        "headrace.route.worker": route.worker,
        "headrace.route.reason": route.reason,
        "headrace.route.scores": [
            f"{s.rank}. {s.worker}: {s.verdict}, {s.reserved_jobs} jobs, {s.reserved_tokens} tokens"
            for s in route.scores
        ],
    }
