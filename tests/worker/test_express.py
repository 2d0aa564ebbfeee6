"""Steps that the engine's thread sends itself: in order, once, and never lost with a connection."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.policy.reply_log import ReplyLog
from headrace.streams import connect, parse_entries
from headrace.types import Delta, Finish, FinishReason, TokenLogprobs
from headrace_worker.express import STREAMS_MAX, Express
from headrace_worker.line import WAITING_MAX, Line
from headrace_worker.publisher import Addressed, Delivery, Publisher
from headrace_worker.results import StepResult
from headrace_worker.ticket import Ticket
from support.fleet import eventually
from support.valkey import Valkey
from worker.builders import make_job

M = "test"
TO = Delivery("j", "w", "1-0", "g", 1, 10)


class Way:
    """A publisher of one job's tokens, which numbers them, and its line."""

    def __init__(self, redis: Redis, publisher: Publisher, line: Line[list[Addressed]]) -> None:
        self.redis, self.publisher, self.line = redis, publisher, line
        self.said = 0

    def _next(self) -> list[Addressed]:
        return [Addressed(Delta("j", 1, self.said, (self.said,)), TO)]

    def now(self) -> bool:
        """The next token, from another thread if that can be."""
        went = self.publisher.put_now(self._next())
        self.said += went
        return went

    def put(self) -> None:
        self.publisher.put(self._next(), steps=1)
        self.said += 1

    async def open(self) -> None:
        """As soon as the loop's own connection has sent something."""

        async def opened() -> bool:
            self.put()
            await self.publisher.flushed()
            return self.now()

        await eventually(opened)

    async def frames(self) -> list[list[int]]:
        rows = parse_entries(await self.redis.xrange(keys.replies(M, "g")))
        return [[t for d in wire.decode_deltas(row.data) for t in d.tokens] for row in rows]


@asynccontextmanager
async def a_way(valkey: Valkey) -> AsyncIterator[Way]:
    redis, line = connect(valkey.url), Line[list[Addressed]](valkey.url)
    publisher = Publisher(redis, M, lambda _steps: None, line)
    running = asyncio.create_task(publisher.run())
    way = Way(redis, publisher, line)
    yield way
    line.check_integrity()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await redis.aclose()


async def test_what_is_sent_now_and_what_is_put_arrive_in_step_order(valkey: Valkey) -> None:
    async with a_way(valkey) as way:
        assert not way.now(), "there is no connection yet: the loop has to send it"
        await way.open()
        for number in range(20):
            if number % 7 == 3:
                way.put()
                await way.publisher.flushed()
            else:
                assert await asyncio.to_thread(way.now)
        assert await way.line.settle() == []
        assert await way.frames() == [[token] for token in range(way.said)]


async def test_what_a_broken_connection_did_not_answer_is_sent_again(valkey: Valkey) -> None:
    """Redis stands still, takes some steps unread, and dies; a later one finds all of them."""
    async with a_way(valkey) as way:
        await way.open()
        assert await way.line.settle() == []
        assert valkey.process is not None
        valkey.process.send_signal(signal.SIGSTOP)
        for _ in range(5):
            assert way.now()
        valkey.kill()
        valkey.start()
        way.put()
        await way.publisher.flushed()
        log = ReplyLog()
        for row in parse_entries(await way.redis.xrange(keys.replies(M, "g"))):
            for delta in wire.decode_deltas(row.data):
                log.accept(delta)
        assert log.tokens == list(range(way.said))
        await way.open()  # and it is there again


async def test_an_error_that_redis_answers_is_no_delivery(valkey: Valkey) -> None:
    async with a_way(valkey) as way:
        await way.open()
        assert await way.line.settle() == []
        await way.redis.rename(keys.replies(M, "g"), "kept")
        await way.redis.set(keys.replies(M, "g"), "no stream")
        assert way.now()
        [[lost]] = await way.line.settle()
        assert lost.delta.first == way.said - 1
        assert not way.now(), "the loop has a try first"


async def test_a_redis_that_stands_still_gets_no_more_than_the_limit(valkey: Valkey) -> None:
    async with a_way(valkey) as way:
        await way.open()
        assert await way.line.settle() == []
        assert valkey.process is not None
        valkey.process.send_signal(signal.SIGSTOP)
        assert [way.now() for _ in range(WAITING_MAX + 1)] == [True] * WAITING_MAX + [False]
        valkey.process.send_signal(signal.SIGCONT)
        assert await way.line.settle() == []
        assert await way.frames() == [[token] for token in range(way.said)]


END = Finish(FinishReason.STOP)


@pytest.mark.parametrize(
    "deltas",
    [
        [Delta("j", 1, 0, (1,), END)],
        [Delta("j", 1, 0, (1,)), Delta("k", 1, 5, (1,), END)],
        [Delta("j", 1, 0, (1,), prompt_logprobs=(TokenLogprobs(-1.0),))],
        [Delta("j", 2, 0, (1,))],
        [Delta("another", 1, 0, (1,))],
        [Delta("j", 1, 0, (1,))] * (STREAMS_MAX + 1),
    ],
    ids=["an end", "one of them", "a prompt's logprobs", "an attempt", "gone", "many"],
)
async def test_a_step_that_is_more_than_tokens_of_few_goes_through_the_loop(
    valkey: Valkey, deltas: list[Delta]
) -> None:
    async with a_way(valkey) as way:
        await way.open()
        job = make_job("j", range(20), max_tokens=30)
        tickets = {name: Ticket(job, TO, INVALID_SPAN) for name in ("j", "k")}
        express = Express(tickets, way.publisher, None)
        assert await way.line.settle() == []
        before = await way.frames()
        assert not express.take(StepResult(deltas, [], []))
        assert await way.line.settle() == []
        assert await way.frames() == before
        assert express.take(StepResult([Delta("j", 1, way.said, (way.said,))], [], []))
        assert await way.line.settle() == []
        assert await way.frames() == [*before, [way.said]]
