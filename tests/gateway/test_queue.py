"""The durable path on a real Valkey: accept, dispatch, hand-off, finish, and every way to die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis

from headrace import keys
from headrace.clock import SystemClock
from headrace.errors import DependencyError, JobFailedError, NotFoundError, OverloadError
from headrace.streams import Scripts
from headrace.types import FinishReason
from headrace_gateway import dispatcher, term
from headrace_gateway.fleet import Fleet
from headrace_gateway.generation import Generation
from headrace_gateway.leadership import Lease
from headrace_gateway.policy.admission import AdmissionLimits
from headrace_gateway.rescue import FRUITLESS_ATTEMPTS_MAX
from support.fleet import MODEL, ScriptedWorker, a_job, eventually
from support.valkey import Valkey


@pytest.fixture
async def worker(redis: Redis) -> ScriptedWorker:
    worker = ScriptedWorker(redis, "w1")
    await worker.join()
    return worker


async def a_fleet(valkey: Valkey, name: str, limits: AdmissionLimits | None = None) -> Fleet:
    fleet = Fleet(valkey.url, name, limits=limits)
    await fleet.start()
    await eventually(lambda: fleet.ready() == "")
    return fleet


@pytest.fixture
async def fleet(valkey: Valkey, worker: ScriptedWorker) -> AsyncIterator[Fleet]:
    fleet = await a_fleet(valkey, "g1")
    yield fleet
    await fleet.stop()


async def everything(generation: Generation) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        chunk = await generation.next()
        tokens += chunk.tokens
        if chunk.finish is not None:
            return tokens, chunk.finish.reason


async def idle(redis: Redis, worker: ScriptedWorker) -> bool:
    """No job stands anywhere and no room is reserved."""
    m = MODEL.name
    held = await redis.hmget(keys.load(m, worker.name), "tokens", "jobs")
    return (
        await redis.xlen(keys.intake(m)) == 0
        and await redis.xlen(keys.jobs(m, worker.name)) == 0
        and [int(value or 0) for value in held] == [0, 0]
    )


async def test_a_job_goes_through_and_leaves_nothing(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(entry, job)] = await worker.jobs()
    await worker.write(job, 0, 10, 11)
    await worker.write(job, 2, 12)
    assert await worker.finish(entry, job, 3, 13)
    assert await everything(generation) == ([10, 11, 12, 13], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, worker))
    assert not any(fleet.counts().values()), fleet.counts()


async def test_a_repeated_accept_changes_nothing(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """A producer that does not know whether its XADD arrived may send it again."""
    first = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    second = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    assert second.accepted_id == first.accepted_id
    await asyncio.sleep(0.3)
    assert len(await worker.jobs()) == 1


async def test_a_repeated_finish_counts_once(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    other = await fleet.submit(a_job("k", "g1"), INVALID_SPAN)
    await eventually(lambda: _has(worker, 2))
    entry, job = next((e, j) for e, j in await worker.jobs() if j.id == "j")
    assert await worker.finish(entry, job, 0, 5)
    assert not await worker.finish(entry, job, 0, 5)
    assert await everything(generation) == ([5], FinishReason.LENGTH)
    held = await redis.hgetall(keys.load(MODEL.name, "w1"))
    assert held == {b"tokens": str(other.job.cost_tokens).encode(), b"jobs": b"1"}


async def _has(worker: ScriptedWorker, count: int) -> bool:
    return len(await worker.jobs()) == count


async def test_a_dead_workers_job_goes_on_after_what_the_client_has(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """What the dead worker wrote before the fence counts, what it writes after it does not."""
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(old_entry, old)] = await worker.jobs()
    await worker.write(old, 0, 10, 11, 12)
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await worker.die()
    await eventually(heir.jobs)
    [(entry, job)] = await heir.jobs()
    assert (job.attempt, list(job.logged)) == (2, [10, 11, 12])
    await worker.write(old, 3, 66, 66)
    assert not await worker.finish(old_entry, old, 5, 66)
    await heir.write(job, 3, 13)
    assert await heir.finish(entry, job, 4, 14)
    assert await everything(generation) == ([10, 11, 12, 13, 14], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, heir))
    await eventually(lambda: _buried(redis, "w1"))
    assert await redis.exists(keys.jobs(MODEL.name, "w1"), keys.load(MODEL.name, "w1")) == 0


async def test_a_late_finish_of_a_fenced_attempt_takes_nothing_away(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """The dead worker's entry may be all that is left of the job while it waits for room."""
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(old_entry, old)] = await worker.jobs()
    await worker.write(old, 0, 10, 11)
    await worker.die()
    await eventually(lambda: _attempt_is(redis, "j", b"2"))
    assert not await worker.finish(old_entry, old, 2, 66)
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await eventually(heir.jobs)
    [(entry, job)] = await heir.jobs()
    assert list(job.logged) == [10, 11]
    assert await heir.finish(entry, job, 2, 12)
    assert await everything(generation) == ([10, 11, 12], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, heir))


async def _attempt_is(redis: Redis, job: str, attempt: bytes) -> bool:
    return await redis.hget(keys.job(MODEL.name, job), "attempt") == attempt


async def test_who_has_no_entry_of_a_job_cannot_end_it(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """A stale leader or worker may know the attempt, but not where the job stands now."""
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(entry, job)] = await worker.jobs()
    assert not await worker.finish("1-1", job, 0, 66)
    assert await worker.finish(entry, job, 0, 5)
    assert await everything(generation) == ([5], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, worker))


async def test_a_lapsed_lease_ends_the_term_even_when_nobody_leads(redis: Redis) -> None:
    """Somebody may have led in between: what the old term remembers may be untrue."""
    lua = Scripts(redis)
    paused, other = Lease(redis, lua, "m", "g1"), Lease(redis, lua, "m", "g2")
    assert await paused.take()
    assert await paused.renew()
    assert not await other.take()
    await redis.delete(keys.leader("m"))  # it ran out
    assert await other.take()
    await paused.release()
    assert await other.renew(), "only the holder can give a lease back"
    await other.release()
    assert not await paused.renew()


async def test_a_job_that_redis_lost_is_accepted_again(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """Redis comes back empty; the gateway still knows the job and what its client has."""
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(_, old)] = await worker.jobs()
    await worker.write(old, 0, 10, 11)
    first = await generation.next()
    await redis.flushall()
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await eventually(heir.jobs, limit_s=20)
    [(entry, job)] = await heir.jobs()
    assert (job.attempt, list(job.logged)) == (2, [10, 11])
    await worker.write(old, 2, 66)
    await heir.finish(entry, job, 2, 12)
    tokens, reason = await everything(generation)
    assert ([*first.tokens, *tokens], reason) == ([10, 11, 12], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, heir))


async def test_changes_of_leaders_are_no_deaths_of_workers(
    valkey: Valkey, worker: ScriptedWorker, redis: Redis
) -> None:
    """One worker died; the job waits for room through many terms, and is not blamed for them."""
    owner = await a_fleet(valkey, "g0")
    generation = await owner.submit(a_job("j", "g0"), INVALID_SPAN)
    await eventually(worker.jobs)
    await worker.die()
    for number in range(FRUITLESS_ATTEMPTS_MAX + 1):
        await eventually(lambda n=number: _attempt_at_least(redis, "j", n + 2))
        await redis.set(keys.leader(MODEL.name), "nobody", px=600)
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await eventually(heir.jobs)
    [(entry, job)] = await heir.jobs()
    await heir.finish(entry, job, 0, 3)
    assert await everything(generation) == ([3], FinishReason.LENGTH)
    await owner.stop()


async def _attempt_at_least(redis: Redis, job: str, attempt: int) -> bool:
    return int(await redis.hget(keys.job(MODEL.name, job), "attempt") or 0) >= attempt


@pytest.mark.parametrize("ticks", range(6))
async def test_a_stop_is_heard_while_a_term_falls_apart(
    valkey: Valkey, worker: ScriptedWorker, redis: Redis, ticks: int
) -> None:
    """A cancel that meets the failure of a loop of the term is not lost with it."""
    lead = dispatcher.Dispatcher(valkey.url, redis, MODEL.name, "g1", SystemClock())
    running = asyncio.create_task(lead.run())
    # in full swing: redis-py leaves a socket open when a cancel meets its handshake
    await eventually(lambda: redis.exists(keys.board(MODEL.name)))
    failed = asyncio.Event()

    async def fail(*_: object) -> None:
        failed.set()
        raise ConnectionError("redis is away")

    assert lead.term is not None
    lead.term.roster.refresh = fail  # type: ignore[method-assign]  # the failure of one loop
    await failed.wait()
    for _ in range(ticks):
        await asyncio.sleep(0)
    running.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()


async def test_a_job_may_outlive_several_workers(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    generation = await fleet.submit(a_job("j", "g1", tokens=50), INVALID_SPAN)
    current, written = worker, 0
    for number in range(2, 10):
        await eventually(current.jobs)
        [(_, job)] = await current.jobs()
        assert len(job.logged) == written
        await current.write(job, written, written, written + 1)
        written += 2
        heir = ScriptedWorker(redis, f"w{number}")
        await heir.join()
        await current.die()
        current = heir
    await eventually(current.jobs)
    [(entry, job)] = await current.jobs()
    await current.finish(entry, job, written, written)
    assert await everything(generation) == (list(range(written + 1)), FinishReason.LENGTH)


async def test_a_job_that_kills_its_workers_is_given_up(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    current = worker
    for number in range(2, FRUITLESS_ATTEMPTS_MAX + 2):
        await eventually(current.jobs)
        heir = ScriptedWorker(redis, f"w{number}")
        await heir.join()
        await current.die()
        current = heir
    with pytest.raises(JobFailedError, match="died without producing"):
        await everything(generation)
    await eventually(lambda: idle(redis, current))


async def test_cancel_finds_a_job_that_waits(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    running = [await fleet.submit(a_job(f"r{i}", "g1"), INVALID_SPAN) for i in range(4)]
    await eventually(lambda: _has(worker, 4))
    waiting = await fleet.submit(a_job("late", "g1"), INVALID_SPAN)
    await waiting.cancel()
    await eventually(lambda: _empty(redis))
    for entry, job in await worker.jobs():
        await worker.finish(entry, job, 0, 1)
    assert [await everything(g) for g in running] == [([1], FinishReason.LENGTH)] * 4
    await eventually(lambda: idle(redis, worker))


async def _empty(redis: Redis) -> bool:
    return await redis.xlen(keys.intake(MODEL.name)) == 0


async def test_cancel_follows_a_job_to_its_worker(fleet: Fleet, worker: ScriptedWorker) -> None:
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    await generation.cancel()
    await eventually(lambda: worker.entries("cancel"))
    assert [data for _, data in await worker.entries("cancel")] == [b"j"]


async def test_cancelled_while_its_worker_was_dead(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """The flag in the job's record outlives the stream the nudge was written to."""
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    await worker.die()
    await generation.cancel()
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await eventually(lambda: _buried(redis, "w1"))
    assert await heir.jobs() == []
    await eventually(lambda: idle(redis, heir))


async def _buried(redis: Redis, worker: str) -> bool:
    return not await redis.hexists(keys.workers(MODEL.name), worker)


async def test_only_as_many_jobs_as_fit_leave_the_queue(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    """Late binding: the rest waits where it can still be reordered."""
    generations = [await fleet.submit(a_job(f"j{i}", "g1"), INVALID_SPAN) for i in range(10)]
    await eventually(lambda: _has(worker, 4))
    await asyncio.sleep(0.3)
    assert len(await worker.jobs()) == 4
    assert await redis.xlen(keys.intake(MODEL.name)) == 6
    done = 0
    while done < 10:
        await eventually(worker.jobs)
        for entry, job in await worker.jobs():
            await worker.finish(entry, job, 0, 1)
            done += 1
    assert [await everything(g) for g in generations] == [([1], FinishReason.LENGTH)] * 10
    await eventually(lambda: idle(redis, worker))


async def test_no_job_waits_for_ever(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no worker had room for in all that time ends with an error that says so."""
    running = [await fleet.submit(a_job(f"r{i}", "g1"), INVALID_SPAN) for i in range(4)]
    await eventually(lambda: _has(worker, 4))
    monkeypatch.setattr(term, "QUEUE_WAIT_MS_MAX", 300)
    late = await fleet.submit(a_job("late", "g1"), INVALID_SPAN)
    with pytest.raises(JobFailedError, match="no worker had room"):
        await everything(late)
    for entry, job in await worker.jobs():
        await worker.finish(entry, job, 0, 1)
    assert [await everything(g) for g in running] == [([1], FinishReason.LENGTH)] * 4
    await eventually(lambda: idle(redis, worker))


async def test_the_next_leader_takes_what_the_last_one_left(
    valkey: Valkey, worker: ScriptedWorker, redis: Redis
) -> None:
    """The leader dies with jobs queued; the other gateway dispatches them, and its own."""
    first = await a_fleet(valkey, "g1")
    await eventually(lambda: redis.exists(keys.leader(MODEL.name)))
    second = await a_fleet(valkey, "g2")
    held = [await second.submit(a_job(f"j{i}", "g2"), INVALID_SPAN) for i in range(6)]
    await eventually(lambda: _has(worker, 4))
    await first.stop()
    for entry, job in await worker.jobs():
        await worker.finish(entry, job, 0, 7)
    await eventually(lambda: _has(worker, 2))
    for entry, job in await worker.jobs():
        await worker.finish(entry, job, 0, 7)
    assert [await everything(g) for g in held] == [([7], FinishReason.LENGTH)] * 6
    await second.stop()


async def test_a_restarted_redis_still_has_every_accepted_job(
    valkey: Valkey, fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    generations = [await fleet.submit(a_job(f"j{i}", "g1"), INVALID_SPAN) for i in range(6)]
    await eventually(lambda: _has(worker, 4))
    await asyncio.sleep(1.2)  # AOF is written each second
    valkey.kill()
    await eventually(lambda: fleet.ready() != "")
    with pytest.raises(DependencyError):
        await fleet.submit(a_job("refused", "g1"), INVALID_SPAN)
    valkey.start()
    await eventually(lambda: fleet.ready() == "")
    done = 0
    while done < 6:
        await eventually(worker.jobs)
        for entry, job in await worker.jobs():
            await worker.finish(entry, job, 0, 1)
            done += 1
    assert [await everything(g) for g in generations] == [([1], FinishReason.LENGTH)] * 6


async def test_a_full_queue_refuses_with_a_computed_wait(
    valkey: Valkey, worker: ScriptedWorker
) -> None:
    fleet = await a_fleet(valkey, "g1", AdmissionLimits(queue_jobs_max=2))
    with pytest.raises(OverloadError) as refused:
        for number in range(20):
            await fleet.submit(a_job(f"j{number}", "g1"), INVALID_SPAN)
    assert refused.value.status == 429
    assert refused.value.retry_after_ms
    await fleet.stop()


async def test_without_a_worker_requests_are_refused_at_once(
    fleet: Fleet, worker: ScriptedWorker
) -> None:
    await worker.die()
    await eventually(lambda: fleet.ready() != "")
    with pytest.raises(DependencyError) as refused:
        await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    assert (refused.value.status, refused.value.code) == (503, "no_worker")


async def test_an_unknown_model_is_named(fleet: Fleet) -> None:
    with pytest.raises(NotFoundError, match="'nope' does not exist; models served here: m"):
        fleet.model("nope")


async def test_unreadable_entries_are_dropped_and_harm_nobody(
    fleet: Fleet, worker: ScriptedWorker, redis: Redis
) -> None:
    m = MODEL.name
    await redis.xadd(keys.intake(m), {"job": b"\xc1garbage"})
    await redis.xadd(keys.intake(m), {"cancel": b"nobody"})
    await redis.xadd(keys.replies(m, "g1"), {"d": b"\xc1"})
    await redis.xadd(keys.events(m), {"e": b"x"})
    await redis.hset(keys.workers(m), "w0", b"\xc1")
    await redis.set(keys.status(m, "w0"), b"\xc1")
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(_, job)] = await worker.jobs()
    await worker.write(job, 0, 1)
    await redis.xadd(keys.replies(m, "g1"), {"d": b"\xc1"})
    await redis.xadd(keys.jobs(m, "w1"), {"job": b"\xc1"})
    heir = ScriptedWorker(redis, "w2")
    await heir.join()
    await worker.die()
    await eventually(heir.jobs)
    [(entry, job)] = await heir.jobs()
    assert list(job.logged) == [1]
    await heir.finish(entry, job, 1, 2)
    assert await everything(generation) == ([1, 2], FinishReason.LENGTH)
    await eventually(lambda: idle(redis, heir))


async def test_a_log_that_lost_entries_ends_the_stream_with_an_error(
    fleet: Fleet, worker: ScriptedWorker
) -> None:
    generation = await fleet.submit(a_job("j", "g1"), INVALID_SPAN)
    await eventually(worker.jobs)
    [(_, job)] = await worker.jobs()
    await worker.write(job, 0, 1)
    await worker.write(job, 5, 6)
    assert (await generation.next()).tokens == (1,)
    with pytest.raises(DependencyError, match="lost entries"):
        await generation.next()


async def test_a_gateway_whose_loop_died_says_so_and_asks_for_a_new_start(
    valkey: Valkey, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours must not leave a gateway that looks alive and serves nothing."""
    broken = asyncio.Event()
    fleet = Fleet(valkey.url, "g1", on_broken=broken.set)

    async def bug(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(fleet, "_open", bug)
    await fleet.start()
    async with asyncio.timeout(5):
        await broken.wait()
    assert "a bug" in fleet.ready()
    await fleet.stop()
