"""The picture of the workers, read from a registry that others have written to as well."""

from __future__ import annotations

from redis.asyncio import Redis
from structlog.testing import capture_logs

from headrace import keys, wire
from headrace_gateway import roster as rosters
from headrace_gateway.roster import Roster
from support.fleet import MODEL, ScriptedWorker

M = MODEL.name


async def test_a_record_that_cannot_be_read_is_spoken_of_once(redis: Redis) -> None:
    """Another version's stands there and is read four times a second; a new one is news again."""
    worker = ScriptedWorker(redis, "w1")
    await worker.join()
    roster = Roster(redis, M)
    old = wire.pack({"id": "w0", "model": M})
    await redis.hset(keys.workers(M), "w0", old)  # type: ignore[arg-type]  # bytes as they are
    with capture_logs() as told:
        for _ in range(3):
            await roster.refresh()
    assert list(roster.live) == ["w1"], "the others are read all the same"
    assert [(line["event"], line["worker"]) for line in told] == [
        ("worker record unreadable", "w0")
    ]
    newer = wire.pack({"id": "w0", "model": M, "kv": "much"})
    await redis.hset(keys.workers(M), "w0", newer)  # type: ignore[arg-type]  # bytes as they are
    with capture_logs() as told:
        await roster.refresh()
    assert len(told) == 1


async def test_what_was_spoken_of_is_bounded(redis: Redis) -> None:
    """However many incarnations an old version leaves behind."""
    roster = Roster(redis, M)
    for number in range(rosters.UNREADABLE_TOLD_MAX + 5):
        roster._decode(b"w%d" % number, b"?")
    assert len(roster._told) <= rosters.UNREADABLE_TOLD_MAX
