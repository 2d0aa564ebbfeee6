"""Redis plumbing on a real Valkey: the traps that were measured stay closed."""

from __future__ import annotations

import asyncio
import random

import pytest

from headrace import scripts
from headrace.streams import Scripts, Tail, connect, read_range
from support.valkey import Valkey


@pytest.mark.parametrize("kind", ["command", "script", "pipeline"])
async def test_no_cancel_is_lost(valkey: Valkey, kind: str) -> None:
    """A loop over Redis that is told to stop stops, wherever the cancel strikes."""
    redis = connect(valkey.url)
    lua = Scripts(redis)
    dice = random.Random(5)

    async def call() -> None:
        if kind == "command":
            await redis.get("x")
        elif kind == "script":
            await lua.call(scripts.RENEW, ["k"], ["t", 1000])
        else:
            await redis.pipeline(transaction=False).get("x").execute()

    async def work() -> None:
        while True:
            await call()

    for _ in range(300):
        task = asyncio.create_task(work())
        for _ in range(dice.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await redis.aclose()


async def test_a_cancelled_reader_loses_nothing(valkey: Valkey) -> None:
    """Readers are cancelled as entries arrive; the next one goes on where the last one stood."""
    redis = connect(valkey.url)
    dice = random.Random(7)
    got: list[int] = []
    after = "0-0"

    async def read(tail: Tail) -> None:
        async for entries in tail:
            got.extend(int(entry.data) for entry in entries)

    written = 0
    for _ in range(60):
        tail = Tail(valkey.url, "s", after)
        reader = asyncio.create_task(read(tail))
        for _ in range(3):
            await redis.xadd("s", {"n": written})
            written += 1
            for _ in range(dice.randrange(8)):
                await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        after = tail.after
        await tail.close()
    tail = Tail(valkey.url, "s", after)
    reader = asyncio.create_task(read(tail))
    async with asyncio.timeout(5):
        while not got or got[-1] != written - 1:
            await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await tail.close()
    await redis.aclose()
    assert got == list(range(written))


async def test_a_tail_survives_redis(valkey: Valkey) -> None:
    """Killed and started again: the reader comes back by itself and continues."""
    redis = connect(valkey.url)
    got: list[bytes] = []
    tail = Tail(valkey.url, "s")

    async def read() -> None:
        async for entries in tail:
            got.extend(entry.data for entry in entries)

    reader = asyncio.create_task(read())
    await redis.xadd("s", {"n": "before"})
    await asyncio.sleep(1.2)
    valkey.kill()
    await asyncio.sleep(0.2)
    valkey.start()
    await redis.xadd("s", {"n": "after"})
    async with asyncio.timeout(10):
        while len(got) < 2:
            await asyncio.sleep(0.01)
    assert got == [b"before", b"after"]
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await tail.close()
    await redis.aclose()


async def test_a_tail_from_now_on_skips_what_was_and_misses_nothing_after(valkey: Valkey) -> None:
    redis = connect(valkey.url)
    await redis.xadd("s", {"n": "old"})
    got: list[bytes] = []
    tail = Tail(valkey.url, "s", after="$")

    async def read() -> None:
        async for entries in tail:
            got.extend(entry.data for entry in entries)

    reader = asyncio.create_task(read())
    async with asyncio.timeout(5):
        while tail.after == "$":
            await asyncio.sleep(0.01)
    for number in range(20):
        await redis.xadd("s", {"n": number})
        await asyncio.sleep(0.002 * (number % 3))
    async with asyncio.timeout(5):
        while len(got) < 20:
            await asyncio.sleep(0.01)
    assert [int(n) for n in got] == list(range(20))
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await tail.close()
    await redis.aclose()


async def test_read_range_pages_through_long_streams(valkey: Valkey) -> None:
    redis = connect(valkey.url)
    pipe = redis.pipeline(transaction=False)
    for number in range(1_300):
        pipe.xadd("s", {"n": number})
    await pipe.execute()
    pages = [page async for page in read_range(redis, "s")]
    assert [int(e.data) for page in pages for e in page] == list(range(1_300))
    assert len(pages) == 3
    await redis.aclose()
