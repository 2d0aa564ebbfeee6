"""One model as a gateway sees it: its record, its board, its reply stream, its dispatcher.

Invariant: `submit` returns only when the job stands in the intake stream; until then the caller
gets an error and nothing runs. The board is polled, so admission costs no round trip.
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

from headrace import keys, scripts, telemetry, wire, wire_reports
from headrace.clock import Clock
from headrace.errors import DependencyError, WireError
from headrace.streams import REDIS_DOWN, Scripts, as_bytes
from headrace.types import Band, Board, Job, ModelRecord
from headrace_gateway.dispatcher import Dispatcher
from headrace_gateway.generation import Generation
from headrace_gateway.places import Places
from headrace_gateway.policy.admission import (
    Admission,
    AdmissionFacts,
    AdmissionLimits,
    Ask,
    PerBand,
    ask_of,
    decide,
)
from headrace_gateway.policy.fetching import PART_DEFAULT, part_of, spared_by
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.policy.shared_index import SharedIndex
from headrace_gateway.replies import Replies
from headrace_gateway.shared_flights import SharedFlights
from headrace_gateway.shared_watch import SharedWatch

log = structlog.get_logger()

BOARD_EVERY_MS = 200
TRIM_EVERY_MS = 2_000
HELD_BLOCKS_MAX = 131_072
"""Blocks in the cache services that admission knows of, some 100 bytes each. Of more it knows a
part, and takes the others for blocks to compute."""
KEEP_EVERY_MS = 3_000
ACCEPT_TRIES = 3
CANCEL_TRIES = 5
RETRY_S = 0.2


class Channel:
    """Everything a gateway keeps for one model."""

    def __init__(
        self,
        url: str,
        redis: Redis,
        record: ModelRecord,
        gateway_id: str,
        clock: Clock,
        limits: AdmissionLimits,
    ) -> None:
        model = record.name
        self.record = record
        self._redis = redis
        self._lua = Scripts(redis)
        self._clock = clock
        self._limits = limits
        self.replies = Replies(url, redis, model, gateway_id, clock)
        self.dispatcher = Dispatcher(url, redis, model, gateway_id, clock)
        self.board: Board | None = None
        self.board_error = ""
        self.places = Places(redis, model, gateway_id, self.replies.live, lambda: self.board, clock)
        self.flights = SharedFlights(url, redis, model, gateway_id, lambda: self.board, clock)
        self.lengths = Lengths()
        self._held = SharedIndex(HELD_BLOCKS_MAX)
        self._held_watch = SharedWatch(url, redis, model, self._held)
        self._recent = _Recent()
        self._chores: set[asyncio.Task[None]] = set()

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        """The loops that run as long as the gateway does."""
        return [
            self.replies.run(),
            self.dispatcher.run(),
            self._poll_board(),
            self.places.run(),
            self.flights.run(),
            self._held_watch.run(),
            self._trim_loop(),
            self._keep_loop(),
        ]

    @property
    def calm(self) -> bool:
        """Whether nobody waits for a worker, as far as is known."""
        board = self.board
        if self.board_error or board is None or not board.workers:
            return False
        return not any(board.queued)

    def held_tokens(self, blocks: bytes) -> int:
        """Tokens of a prompt of these `blocks` that fetching spares; costs no round trip."""
        if not self._held:
            return 0
        board = self.board
        part = PART_DEFAULT if board is None else part_of(board.prefill_per_s, board.fetched_per_s)
        return spared_by(self._held, blocks, 0, part).tokens

    def admit(self, ask: Ask) -> Admission:
        """Whether `ask` may enter as things stand; costs no round trip and changes nothing."""
        if self.board_error:
            return Admission(
                503, "unavailable", f"the queue is out of reach: {self.board_error}", 1_000
            )
        facts = AdmissionFacts(
            self.board,
            self._recent.jobs,
            self._recent.work,
            len(self.replies.live),
            self.lengths.token_ms,
        )
        return decide(ask, facts, self._limits)

    async def submit(self, job: Job, span: Span) -> Generation:
        """Admit `job` and make it durable. Raises OverloadError (429) or DependencyError (503)."""
        ask = ask_of(job, self._clock.wall_ms())
        admission = self.admit(ask)
        if not telemetry.enabled():
            return await self._enter(job, ask, admission)
        send = telemetry.tracer().start_span(
            f"send intake {job.model}",
            telemetry.under(span),
            SpanKind.PRODUCER,
            {
                "messaging.system": "redis",
                "messaging.operation.type": "send",
                "messaging.destination.name": keys.intake(job.model),
                "headrace.job.id": job.id,
                "headrace.admission.reason": admission.reason,
                "headrace.admission.uncached_tokens": ask.uncached_tokens,
            },
        )
        try:
            if not admission.admitted:
                send.set_attribute("headrace.admission.code", admission.code)
            return await self._enter(replace(job, trace=telemetry.inject(send)), ask, admission)
        finally:
            send.end()

    def _enter(self, job: Job, ask: Ask, admission: Admission) -> Coroutine[Any, Any, Generation]:
        if not admission.admitted:
            raise admission.refusal()
        self._recent.note(ask)
        return self._accept(job)

    async def _accept(self, job: Job) -> Generation:
        generation = Generation(job, self._drop)
        self.replies.live[job.id] = generation
        try:
            generation.accepted_id = await self._place(job) or await self._accept_durably(job)
        except BaseException:
            # the outcome may be unknown (time-out, client gone): whatever was stored is cancelled
            self.replies.live.pop(job.id, None)
            self._start_chore(self._cancel_durably(job))
            raise
        return generation

    async def _place(self, job: Job) -> str:
        """Straight to a worker, where this gateway leads and nobody waits.

        '' where that is not so, or where it is not known what came of it.
        """
        with contextlib.suppress(*REDIS_DOWN):
            return await self.dispatcher.place(job)
        return ""

    async def _accept_durably(self, job: Job) -> str:
        payload = wire.encode_job(job)
        names = [keys.job(job.model, job.id), keys.intake(job.model)]
        for tried in range(ACCEPT_TRIES):
            try:
                return await self._lua.accept(names, payload, keys.JOB_TTL_MS, job.attempt)
            except REDIS_DOWN as error:
                if tried + 1 == ACCEPT_TRIES:
                    raise DependencyError(
                        "the queue is out of reach, nothing was accepted", retry_after_ms=1_000
                    ) from error
                await asyncio.sleep(RETRY_S)
        raise AssertionError("the loop returns or raises")

    async def _drop(self, generation: Generation) -> None:
        self.replies.live.pop(generation.job.id, None)
        self._start_chore(self._cancel_durably(generation.job))

    def _start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _cancel_durably(self, job: Job) -> None:
        names = [keys.job(job.model, job.id), keys.intake(job.model)]
        for attempt in range(CANCEL_TRIES):
            try:
                await self._lua.call(scripts.CANCEL, names, [job.id])
                return
            except REDIS_DOWN:
                await asyncio.sleep(RETRY_S * 2**attempt)
        log.warning("cancel could not be stored; the job runs to its end", job=job.id)

    async def settle(self) -> None:
        """Wait for cancels that are on their way."""
        await self.flights.settle()
        if self._chores:
            await asyncio.wait(set(self._chores))

    async def _poll_board(self) -> None:
        while True:
            try:
                raw = await self._redis.get(keys.board(self.record.name))
                self._note_board(wire_reports.decode_board(as_bytes(raw)) if raw else None)
                self.board_error = ""
            except REDIS_DOWN as error:
                self.board_error = f"{type(error).__name__}: {error}"
            except WireError as error:
                self.board_error = error.message
            await asyncio.sleep(BOARD_EVERY_MS / 1000)

    def _note_board(self, board: Board | None) -> None:
        if board is None or self.board is None or board.published_ms != self.board.published_ms:
            self._recent = _Recent()
        self.board = board

    async def _keep_loop(self) -> None:
        """Accept again what Redis has lost: its last second, after a crash (appendfsync everysec).

        A job is lost when its record is missing twice in a row; a finished one's lingers much
        longer than its finish takes to arrive here.
        """
        missing: set[str] = set()
        while True:
            await asyncio.sleep(KEEP_EVERY_MS / 1000)
            with contextlib.suppress(*REDIS_DOWN, DependencyError):
                missing = await self._keep(missing)

    async def _keep(self, missing_before: set[str]) -> set[str]:
        live = [g for g in self.replies.live.values() if g.accepted_id]
        pipe = self._redis.pipeline(transaction=False)
        for generation in live:
            pipe.exists(keys.job(generation.job.model, generation.job.id))
        there = await pipe.execute() if live else []
        missing = {g.job.id for g, found in zip(live, there, strict=True) if not found}
        for generation in live:
            if generation.job.id in missing & missing_before and not generation.ended:
                job = generation.next_attempt()
                log.warning("redis lost a job, accepting it again", job=job.id)
                generation.accepted_id = await self._accept_durably(job)
                missing.discard(job.id)
                if job.id not in self.replies.live:  # its client left meanwhile
                    self._start_chore(self._cancel_durably(job))
        return missing

    async def _trim_loop(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_DOWN):
                await self.replies.trim()
            await asyncio.sleep(TRIM_EVERY_MS / 1000)


class _Recent:
    """Jobs and work that were accepted here since the last board, by Band."""

    def __init__(self) -> None:
        self._jobs = [0] * len(Band)
        self._work = [0] * len(Band)

    def note(self, ask: Ask) -> None:
        self._jobs[ask.band] += 1
        self._work[ask.band] += ask.work_tokens

    @property
    def jobs(self) -> PerBand:
        return self._jobs[0], self._jobs[1], self._jobs[2]

    @property
    def work(self) -> PerBand:
        return self._work[0], self._work[1], self._work[2]
