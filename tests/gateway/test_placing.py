"""A new job straight to its worker, on a real Valkey: what it may overtake, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from headrace import keys, scripts, wire
from headrace.clock import SystemClock
from headrace.streams import Scripts, parse_entries
from headrace.types import Job
from headrace_gateway.channel import Channel
from headrace_gateway.leadership import Lease
from headrace_gateway.policy.admission import AdmissionLimits
from headrace_gateway.term import Term
from support.fleet import MODEL, ScriptedWorker, a_job, eventually
from support.valkey import Valkey

M = MODEL.name


@pytest.fixture
async def worker(redis: Redis) -> ScriptedWorker:
    worker = ScriptedWorker(redis, "w1")
    await worker.join()
    return worker


class Leading:
    """A term that knows its workers; its loops run when the test says so."""

    def __init__(self, valkey: Valkey, redis: Redis, token: str) -> None:
        self.redis = redis
        self.lua = Scripts(redis)
        self.term = Term(valkey.url, redis, self.lua, M, token, SystemClock())
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(part) for part in self.term.parts()]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.term.close()

    async def waiting(self) -> list[str]:
        """Ids of the jobs in the intake stream, in its order."""
        entries = parse_entries(await self.redis.xrange(keys.intake(M)))
        return [wire.decode_job(entry.data).id for entry in entries if entry.kind == "job"]

    async def reserved(self) -> tuple[int, int]:
        held = await self.redis.hmget(keys.load(M, "w1"), "tokens", "jobs")
        return int(held[0] or 0), int(held[1] or 0)

    def booked(self) -> list[str]:
        return self.term.policy.jobs_on("w1")

    def check(self) -> None:
        self.term.policy.check_integrity()


@pytest.fixture
async def leading(valkey: Valkey, redis: Redis, worker: ScriptedWorker) -> AsyncIterator[Leading]:
    lease = Lease(redis, Scripts(redis), M, "g1")
    assert await lease.take()
    made = Leading(valkey, redis, lease.token)
    await made.term.open()
    yield made
    await made.close()


async def accept(redis: Redis, job: Job) -> None:
    """What another gateway does."""
    names = [keys.job(M, job.id), keys.intake(M)]
    await Scripts(redis).accept(names, wire.encode_job(job), keys.JOB_TTL_MS)


async def names(worker: ScriptedWorker) -> list[str]:
    return [job.id for _, job in await worker.jobs()]


async def test_a_job_that_nobody_waits_before_goes_straight_to_its_worker(
    leading: Leading, worker: ScriptedWorker
) -> None:
    """Durable, reserved and booked as after a hand-off; what it leaves behind is its job record."""
    job = a_job("a", "g1")
    entry = await leading.term.place(job)
    assert await leading.waiting() == []
    [(at_worker, sent)] = await worker.jobs()
    assert (at_worker, sent.id, sent.attempt) == (entry, "a", 1)
    assert await leading.reserved() == (job.cost_tokens, 1)
    assert leading.booked() == ["a"]
    facts = await leading.redis.hgetall(keys.job(M, "a"))
    assert facts[b"stream"] == keys.jobs(M, "w1").encode()
    assert facts[b"intake"] == entry.encode()
    assert await leading.redis.pttl(keys.job(M, "a")) > 0
    assert await leading.lua.call(scripts.CANCEL, [keys.job(M, "a"), keys.intake(M)], ["a"]) == 1
    assert await worker.entries("cancel"), "a cancel finds it there"
    assert await worker.finish(at_worker, sent, 0, 1, 2)
    assert await leading.reserved() == (0, 0)
    leading.check()


async def test_it_overtakes_nobody_that_was_accepted_before(
    leading: Leading, worker: ScriptedWorker
) -> None:
    """Another gateway's job stands in the intake stream, not read yet: the new one goes behind."""
    await accept(leading.redis, a_job("first", "g2"))
    assert await leading.term.place(a_job("second", "g1"))
    assert await leading.waiting() == ["first", "second"]
    assert await names(worker) == []
    assert (leading.booked(), await leading.reserved()) == ([], (0, 0))
    leading.check()
    leading.start()
    await eventually(lambda: _has(worker, ["first", "second"]))
    assert sorted(leading.booked()) == ["first", "second"]


async def _has(worker: ScriptedWorker, expected: Sequence[str]) -> bool:
    return await names(worker) == list(expected)


async def test_nothing_is_sent_while_somebody_waits_here(
    leading: Leading, worker: ScriptedWorker
) -> None:
    """Five jobs are more than the worker takes; the sixth is left to be accepted as usual."""
    for number in range(4):
        assert await leading.term.place(a_job(f"j{number}", "g1"))
    assert await leading.term.place(a_job("full", "g1")) == "", "no worker has room"
    assert len(leading.term.policy.queue) == 0
    assert await leading.redis.exists(keys.job(M, "full")) == 0
    await accept(leading.redis, a_job("waits", "g2"))
    leading.start()
    await eventually(lambda: len(leading.term.policy.queue) == 1)
    assert await leading.term.place(a_job("behind", "g1")) == ""
    leading.check()


@pytest.mark.parametrize("what", ["deposed", "gone", "full"])
async def test_where_redis_knows_better_the_job_takes_its_turn(
    leading: Leading, worker: ScriptedWorker, what: str
) -> None:
    """Accepted all the same, in the intake stream, once; nothing is booked or reserved for it."""
    redis = leading.redis
    if what == "deposed":
        await redis.set(keys.leader(M), "somebody else")
    elif what == "gone":
        await redis.delete(keys.lease(M, "w1"))
    else:
        await redis.hset(keys.load(M, "w1"), mapping={"tokens": 990, "jobs": 4})
    before = await leading.reserved()
    assert await leading.term.place(a_job("a", "g1"))
    assert (await leading.waiting(), await names(worker)) == (["a"], [])
    assert (leading.booked(), await leading.reserved()) == ([], before)
    assert await redis.hget(keys.job(M, "a"), "stream") is None
    assert leading.term.roster.live["w1"].load.reserved_jobs == 0
    leading.check()


async def test_a_job_that_comes_back_before_its_answer_waits_once(
    leading: Leading, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of the intake stream may be faster than the answer that the job stands there."""
    call = leading.lua.call

    async def slow(source: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        answer = await call(source, names, args)
        if source == scripts.PLACE:
            for entry in parse_entries(await leading.redis.xrange(keys.intake(M))):
                await leading.term._take(entry)
                leading.term._intake.after = entry.id
            assert "second" not in leading.term.policy.queue, "it is booked: it must not wait too"
        return answer

    await accept(leading.redis, a_job("first", "g2"))
    monkeypatch.setattr(leading.lua, "send", slow)
    assert await leading.term.place(a_job("second", "g1"))
    assert len(leading.term.policy.queue) == 2
    leading.check()
    leading.start()
    await eventually(lambda: _has(worker, ["first", "second"]))
    await asyncio.sleep(0.1)
    assert sorted(leading.booked()) == ["first", "second"]
    leading.check()


@pytest.mark.parametrize("arrived", [True, False])
async def test_an_answer_that_is_lost_leaves_one_job(
    valkey: Valkey,
    redis: Redis,
    leading: Leading,
    worker: ScriptedWorker,
    monkeypatch: pytest.MonkeyPatch,
    arrived: bool,
) -> None:
    """Whether or not the script ran: accepting the job as usual finds out, and it runs once."""
    channel = Channel(valkey.url, redis, MODEL, "g1", SystemClock(), AdmissionLimits())
    channel.dispatcher.term = leading.term
    call = leading.lua.call

    async def lossy(source: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        if source != scripts.PLACE:
            return await call(source, names, args)
        if arrived:
            await call(source, names, args)
        raise RedisConnectionError("the answer is lost")

    monkeypatch.setattr(leading.lua, "send", lossy)
    polling = asyncio.create_task(channel._poll_board())
    await leading.term._publish()
    await eventually(lambda: channel.board is not None)
    generation = await channel.submit(a_job("a", "g1"), INVALID_SPAN)
    assert generation.accepted_id
    assert leading.booked() == [], "what is not known is not booked"
    leading.check()
    leading.start()
    await eventually(lambda: _has(worker, ["a"]))
    assert await leading.waiting() == []
    # the worker's stream tells of a job that nobody here has booked
    await eventually(lambda: leading.booked() == ["a"], limit_s=10)
    polling.cancel()
    await asyncio.gather(polling, return_exceptions=True)
    await channel.settle()


async def test_a_placed_job_is_handed_on_when_its_worker_dies(
    leading: Leading, worker: ScriptedWorker
) -> None:
    """With the tokens that its client has: its log is read from where it was placed."""
    assert await leading.term.place(a_job("a", "g1"))
    [(_, job)] = await worker.jobs()
    await worker.write(job, 0, 5, 6, 7)
    second = ScriptedWorker(leading.redis, "w2")
    await second.join()
    await leading.redis.delete(keys.lease(M, "w1"))
    leading.start()
    await eventually(lambda: _has(second, ["a"]), limit_s=10)
    [(_, again)] = await second.jobs()
    assert (again.attempt, list(again.logged)) == (2, [5, 6, 7])
