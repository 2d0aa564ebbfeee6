"""The step that moves a running job: all of it or nothing, once, behind the tokens before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from headrace import keys, scripts, wire
from headrace.policy.reply_log import ReplyLog
from headrace.streams import Scripts, connect, parse_entries
from headrace.types import Delta, JobMoved, JobProgress
from headrace.wire_reports import decode_event
from headrace_worker.publisher import Addressed, Delivery, Moving, Publisher
from support.valkey import Valkey
from worker.builders import make_job

M = "test"
JOB = make_job("j", range(20), max_tokens=30)
COST = JOB.cost_tokens


class Scene:
    """A job on the worker p, and a worker d that may take it."""

    def __init__(self, redis: Redis, publisher: Publisher) -> None:
        self.redis = redis
        self.publisher = publisher
        self.entry = ""

    async def set(self) -> None:
        raw = wire.encode_job(JOB)
        self.entry = (await self.redis.xadd(keys.jobs(M, "p"), {"job": raw})).decode()
        stream = keys.jobs(M, "p")
        await self.redis.hset(
            keys.job(M, "j"), mapping={"attempt": 1, "intake": "1-0", "stream": stream}
        )
        await self.redis.hset(keys.load(M, "p"), mapping={"tokens": COST, "jobs": 1})
        for worker in ("p", "d"):
            await self.redis.set(keys.lease(M, worker), 1)

    def moving(self, *, tokens_max: int = 1_000, jobs_max: int = 4) -> Moving:
        to = Delivery("j", "p", self.entry, "g", 1, COST)
        return Moving(
            to,
            "d",
            wire.encode_job(JOB),
            Delta("j", 2, 3),
            JobProgress("j", 20, 0, 3),
            tokens_max,
            jobs_max,
            asyncio.get_running_loop().create_future(),
        )

    async def say(self, first: int, *tokens: int) -> None:
        to = Delivery("j", "p", self.entry, "g", 1, COST)
        self.publisher.put([Addressed(Delta("j", 1, first, tokens), to)], steps=0)

    async def at(self) -> list[str]:
        """The workers whose streams have the job."""
        return [w for w in ("p", "d") if await self.redis.xlen(keys.jobs(M, w))]

    async def held(self, worker: str) -> tuple[int, int]:
        tokens, jobs = await self.redis.hmget(keys.load(M, worker), "tokens", "jobs")
        return int(tokens or 0), int(jobs or 0)

    async def log(self) -> ReplyLog:
        log = ReplyLog()
        for entry in parse_entries(await self.redis.xrange(keys.replies(M, "g"))):
            for delta in wire.decode_deltas(entry.data):
                log.accept(delta)
        return log


@asynccontextmanager
async def a_scene(valkey: Valkey) -> AsyncIterator[Scene]:
    redis = connect(valkey.url)
    publisher = Publisher(redis, M, lambda _steps: None)
    running = asyncio.create_task(publisher.run())
    scene = Scene(redis, publisher)
    await scene.set()
    yield scene
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await redis.aclose()


async def test_a_move_stands_behind_the_tokens_before_it(valkey: Valkey) -> None:
    async with a_scene(valkey) as scene:
        await scene.say(0, 7, 8, 9)
        assert await scene.publisher.move(scene.moving()) == "ok"
        assert await scene.at() == ["d"]
        assert (await scene.held("p"), await scene.held("d")) == ((0, 0), (COST, 1))
        await scene.say(3, 66)  # what it still had to say
        await scene.publisher.flushed()
        log = await scene.log()
        assert (log.tokens, log.attempt) == ([7, 8, 9], 2)
        [event] = parse_entries(await scene.redis.xrange(keys.events(M)))
        assert decode_event(event.data) == JobMoved("p", "d", JobProgress("j", 20, 0, 3))
        facts = await scene.redis.hgetall(keys.job(M, "j"))
        assert (facts[b"attempt"], facts[b"stream"].decode()) == (b"2", keys.jobs(M, "d"))


async def test_a_move_whose_outcome_was_not_heard_may_be_asked_again(valkey: Valkey) -> None:
    async with a_scene(valkey) as scene:
        for _ in range(3):
            assert await scene.publisher.move(scene.moving()) == "ok"
        assert await scene.redis.xlen(keys.jobs(M, "d")) == 1
        assert await scene.held("d") == (COST, 1)
        assert await scene.redis.xlen(keys.replies(M, "g")) == 1, "one fence"


@pytest.mark.parametrize("why", ["gone", "full", "cancelled", "stale", "ended", "rescued"])
async def test_a_refused_move_changes_nothing(valkey: Valkey, why: str) -> None:
    async with a_scene(valkey) as scene:
        redis, limits, job = scene.redis, {}, keys.job(M, "j")
        match why:
            case "gone":
                await redis.delete(keys.lease(M, "d"))
            case "full":
                await redis.hset(keys.load(M, "d"), mapping={"tokens": 990, "jobs": 1})
                limits = {"tokens_max": 1_000}
            case "cancelled":
                await Scripts(redis).call(scripts.CANCEL, [job, keys.intake(M)], ["j"])
            case "stale":
                await redis.hset(job, "attempt", 2)
            case "ended":
                await redis.hset(job, "done", 1)
            case "rescued":
                await redis.xdel(keys.jobs(M, "p"), scene.entry)
        before = await everything(redis)
        answer = await scene.publisher.move(scene.moving(**limits))
        assert answer == {"ended": "stale", "rescued": "stale"}.get(why, why)
        assert await everything(redis) == before


async def everything(redis: Redis) -> list[object]:
    """All that the step may touch."""
    return [
        await redis.hgetall(keys.job(M, "j")),
        *[await redis.xrange(keys.jobs(M, w)) for w in ("p", "d")],
        *[await redis.hgetall(keys.load(M, w)) for w in ("p", "d")],
        await redis.xrange(keys.replies(M, "g")),
        await redis.xrange(keys.events(M)),
    ]
