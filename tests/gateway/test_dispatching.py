"""The dispatcher on a real Valkey: terms that follow each other, deadlines, places, reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from redis.asyncio import Redis

from headrace import keys, wire, wire_reports
from headrace.clock import SystemClock
from headrace.streams import Scripts
from headrace.types import (
    Band,
    BlockSnapshot,
    FinishReason,
    Job,
    JobProgress,
    Progress,
    WorkerRole,
    WorkerState,
    WorkerStatus,
    pack_tokens,
)
from headrace_gateway.dispatcher import Dispatcher
from headrace_gateway.policy.roles import RolePolicy, RolesConfig
from headrace_gateway.policy.virtual_counters import OUTPUT_WEIGHT
from headrace_gateway.term import Term
from support.fleet import MODEL, ScriptedWorker, a_job, eventually
from support.valkey import Valkey

T = TypeVar("T")
M = MODEL.name
COUNTER = f"{int(Band.STANDARD)}:a"


async def accept(redis: Redis, job: Job) -> None:
    """What a gateway does once admission has said yes."""
    names = [keys.job(M, job.id), keys.intake(M)]
    await Scripts(redis).accept(names, wire.encode_job(job), keys.JOB_TTL_MS)


async def report(redis: Redis, progress: Progress) -> None:
    await redis.xadd(keys.events(M), {"e": wire_reports.encode_progress(progress)})


class Leader:
    """A dispatcher that dies like a process: it gives nothing back."""

    def __init__(self, valkey: Valkey, redis: Redis, name: str) -> None:
        self.dispatcher = Dispatcher(valkey.url, redis, M, name, SystemClock())
        self._task = asyncio.create_task(self.dispatcher.run())

    @property
    def term(self) -> Term:
        term = self.dispatcher.term
        assert term is not None, "it leads"
        return term

    async def leads(self) -> None:
        await eventually(lambda: self.dispatcher.term is not None)

    async def die(self) -> None:
        async def keep_the_lease() -> None:
            return None

        self.dispatcher._lease.release = keep_the_lease  # type: ignore[method-assign]
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def worker(redis: Redis) -> ScriptedWorker:
    worker = ScriptedWorker(redis, "w1")
    await worker.join()
    return worker


async def has(worker: ScriptedWorker, count: int) -> bool:
    return len(await worker.jobs()) == count


async def test_a_leader_that_dies_is_followed_within_three_seconds_and_its_counters_hold(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    """The next term knows what tenants have had and what runs; jobs go on being handed off."""
    first = Leader(valkey, redis, "g1")
    await first.leads()
    second = Leader(valkey, redis, "g2")
    for number in range(3):
        job = replace(a_job(f"a{number}", "g1"), tenant="a", weight=2.0)
        await accept(redis, job)
    await eventually(lambda: has(worker, 3))
    await eventually(lambda: redis.hexists(keys.service(M), COUNTER))
    told = first.term.policy.queue.counters.value("a", Band.STANDARD)
    assert told > 0
    await eventually(lambda: _stored(redis, told))
    await first.die()
    died = time.monotonic()
    await accept(redis, a_job("after", "g1"))
    await accept(redis, a_job("beyond", "g1"))
    await eventually(lambda: has(worker, 4), limit_s=8)
    took = time.monotonic() - died
    counters = second.term.policy.queue.counters
    assert counters.value("a", Band.STANDARD) == told
    await asyncio.sleep(0.3)
    assert await has(worker, 4), "the new term counts what the old one had sent"
    await second.stop()
    assert took < keys.LEADER_LEASE_MS / 1000 + 1.0, "the lease and one election"


async def test_a_new_leader_takes_over_what_runs_on_a_worker_that_drains(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    """It gets nothing new, and its tenant pays for what it makes until the last job has ended."""
    first = Leader(valkey, redis, "g1")
    await first.leads()
    await accept(redis, replace(a_job("old", "g1", tokens=200), tenant="a"))
    await eventually(lambda: has(worker, 1))
    await eventually(lambda: redis.hexists(keys.service(M), COUNTER))
    await first.stop()
    draining = WorkerStatus(WorkerState.DRAINING, 1, 0, 0, 0)
    await redis.set(keys.status(M, "w1"), wire_reports.encode_status(draining))
    second = Leader(valkey, redis, "g2")
    await second.leads()
    policy = second.term.policy
    await eventually(lambda: policy.jobs_on("w1") == ["old"])
    assert not policy.workload.takes_jobs("w1")
    before = policy.queue.counters.value("a", Band.STANDARD)
    await report(redis, Progress("w1", 1, (JobProgress("old", 5, 0, 20),)))
    await report(redis, Progress("w1", 2, (JobProgress("old", 5, 0, 60),)))
    # the first one says what the old term may have charged
    await eventually(
        lambda: policy.queue.counters.value("a", Band.STANDARD) == before + 40 * OUTPUT_WEIGHT
    )
    await accept(redis, a_job("new", "g1"))
    await eventually(lambda: "new" in policy.queue)
    await asyncio.sleep(0.3)
    ((entry, job),) = await worker.jobs()
    assert await worker.finish(entry, job, 0, *range(70))
    await eventually(lambda: not policy.jobs_on("w1"))
    assert policy.queue.counters.value("a", Band.STANDARD) == before + 50 * OUTPUT_WEIGHT
    policy.check_integrity()
    assert "new" in policy.queue
    await second.stop()


async def _stored(redis: Redis, value: float) -> bool:
    raw = await redis.hget(keys.service(M), COUNTER)
    return raw is not None and float(raw) == value


async def test_what_expired_in_the_queue_is_ended_by_name_and_never_handed_off(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    leader = Leader(valkey, redis, "g1")
    for number in range(4):
        await accept(redis, a_job(f"r{number}", "g1"))
    await eventually(lambda: has(worker, 4))
    late = replace(a_job("late", "g1"), ttft_by_ms=SystemClock().wall_ms() + 400)
    await accept(redis, late)
    await eventually(lambda: _ended(redis, "late", FinishReason.DEADLINE))
    assert {job.id for _, job in await worker.jobs()} == {"r0", "r1", "r2", "r3"}
    assert await redis.xlen(keys.intake(M)) == 0
    await leader.stop()


async def _ended(redis: Redis, job: str, reason: FinishReason) -> bool:
    deltas = [
        delta
        for _, fields in await redis.xrange(keys.replies(M, "g1"))
        for delta in wire.decode_deltas(fields[b"d"])
    ]
    return any(d.job == job and d.finish and d.finish.reason is reason for d in deltas)


async def test_waiting_jobs_are_told_their_place_until_none_waits(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    leader = Leader(valkey, redis, "g1")
    for number in range(6):
        await accept(redis, a_job(f"j{number}", "g1" if number % 2 else "g2"))
    await eventually(lambda: has(worker, 4))
    await eventually(lambda: redis.exists(keys.places(M, "g1")))
    raw = [await redis.get(keys.places(M, g)) for g in ("g1", "g2")]
    places = [wire_reports.decode_positions(each) if each else {} for each in raw]
    assert sorted(place for each in places for place, _ in each.values()) == [1, 2]
    for entry, job in await worker.jobs():
        await worker.finish(entry, job, 0, 1)
    await eventually(lambda: has(worker, 2))
    await eventually(lambda: _untold(redis))
    await leader.stop()


async def _untold(redis: Redis) -> bool:
    return await redis.exists(keys.places(M, "g1"), keys.places(M, "g2")) == 0


async def test_an_interactive_job_is_sent_to_a_worker_full_of_batch(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    """Preemption is the engine's affair; the queue does not hold the job back."""
    leader = Leader(valkey, redis, "g1")
    for number in range(5):
        await accept(redis, a_job(f"b{number}", "g1", band=Band.BATCH))
    await eventually(lambda: has(worker, 4))
    await accept(redis, a_job("i", "g1", band=Band.INTERACTIVE))
    await eventually(lambda: has(worker, 5))
    assert "i" in {job.id for _, job in await worker.jobs()}
    await leader.stop()


async def test_a_finish_that_nobody_told_is_found_by_reading_the_workers_stream(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    """Events are hints: one was trimmed away, and the room is found free all the same."""
    leader = Leader(valkey, redis, "g1")
    for number in range(5):
        await accept(redis, a_job(f"j{number}", "g1"))
    await eventually(lambda: has(worker, 4))
    [(entry, job), *_] = await worker.jobs()
    await redis.xdel(keys.jobs(M, "w1"), entry)
    await redis.hincrby(keys.load(M, "w1"), "jobs", -1)
    await redis.hincrby(keys.load(M, "w1"), "tokens", -job.cost_tokens)
    await eventually(lambda: _names(worker, {"j1", "j2", "j3", "j4"}), limit_s=15)
    await leader.stop()


async def _names(worker: ScriptedWorker, names: set[str]) -> bool:
    return {job.id for _, job in await worker.jobs()} == names


async def test_reports_teach_the_index_and_a_gap_is_closed_by_the_snapshot(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    leader = Leader(valkey, redis, "g1")
    await leader.leads()
    # what was reported before it followed the events, it takes from the snapshot
    await eventually(lambda: "w1" in leader.term.policy.workload.workers)
    index = leader.term.policy.index
    one, two, three = b"11111111", b"22222222", b"33333333"
    await report(redis, Progress("w1", 1, stored=one))
    await eventually(lambda: index.match(one) == {"w1": 1})
    await redis.set(keys.blocks(M, "w1"), wire_reports.encode_snapshot(BlockSnapshot(3, two)))
    await report(redis, Progress("w1", 4, stored=three))  # 2 and 3 were lost
    await eventually(lambda: index.match(two) == {"w1": 1})
    await eventually(lambda: index.match(one) == {})
    await redis.xadd(keys.events(M), {"e": b"\xc1"})
    await report(redis, Progress("w1", 5, (JobProgress("nobody", 1, 2, 3),), removed=two))
    await eventually(lambda: index.match(two) == {})
    await leader.stop()


async def test_a_decoding_worker_is_told_to_change_sides_while_prompts_wait(
    valkey: Valkey, redis: Redis
) -> None:
    """Once, behind the jobs that it has; when it says that it has done so, prompts go to it."""
    prompts = ScriptedWorker(redis, "p", role=WorkerRole.PREFILL)
    streams = [ScriptedWorker(redis, name, role=WorkerRole.DECODE) for name in ("d1", "d2")]
    for worker in (prompts, *streams):
        await worker.join()
    leader = Leader(valkey, redis, "g1")
    await leader.leads()
    policy = leader.term.policy
    policy.roles = RolePolicy(RolesConfig(hold_ms=300))
    await eventually(lambda: "p" in policy.workload.workers)
    for number in range(1, 6):
        await report(redis, Progress("p", number, busy_ms=1_000, prefill_tokens=100))
    await eventually(lambda: policy.workload.prefill_per_s > 90)

    async def told() -> list[tuple[str, bytes]]:
        return [(w.name, role) for w in streams for _, role in await w.entries("role")]

    await asyncio.sleep(0.8)
    assert await told() == [], "no prompt waits"
    for number in range(4):
        job = replace(a_job(f"j{number}", "g1"), prompt=pack_tokens([number % 90] * 200))
        await accept(redis, job)
    [(name, role)] = await _once(told)
    assert WorkerRole(role.decode()) is WorkerRole.PREFILL
    changed = next(w for w in streams if w.name == name)
    assert policy.decoding.open_workers == ("d1", "d2"), "it decodes until it says otherwise"
    await changed.become(WorkerRole.PREFILL)
    await eventually(lambda: name not in policy.decoding.open_workers)
    await eventually(changed.jobs)
    await asyncio.sleep(0.5)
    assert len(await told()) == 1, "the other side is not emptied"
    policy.check_integrity()
    await leader.stop()


async def _once(found: Callable[[], Awaitable[list[T]]]) -> list[T]:
    """What `found` gives as soon as that is something."""
    await eventually(found)
    return await found()


async def test_the_hand_off_carries_the_tenants_counter(
    valkey: Valkey, redis: Redis, worker: ScriptedWorker
) -> None:
    """Whoever orders by effective priority behind the queue needs what the queue went by."""
    leader = Leader(valkey, redis, "g1")
    await accept(redis, a_job("first", "g1"))
    await eventually(lambda: has(worker, 1))
    await accept(redis, a_job("second", "g1"))
    await eventually(lambda: has(worker, 2))
    first, second = (job for _, job in await worker.jobs())
    assert second.virtual > first.virtual
    await leader.stop()
