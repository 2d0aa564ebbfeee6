"""What a worker tells the dispatcher: netted, bounded, lost without harm, on a real Valkey."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from headrace import keys
from headrace.clock import ManualClock, SystemClock
from headrace.streams import REDIS_DOWN, connect, parse_entries
from headrace.types import BLOCK_KEY_BYTES, BlockSnapshot, FinishReason, JobProgress, Progress
from headrace.wire_reports import Event, decode_event, decode_snapshot
from headrace_worker import reporter
from headrace_worker.reporter import NEWS_MAX, RENEW_MS, SNAPSHOT_MS, Reporter
from headrace_worker.results import JobStory, StepResult, StepWork
from support.fleet import eventually
from support.valkey import Valkey


def key(number: int) -> bytes:
    return number.to_bytes(BLOCK_KEY_BYTES)


def a_step(*moved: JobProgress, came: str = "", went: str = "", **work: int) -> StepResult:
    """A step; `came` and `went` are blocks, a letter each."""
    news = {key(ord(c)): True for c in came} | {key(ord(c)): False for c in went}
    return StepResult([], [], [], StepWork(moved=moved, news=news, **work))


def an_end(job: str) -> StepResult:
    progress = JobProgress(job, 1, 2, 3)
    story = JobStory(job, 1, FinishReason.STOP, progress, 0, 0, 0, 0, (), 0, 0, 0, 3)
    return StepResult([], [], [story])


def letters(blocks: bytes) -> str:
    step = BLOCK_KEY_BYTES
    return "".join(
        chr(int.from_bytes(blocks[at : at + step])) for at in range(0, len(blocks), step)
    )


def a_reporter(clock: ManualClock | None = None) -> Reporter:
    made = Reporter(connect("redis://127.0.0.1:1"), "m", clock or ManualClock())
    made.begin()
    return made


def test_a_report_is_what_came_together() -> None:
    """The last word of each job, blocks as they are now, the sums of the steps; then nothing."""
    told = a_reporter()
    assert told.take_report("w") is None
    told.note(a_step(JobProgress("a", 5, 0, 0), JobProgress("b", 1, 0, 9), came="xyz", busy_ns=900))
    told.note(an_end("b"))
    work = {"busy_ns": 2_600_000, "prefill_tokens": 5, "output_tokens": 1}
    told.note(a_step(JobProgress("a", 9, 0, 1), came="v", went="yu", **work))
    told.note(a_step(came="u", went="v"))
    told.note_fetch(64, 1.5)
    told.note_fetch(16, 0.9)
    report = told.take_report("w")
    assert report is not None
    assert (report.worker, report.sequence) == ("w", 1)
    assert report.jobs == (JobProgress("a", 9, 0, 1),)
    assert (letters(report.stored), letters(report.removed)) == ("xzu", "yv")
    assert (report.busy_ms, report.prefill_tokens, report.output_tokens) == (3, 5, 1)
    assert (report.fetched_tokens, report.fetch_ms) == (80, 2)
    assert told.take_report("w") is None
    told.note(a_step(busy_ns=1))
    again = told.take_report("w")
    assert again == Progress("w", 2)


def test_too_many_blocks_are_left_to_the_snapshot() -> None:
    """A report has a bounded size, whatever happened since the last one."""
    told = a_reporter()
    for number in range(NEWS_MAX + 50):
        told.note(StepResult([], [], [], StepWork(news={key(number): True}, busy_ns=1)))
    report = told.take_report("w")
    assert report is not None and (report.stored, report.removed) == (b"", b"")
    snapshot = told.take_snapshot()
    assert snapshot is not None and snapshot.sequence == 1
    assert len(snapshot.blocks) == (NEWS_MAX + 50) * BLOCK_KEY_BYTES
    told.note(a_step(came="a"))
    report = told.take_report("w")
    assert report is not None and letters(report.stored) == "a"


def test_snapshots_come_seldom() -> None:
    """At once, then every SNAPSHOT_MS while there are changes, else in time to stay alive."""
    clock = ManualClock()
    told = a_reporter(clock)
    taken = []
    for now in range(0, 60_000, 250):
        if now in (1_000, 6_000):
            told.note(a_step(came=chr(now)))
        if told.take_snapshot() is not None:
            taken.append(now)
        clock.advance(250)
    assert taken[:3] == [0, SNAPSHOT_MS, 2 * SNAPSHOT_MS]
    assert taken[3:] == [2 * SNAPSHOT_MS + RENEW_MS, 2 * SNAPSHOT_MS + 2 * RENEW_MS]
    assert RENEW_MS < keys.BLOCKS_TTL_MS


def test_a_new_incarnation_counts_from_one_and_tells_all_blocks(monkeypatch) -> None:
    """The pool outlives a lost lease; the jobs do not. The newest blocks are told if not all."""
    told = a_reporter()
    told.note(a_step(JobProgress("a", 1, 0, 0), came="abcd", went="b", busy_ns=1))
    assert told.take_report("w") is not None
    told.note(a_step(JobProgress("a", 2, 0, 0), came="e", busy_ns=1))
    told.begin()
    assert told.take_report("w2") is None
    snapshot = told.take_snapshot()
    assert snapshot == BlockSnapshot(0, b"".join(key(ord(c)) for c in "acde"))
    monkeypatch.setattr(reporter, "SNAPSHOT_BLOCKS_MAX", 2)
    told.begin()
    snapshot = told.take_snapshot()
    assert snapshot is not None and letters(snapshot.blocks) == "de"


async def events(redis: Redis) -> list[Event]:
    return [decode_event(e.data) for e in parse_entries(await redis.xrange(keys.events("m")))]


async def test_reports_reach_redis_and_are_withdrawn(valkey: Valkey, redis: Redis) -> None:
    """Events, and a snapshot that ends by itself unless renewed."""
    told = Reporter(redis, "m", SystemClock())
    running = asyncio.create_task(told.run("w"))
    name = keys.blocks("m", "w")
    await eventually(lambda: redis.exists(name))
    told.note(a_step(JobProgress("a", 5, 0, 0), came="xy", busy_ns=2_000_000, prefill_tokens=5))
    await eventually(lambda: redis.xlen(keys.events("m")))
    [report] = await events(redis)
    assert report == Progress(
        "w", 1, (JobProgress("a", 5, 0, 0),), key(ord("x")) + key(ord("y")), b"", 2, 5, 0
    )
    assert 0 < await redis.pttl(name) <= keys.BLOCKS_TTL_MS
    assert decode_snapshot(await redis.get(name)) == BlockSnapshot(0, b"")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await told.withdraw("w")
    assert not await redis.exists(name)


async def test_redis_away_costs_reports_only(valkey: Valkey, redis: Redis, monkeypatch) -> None:
    """What could not be told is dropped; a gap in the numbers and a snapshot make up for it."""
    monkeypatch.setattr(reporter, "SNAPSHOT_MS", 0)
    told = Reporter(redis, "m", SystemClock())
    running = asyncio.create_task(told.run("w"))
    name = keys.blocks("m", "w")
    await eventually(lambda: redis.exists(name))
    valkey.kill()
    told.note(a_step(came="x", busy_ns=1))
    await eventually(lambda: not told._news and told._held_changed)  # taken, and not sent
    valkey.start()
    await eventually(lambda: _held(redis, name, "x"))
    told.note(a_step(came="y", busy_ns=1))
    await eventually(lambda: redis.xlen(keys.events("m")))
    assert not running.done()
    [report] = (await events(redis))[-1:]
    assert isinstance(report, Progress) and report.sequence > 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def _held(redis: Redis, name: str, wanted: str) -> bool:
    try:
        data = await redis.get(name)
    except REDIS_DOWN:
        return False
    return data is not None and letters(decode_snapshot(data).blocks) == wanted
