"""kill -9 of the cache service under traffic, again and again."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.builders import chain, client_of, reap, spawn, wait_ready
from headrace.cache_client import CacheClient

KILLS = 3
USERS = 4
PATIENCE_S = 20.0


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_the_service_may_be_killed_at_any_time(
    family: str, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """Killed under traffic: no call raises, none gives wrong bytes, each time all are served."""
    url = (
        f"unix://{tmp_path / 'cache.sock'}"
        if family == "unix"
        else f"tcp://127.0.0.1:{unused_tcp_port_factory()}"
    )
    rng = random.Random(7)
    process = spawn(url)
    try:
        await wait_ready(url)
        async with client_of(url, timeout_s=0.5, put_timeout_s=0.5) as client:
            stopping = asyncio.Event()
            hits = [0] * USERS
            users = [
                asyncio.ensure_future(traffic(client, n, hits, stopping)) for n in range(USERS)
            ]
            for _ in range(KILLS):
                before = list(hits)
                async with asyncio.timeout(PATIENCE_S):
                    while any(now == then for now, then in zip(hits, before, strict=True)):
                        await asyncio.sleep(0.01)
                await asyncio.sleep(rng.uniform(0.05, 0.15))
                process.send_signal(signal.SIGKILL)
                reap(process)
                process = spawn(url)
                await wait_ready(url)
            stopping.set()
            await asyncio.gather(*users)
            assert client.counts.corrupt == 0
            async with asyncio.timeout(PATIENCE_S):
                while not await client.put(chain("end", 2)):
                    await asyncio.sleep(0.05)
                while len(await client.get_run([entry.hash for entry in chain("end", 2)])) < 2:
                    await asyncio.sleep(0.05)
    finally:
        reap(process)


async def traffic(
    client: CacheClient, number: int, hits: list[int], stopping: asyncio.Event
) -> None:
    """Put chains and read them back until told to stop; counts the entries that were found."""
    turn = 0
    while not stopping.is_set():
        turn += 1
        entries = chain(f"user {number}, turn {turn}", 4, 100_000)
        await client.put(entries)
        run = await client.get_run([entry.hash for entry in entries])
        assert all(data == entry.data for (_, data), entry in zip(run, entries, strict=False))
        hits[number] += len(run)
        await asyncio.sleep(0.005)
