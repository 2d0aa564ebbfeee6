"""One leader's term: the loops that feed the policy with facts and carry out what it decides.

Invariant: whoever leads writes the tenants' counters, the board and the places; a hand-off is
booked before Redis is asked and taken back when Redis refuses, so that a batch of them travels in
one round trip. An event that was lost costs accuracy until the next reconciliation, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from headrace import keys, scripts, telemetry, wire, wire_reports
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.streams import Entry, Scripts, Tail, link_of
from headrace.types import (
    NOT_MOVED,
    Board,
    Delta,
    Finish,
    FinishReason,
    Job,
    JobDone,
    JobMoved,
    Progress,
)
from headrace_gateway.fleet_watch import FleetWatch
from headrace_gateway.hops import Hop
from headrace_gateway.leadership import Deposed
from headrace_gateway.places import LISTED_MAX
from headrace_gateway.placing import Placing
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy, reason_of_lateness
from headrace_gateway.policy.fair_queue import Queued
from headrace_gateway.rescue import Rescuer
from headrace_gateway.roster import Roster
from headrace_gateway.shared_watch import SharedWatch

log = structlog.get_logger()

REFRESH_MS = 250
REFRESH_PER_WORKER_MS = 1
"""Reading 500 workers four times a second would keep a core busy."""
PLACES_MS = 500
PLACES_DUTY = 20
"""Telling places may take one part in so many of the time."""
HANDOFFS_MAX = 32
"""Hand-offs in one round trip."""
QUEUE_WAIT_MS_MAX = 6 * 3_600_000
"""A job that found no room for this long ends with an error: nobody waits for ever."""


class Term:
    """The queue, the roster and the loops that move jobs, from election to the end."""

    def __init__(
        self, url: str, redis: Redis, lua: Scripts, model: str, token: str, clock: Clock
    ) -> None:
        self._redis = redis
        self._lua = lua
        self._model = model
        self._token = token
        self._clock = clock
        self.policy = DispatchPolicy(explains=telemetry.enabled())
        self.roster = Roster(redis, model)
        self._watch = FleetWatch(redis, model, self.policy, self.roster, clock)
        self._shared = SharedWatch(url, redis, model, self.policy.shared.index)
        self._rescuer = Rescuer(redis, lua, model, token)
        self._intake = Tail(url, keys.intake(model))
        self._events = Tail(url, keys.events(model), after="$")
        self._placing = Placing(
            self.policy, lua, self._intake.stream, self._call, self._missed, clock
        )
        self._opened = False
        self._handing_off = False
        self._wake = asyncio.Event()
        self._refresh_now = asyncio.Event()
        self._places_ms = 0
        self._told: set[str] = set()

    async def open(self) -> None:
        """Take up what the last term left: counters, workers and what runs on them."""
        await self._events.settle()
        await self._watch.restore_counters()
        await self.roster.refresh()
        await self._watch.take_in()
        self._opened = True

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        """The loops of a term; all end when one fails."""
        return [
            self._read_intake(),
            self._read_events(),
            self._refresh_loop(),
            self._dispatch_loop(),
            self._shared.run(),
        ]

    async def close(self) -> None:
        """Let the readers' connections go, also when a stop arrives meanwhile."""
        self._opened = False
        closing = asyncio.gather(self._intake.close(), self._events.close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            raise

    async def _read_intake(self) -> None:
        async for entries in self._intake:
            for entry in entries:
                await self._take(entry)
            self._wake.set()

    async def _take(self, entry: Entry) -> None:
        stream = self._intake.stream
        if entry.kind == "cancel":
            item = self.policy.cancel(entry.data.decode(errors="replace"))
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
        item = Queued(job, stream, entry.id, self._clock.wall_ns())
        if not self._placing.meets(item):
            self.policy.push(item)

    async def place(self, job: Job) -> str:
        """Accept a new job of this gateway's and hand it off in one step; the id of its entry.

        '' where it has to wait for its turn: nothing was done then. Raises what redis-py raises.
        """
        if not self._opened or self._handing_off:
            return ""
        return await self._placing.place(job)

    def _missed(self, decision: Decision, answer: bytes) -> None:
        """A placement that came to nothing: look again where Redis knew better."""
        self.roster.adjust(decision.route.worker, -decision.item.job.cost_tokens, -1)
        if answer != b"behind":
            self._refresh_now.set()
        self._wake.set()

    async def _read_events(self) -> None:
        async for entries in self._events:
            for entry in entries:
                self._note(entry)
            self._wake.set()

    def _note(self, entry: Entry) -> None:
        try:
            event = wire_reports.decode_event(entry.data)
        except WireError as error:
            log.warning("event unreadable, skipped", model=self._model, error=error.message)
            return
        now = self._clock.wall_ms()
        if isinstance(event, Progress):
            self.policy.progress(event, now)
            self._watch.note_report(event.worker, event.sequence)
        elif isinstance(event, JobDone):
            self.policy.done(event, now)
        elif isinstance(event, JobMoved):
            self.policy.moved(event, now)
        else:
            self._refresh_now.set()

    async def _refresh_loop(self) -> None:
        while True:
            self._refresh_now.clear()
            await self.roster.refresh()
            await self._watch.take_in()
            for worker in self.roster.dead:
                await self._rescue(worker)
            await self._expire()
            await self._publish()
            await self._rebalance()
            if not len(self.policy.queue):
                self.policy.check_integrity()
            self._wake.set()
            pause_ms = REFRESH_MS + REFRESH_PER_WORKER_MS * len(self.roster.live)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_ms / 1000):
                    await self._refresh_now.wait()

    async def _rescue(self, worker: str) -> None:
        for rescued in await self._rescuer.rescue(worker):
            item = Queued(rescued.job, rescued.stream, rescued.entry, self._clock.wall_ns(), worker)
            if rescued.failure:
                await self._end(item, Finish(FinishReason.ERROR, error=rescued.failure))
            else:
                self.policy.push(item)
        if await self._rescuer.bury(worker):
            log.info("worker buried", model=self._model, worker=worker)

    async def _expire(self) -> None:
        limit_ns = QUEUE_WAIT_MS_MAX * 1_000_000
        for item in self.policy.queue.queued_before(self._clock.wall_ns() - limit_ns):
            self.policy.cancel(item.job.id)
            reason = f"no worker had room for this job within {QUEUE_WAIT_MS_MAX / 1000:.0f} s"
            await self._end(item, Finish(FinishReason.ERROR, error=reason))
        await self._end_late()

    async def _end_late(self) -> None:
        """Drop what has expired before anybody spends a prefill on it."""
        now = self._clock.wall_ms()
        for item in self.policy.late(now):
            self.policy.cancel(item.job.id)
            reason = reason_of_lateness(item, now)
            await self._end(item, Finish(FinishReason.DEADLINE, error=reason))

    async def _rebalance(self) -> None:
        """Tell a worker to change sides, behind the jobs that it has been sent."""
        change = self.policy.rebalance(self._clock.wall_ms())
        if change is not None:
            log.info("role changes", model=self._model, worker=change.worker, reason=change.reason)
            stream = keys.jobs(self._model, change.worker)
            await self._redis.xadd(stream, {"role": change.role.value})

    async def _publish(self) -> None:
        now = self._clock.wall_ms()
        outlook = self.policy.outlook(now)
        board = Board(
            leader=self._token,
            published_ms=now,
            queued=outlook.queued,
            queued_work=outlook.queued_work,
            waits_ms=outlook.waits_ms,
            capacity_tokens=self.roster.capacity_tokens,
            reserved_tokens=self.roster.reserved_tokens,
            workers=self.roster.ready_count,
            work_per_s=outlook.work_per_s,
            prefill_per_s=outlook.prefill_per_s,
            band_work_per_s=outlook.band_work_per_s,
            free_jobs=self.policy.workload.free_jobs,
            fetched_per_s=self.policy.shared.fetched_per_s,
        )
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(keys.board(self._model), wire_reports.encode_board(board), px=keys.BOARD_TTL_MS)
        self._watch.save_counters(pipe)
        if now >= self._places_ms and (len(self.policy.queue) or self._told):
            self._tell_places(pipe, now)
        await pipe.execute()

    def _tell_places(self, pipe: Any, now: int) -> None:
        began = self._clock.now_ms()
        places = self.policy.places(LISTED_MAX, now)
        for gateway in sorted(self._told - places.keys()):
            pipe.delete(keys.places(self._model, gateway))
        for gateway, positions in places.items():
            raw = wire_reports.encode_positions(positions)
            pipe.set(keys.places(self._model, gateway), raw, px=keys.PLACES_TTL_MS)
        self._told = set(places)
        self._places_ms = now + max(PLACES_MS, PLACES_DUTY * (self._clock.now_ms() - began))

    async def _dispatch_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._end_late()
            self._handing_off = True
            while batch := self._decide():
                await self._hand_off(batch)
            self._handing_off = False

    def _decide(self) -> list[Decision]:
        """The next hand-offs, booked already."""
        batch: list[Decision] = []
        now = self._clock.wall_ms()
        while len(batch) < HANDOFFS_MAX and (decision := self.policy.next(now)) is not None:
            self.policy.handed_off(decision, now)
            batch.append(decision)
        return batch

    async def _hand_off(self, batch: list[Decision]) -> None:
        hops = [Hop(decision, self._clock.wall_ns()) for decision in batch]
        calls = [
            self._call(decision, hop, decision.item.entry)
            for decision, hop in zip(batch, hops, strict=True)
        ]
        sha = self._lua.sha(scripts.HANDOFF)
        answers = await link_of(self._redis).many(
            [("EVALSHA", sha, len(names), *names, *values) for names, values in calls]
        )
        for decision, hop, call, answer in zip(batch, hops, calls, answers, strict=True):
            if isinstance(answer, NoScriptError):
                answer = await self._lua.call(scripts.HANDOFF, *call)
            if isinstance(answer, Exception):
                raise answer
            hop.end(answer.decode())
            await self._conclude(answer, decision)

    def _call(self, decision: Decision, hop: Hop, second: Any) -> tuple[list[str], list[Any]]:
        """Keys and arguments of the scripts that hand off; `second` of them is a script's own.

        The limits are what we believe to be reserved, with this job on top: where Redis knows of
        more, somebody else has led, and we look again.
        """
        item, worker, m = decision.item, decision.route.worker, self._model
        cost = item.job.cost_tokens
        self.roster.adjust(worker, cost, 1)
        view = self.roster.live.get(worker)
        known, record = (view.load, view.record) if view else (None, None)
        names = [
            keys.leader(m),
            keys.job(m, item.job.id),
            item.stream,
            keys.jobs(m, worker),
            keys.load(m, worker),
            keys.lease(m, worker),
        ]
        tokens_max = max(known.reserved_tokens, record.kv_tokens) if known and record else cost
        jobs_max = max(known.reserved_jobs, record.max_jobs) if known and record else 1
        values = [
            self._token,
            second,
            wire.encode_job(self._sent(decision), decision.virtual, hop.carrier or None),
            item.job.attempt,
            cost,
            tokens_max,
            jobs_max,
        ]
        return names, values

    def _sent(self, decision: Decision) -> Job:
        """The job as its worker gets it: with where it goes on, or with nothing of that."""
        job, decode = decision.item.job, decision.pairing.decode
        address = self.roster.kv_address(decode) if decode else ""
        if not address and job.found_tokens == NOT_MOVED and not job.move_to:
            return job  # as nearly all are: a copy takes as long as a look at the queue
        return replace(
            job,
            move_to=decode if address else "",
            move_address=address,
            found_tokens=NOT_MOVED,
        )

    async def _conclude(self, answer: bytes, decision: Decision) -> None:
        """What the hand-off's answer means for the queue and the picture of the worker."""
        item, worker = decision.item, decision.route.worker
        if answer == b"ok":
            return
        self.policy.refused(decision, again=answer in (b"gone", b"full"))
        match answer:
            case b"cancelled":
                await self._end(item, Finish(FinishReason.CANCELLED))
            case b"stale" | b"taken":
                await self._redis.xdel(item.stream, item.entry)
            case b"gone":
                self.roster.forget(worker)
                self.policy.forget(worker)
                self._refresh_now.set()
            case b"full":
                await self.roster.refresh_load(worker)
                await self._watch.reconcile(worker)
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
                wire_reports.encode_news("ended", job.id),
            ],
        )
