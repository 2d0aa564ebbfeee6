"""Where a job stands in the queue: from what the dispatcher publishes to what a stream hears."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from headrace import keys, wire_reports
from headrace.clock import ManualClock
from headrace.errors import JobFailedError
from headrace.streams import connect
from headrace.types import Board, Delta, Finish, FinishReason, Positions
from headrace_gateway.generation import Chunk, Generation, Standing
from headrace_gateway.places import LISTED_MAX, MISSING_BOARDS, POLL_EVERY_MS, Places
from support.fleet import MODEL, a_job
from support.valkey import Valkey

GATEWAY = "g1"
KEY = keys.places(MODEL.name, GATEWAY)
BOARD = Board(
    leader="g2:1",
    published_ms=1,
    queued=(0, 5, 0),
    queued_work=(0, 50, 0),
    waits_ms=(0, 0, 0),
    capacity_tokens=1_000,
    reserved_tokens=1_000,
    workers=1,
    work_per_s=10.0,
    prefill_per_s=10.0,
)


def a_generation(name: str = "a") -> Generation:
    async def drop(_: Generation) -> None:
        raise AssertionError("nobody cancels here")

    generation = Generation(a_job(name, GATEWAY), drop)
    generation.accepted_id = "1-0"
    return generation


async def heard(generation: Generation) -> Chunk | None:
    """What the consumer would get now; None where it would wait."""
    try:
        async with asyncio.timeout(0.01):
            return await generation.next()
    except TimeoutError:
        return None


class Seen:
    """A Places with everything around it, whose time the test moves by hand."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.clock = ManualClock()
        self.live: dict[str, Generation] = {}
        self.board: Board | None = BOARD
        self.places = Places(redis, MODEL.name, GATEWAY, self.live, lambda: self.board, self.clock)

    def add(self, name: str = "a") -> Generation:
        self.live[name] = generation = a_generation(name)
        return generation

    async def publish(self, positions: Positions | None) -> None:
        if positions is None:
            await self.redis.delete(KEY)
        else:
            await self.redis.set(KEY, wire_reports.encode_positions(positions))

    async def poll(self, times: int = 1, *, boards: bool = True) -> None:
        """As many polls, before each of which the leader publishes its board, or does not."""
        for _ in range(times):
            if boards and self.board is not None:
                self.board = replace(self.board, published_ms=self.board.published_ms + 250)
            self.clock.advance(POLL_EVERY_MS)
            await self.places.poll()


@pytest.fixture
def seen(redis: Redis) -> Seen:
    return Seen(redis)


async def test_a_waiting_job_hears_its_place_and_then_that_it_left(seen: Seen) -> None:
    """Listed: its place; missing while the leader goes on publishing: handed off, once."""
    generation = seen.add()
    await seen.publish({"other": (1, 0), "a": (2, 1_700_000_005_000)})
    await seen.poll()
    chunk = await heard(generation)
    assert chunk == Chunk((), None, standing=Standing(2, 1_700_000_005_000, POLL_EVERY_MS))
    assert await heard(generation) is None
    await seen.publish({})
    await seen.poll(MISSING_BOARDS)
    assert await heard(generation) is None, "a new leader may just be reading the intake"
    await seen.poll()
    chunk = await heard(generation)
    assert chunk is not None
    assert chunk.standing == Standing(0, 0, 2 * POLL_EVERY_MS), "since it was first missing"
    await seen.publish({"a": (1, 0)})
    await seen.poll(5)
    assert await heard(generation) is None, "who has left never waits again"


async def test_only_news_is_told_and_at_most_every_half_second(seen: Seen) -> None:
    generation = seen.add()
    told: list[tuple[int, int]] = []
    start = 1_700_000_000_000
    for place, start_ms in [
        (9, start), (8, start), (7, start),  # a change at each poll: every second one is told
        (7, start + 100), (7, start - 300), (7, start + 499),  # a prediction that trembles
        (7, start + 500), (7, start + 500), (6, start), (6, start),
    ]:  # fmt: skip
        await seen.publish({"a": (place, start_ms)})
        await seen.poll()
        chunk = await heard(generation)
        if chunk is not None and chunk.standing is not None:
            told.append((chunk.standing.place, chunk.standing.start_ms - start))
    assert told == [(9, 0), (7, 0), (7, 500), (6, 0)]


async def test_a_client_that_does_not_listen_gets_the_newest_place_only(seen: Seen) -> None:
    generation = seen.add()
    for place in (5, 4, 3):
        await seen.publish({"a": (place, 0)})
        await seen.poll(2)
    chunk = await heard(generation)
    assert chunk is not None and chunk.standing is not None
    assert chunk.standing.place == 3
    assert await heard(generation) is None


async def test_tokens_go_before_news_and_end_them(seen: Seen) -> None:
    """A place that nobody has heard yet is dropped when the first token is there."""
    generation = seen.add()
    await seen.publish({"a": (1, 0)})
    await seen.poll()
    generation.offer(Delta("a", 1, 0, (7, 8)))
    assert await heard(generation) == Chunk((7, 8), None)
    assert not generation.waits
    await seen.publish({"a": (4, 0)})
    await seen.poll(3)
    generation.offer(Delta("a", 1, 2, (9,), Finish(FinishReason.STOP)))
    assert await heard(generation) == Chunk((9,), Finish(FinishReason.STOP))


async def test_a_job_that_ends_in_the_queue_tells_its_end(seen: Seen) -> None:
    expired, failed = seen.add("a"), seen.add("b")
    await seen.publish({"a": (1, 0), "b": (2, 0)})
    await seen.poll()
    expired.offer(Delta("a", 1, 0, (), Finish(FinishReason.DEADLINE, "too late")))
    failed.offer(Delta("b", 1, 0, (), Finish(FinishReason.ERROR, "no room")))
    assert await heard(expired) == Chunk((), Finish(FinishReason.DEADLINE, "too late"))
    with pytest.raises(JobFailedError, match="no room"):
        await failed.next()


@pytest.mark.parametrize("published", [None, {}, {"other": (1, 0)}])
async def test_a_job_that_is_never_listed_was_served_at_once(
    seen: Seen, published: Positions | None
) -> None:
    generation = seen.add()
    await seen.publish(published)
    await seen.poll(MISSING_BOARDS)
    assert await heard(generation) is None
    await seen.poll()
    chunk = await heard(generation)
    assert chunk is not None and chunk.standing is not None
    assert chunk.standing.place == 0


async def test_silence_of_the_leader_says_nothing(seen: Seen) -> None:
    """It died, its key ended; the next one lists the job again, and it never seemed to have left.

    Its first publication holds only what it had read of the intake by then.
    """
    generation = seen.add()
    await seen.publish({"a": (3, 0)})
    await seen.poll()
    await seen.publish(None)
    await seen.poll(20, boards=False)
    await seen.publish({"other": (1, 0)})
    await seen.poll(3)
    await seen.publish({"a": (2, 0)})
    await seen.poll()
    chunk = await heard(generation)
    assert chunk is not None and chunk.standing is not None
    assert chunk.standing.place == 2
    await seen.publish({})
    seen.board = None
    await seen.poll(10)
    assert await heard(generation) is None


async def test_behind_the_end_of_a_long_list_jobs_still_wait(seen: Seen) -> None:
    """The dispatcher lists the first places only: whoever is pushed behind them has not left."""
    generation = seen.add()
    seen.board = replace(BOARD, queued=(LISTED_MAX, 1, 0))
    await seen.publish({"other": (1, 0)})
    await seen.poll(10)
    assert await heard(generation) is None
    await seen.publish({"a": (LISTED_MAX, 0)})
    await seen.poll()
    chunk = await heard(generation)
    assert chunk is not None and chunk.standing is not None
    assert chunk.standing.place == LISTED_MAX


async def test_what_cannot_be_read_is_skipped(seen: Seen, valkey: Valkey) -> None:
    """Bytes of another form, and a server that is away; the next publication is heard."""
    generation = seen.add()
    for junk in (b"\xc1", b"\x80", b"\x91\x91\xa1a"):
        await seen.redis.set(KEY, junk)
        await seen.poll(MISSING_BOARDS + 1)
    valkey.kill()
    await seen.poll()
    assert await heard(generation) is None
    valkey.start()
    async with connect(valkey.url) as again:
        await again.set(KEY, wire_reports.encode_positions({"a": (1, 0)}))
    await seen.poll()
    assert (await heard(generation)) is not None


async def test_it_asks_redis_only_while_somebody_waits(seen: Seen) -> None:
    """Not for nobody, not for a job that is still being accepted, not after the first token."""

    async def asked() -> int:
        stats = await seen.redis.info("commandstats")
        return int(stats.get("cmdstat_get", {"calls": 0})["calls"])

    await seen.poll(3)
    early = seen.add("early")
    early.accepted_id = ""
    running = seen.add("running")
    running.offer(Delta("running", 1, 0, (7,)))
    await seen.poll(3)
    assert await asked() == 0
    for name in "abc":
        seen.add(name)
    await seen.poll(2)
    assert await asked() == 2, "one read for all"


async def test_the_loop_polls_by_itself(seen: Seen) -> None:
    generation = seen.add()
    await seen.publish({"a": (1, 0)})
    task = asyncio.create_task(seen.places.run())
    try:
        async with asyncio.timeout(10):
            chunk = await generation.next()
        assert chunk.standing is not None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
