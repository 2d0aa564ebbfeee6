"""Sends what the engine made into the reply streams: all new tokens of a step in one XADD.

Invariant: frames leave in step order, and a frame is kept until Redis has it. Sending again after
an unknown outcome is harmless: readers drop positions they have, the finish script runs once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from headrace import keys, scripts, wire
from headrace.streams import REDIS_DOWN, link_of
from headrace.types import Delta, JobDone, JobMoved, JobProgress
from headrace.wire_reports import encode_done, encode_moved
from headrace_worker.line import Line

log = structlog.get_logger()

PARTS_MERGED_MAX = 64
RETRY_S_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where a job's output goes. `entry` is its place in this worker's job stream."""

    job: str
    worker: str
    entry: str
    gateway: str
    attempt: int
    cost_tokens: int


@dataclass(frozen=True, slots=True)
class Addressed:
    """One delta and where it goes; `progress` is what the end of a job tells the dispatcher."""

    delta: Delta
    to: Delivery
    progress: JobProgress | None = None


@dataclass(frozen=True, slots=True)
class Moving:
    """A job that goes on at `target`, where it stands at `to`: behind all that was put before.

    `job` is what it reads there, `fence` ends the attempt here. No more than `tokens_max` and
    `jobs_max` may be reserved there. `answer` is the script's.
    """

    to: Delivery
    target: str
    job: bytes
    fence: Delta
    progress: JobProgress
    tokens_max: int
    jobs_max: int
    answer: asyncio.Future[str]


class Publisher:
    """One task that empties the outbox. `on_sent` is called with the number of steps sent.

    `line`: on which the engine's thread sends some steps itself. The task sends nothing while any
    of that is unanswered, and sends again what got lost there.
    """

    def __init__(
        self,
        redis: Redis,
        model: str,
        on_sent: Callable[[int], None],
        line: Line[list[Addressed]] | None = None,
    ) -> None:
        self._redis = redis
        self._model = model
        self._on_sent = on_sent
        self._line = line
        self._outbox: deque[tuple[list[Addressed | Moving], int]] = deque()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._finish_sha = ""
        self._move_sha = ""

    def put(self, deltas: Iterable[Addressed], steps: int) -> None:
        """Queue deltas that `steps` engine steps made (0: made without the engine).

        Bounded by the engine thread's own run-ahead, and by the jobs a worker may hold.
        """
        self._outbox.append((list(deltas), steps))
        self._idle.clear()
        self._news.set()

    def put_now(self, step: list[Addressed]) -> bool:
        """Send tokens of running jobs from the calling thread; False where they have to be put.

        The caller has seen all it put before leave, and calls in one thread only.
        """
        if self._line is None:
            return False
        running: dict[str, list[Delta]] = {}
        for item in step:
            running.setdefault(item.to.gateway, []).append(item.delta)
        return self._line.send(self._frames(running), step)

    async def move(self, moving: Moving) -> str:
        """Move a job behind everything that was put before; what the script says of it."""
        self._outbox.append(([moving], 0))
        self._idle.clear()
        self._news.set()
        return await moving.answer

    async def flushed(self) -> None:
        """Wait until Redis has everything."""
        await self._idle.wait()

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._outbox:
                    await self._send_some()
                self._idle.set()
        finally:
            if self._line is not None:
                self._line.close()

    async def _send_some(self) -> None:
        lost = [] if self._line is None else await self._line.settle()
        count = min(len(self._outbox), PARTS_MERGED_MAX)
        parts = [self._outbox[index] for index in range(count)]
        batch: list[Addressed | Moving] = [item for step in lost for item in step]
        await self._send_until_done(batch + [item for deltas, _ in parts for item in deltas])
        for _ in range(count):
            self._outbox.popleft()
        self._on_sent(sum(steps for _, steps in parts))
        if self._line is not None:
            self._line.open_soon()

    async def _send_until_done(self, batch: list[Addressed | Moving]) -> None:
        failures = 0
        while batch:
            try:
                await self._send(batch)
                return
            except REDIS_DOWN as error:
                failures += 1
                if failures == 1:
                    log.warning("redis is away, tokens wait", error=str(error))
                await asyncio.sleep(min(0.05 * 2**failures, RETRY_S_MAX))

    async def _send(self, batch: list[Addressed | Moving]) -> None:
        """One round trip: an XADD per reply stream, then a script per job that ended or moves."""
        if not self._finish_sha:
            self._finish_sha = str(await self._redis.script_load(scripts.FINISH))
            self._move_sha = str(await self._redis.script_load(scripts.MOVE))
        running: dict[str, list[Delta]] = {}
        endings, moves = [], []
        for item in batch:
            if isinstance(item, Moving):
                moves.append(item)
            elif item.delta.finish is None:
                running.setdefault(item.to.gateway, []).append(item.delta)
            else:
                endings.append(item)
        commands = self._frames(running)
        commands += [self._finish(item) for item in endings]
        commands += [self._move(moving) for moving in moves]
        answers = await link_of(self._redis).many(commands)
        for answer in answers:
            if isinstance(answer, NoScriptError):
                self._finish_sha = ""
            if isinstance(answer, Exception):
                raise answer
        for moving, answer in zip(moves, answers[len(answers) - len(moves) :], strict=True):
            if not moving.answer.done():
                moving.answer.set_result(answer.decode())

    def _frames(self, running: Mapping[str, list[Delta]]) -> list[tuple[Any, ...]]:
        """Commands that tell gateways of jobs that go on."""
        return [
            ("XADD", keys.replies(self._model, gateway), "*", "d", wire.encode_deltas(frame))
            for gateway, deltas in running.items()
            for frame in _frames(deltas)
        ]

    def _finish(self, item: Addressed) -> tuple[Any, ...]:
        m, to, finish = self._model, item.to, item.delta.finish
        assert finish is not None and item.progress is not None, "only ends are finished"
        names = [
            keys.job(m, to.job),
            keys.jobs(m, to.worker),
            keys.load(m, to.worker),
            keys.replies(m, to.gateway),
            keys.events(m),
            keys.lease(m, to.worker),
        ]
        return (
            "EVALSHA",
            self._finish_sha,
            len(names),
            *names,
            to.attempt,
            to.entry,
            wire.encode_deltas([item.delta]),
            to.cost_tokens,
            keys.JOB_LINGER_MS,
            keys.REPLIES_TTL_MS,
            encode_done(JobDone(to.worker, item.progress, finish.reason)),
        )

    def _move(self, item: Moving) -> tuple[Any, ...]:
        m, to, target = self._model, item.to, item.target
        names = [
            keys.job(m, to.job),
            keys.jobs(m, to.worker),
            keys.load(m, to.worker),
            keys.lease(m, to.worker),
            keys.jobs(m, target),
            keys.load(m, target),
            keys.lease(m, target),
            keys.replies(m, to.gateway),
            keys.events(m),
        ]
        return (
            "EVALSHA",
            self._move_sha,
            len(names),
            *names,
            to.attempt,
            to.entry,
            item.job,
            wire.encode_deltas([item.fence]),
            to.cost_tokens,
            item.tokens_max,
            item.jobs_max,
            keys.REPLIES_TTL_MS,
            encode_moved(JobMoved(to.worker, target, item.progress)),
        )


def _joined(deltas: list[Delta]) -> list[Delta]:
    """What several steps made of a job as one delta, where this fell behind them."""
    made: dict[str, Delta] = {}
    whole: list[Delta] = []
    for delta in deltas:
        last = made.get(delta.job)
        if last is None or not _goes_on(last, delta):
            if last is not None:
                whole.append(last)
            made[delta.job] = delta
        else:
            made[delta.job] = replace(
                last,
                tokens=last.tokens + delta.tokens,
                logprobs=last.logprobs + delta.logprobs,
                cache_write_tokens=max(last.cache_write_tokens, delta.cache_write_tokens),
            )
    return whole + list(made.values())


def _goes_on(last: Delta, delta: Delta) -> bool:
    """Whether `delta` may stand behind `last` in one: the same attempt, no token between them."""
    adjoins = last.first + len(last.tokens) == delta.first and last.attempt == delta.attempt
    alike = bool(last.logprobs) == bool(delta.logprobs) or not (last.tokens and delta.tokens)
    return adjoins and alike and bool(last.tokens) and not delta.prompt_logprobs


def _frames(deltas: list[Delta]) -> list[list[Delta]]:
    """One frame for all, but for those with a prompt's logprobs, which may be megabytes each.

    They are the first deltas of their jobs, so they can go first.
    """
    large = [[delta] for delta in deltas if delta.prompt_logprobs]
    rest = _joined([delta for delta in deltas if not delta.prompt_logprobs])
    return [*large, rest] if rest else large
