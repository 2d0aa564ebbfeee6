"""Get and put bandwidth of the cache service, client and server each a process of its own.

    python bench/cache_bandwidth.py [--entries 32] [--entry-bytes 368640] [--seconds 3]

An entry of 368,640 bytes is 16 tokens of float32 KV of SmolLM2-135M. Every put is of new keys, so
that once the budget is full each also evicts; what is got is checked by CRC, as always.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from headrace import logs
from headrace.cache_client import CacheClient, PutEntry

BUDGET_BYTES = 1 << 30
START_S_MAX = 10.0


async def wait_ready(client: CacheClient) -> None:
    """Until the service answers. Raises TimeoutError."""
    async with asyncio.timeout(START_S_MAX):
        while not await client.ping():
            await asyncio.sleep(0.05)


async def timed(step: Callable[[int], Awaitable[int]], seconds: float) -> tuple[float, float]:
    """(bytes per second, median seconds of a step) of running `step` for `seconds`."""
    total_bytes, times = 0, []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        total_bytes += await step(len(times))
        times.append(time.perf_counter() - now)
    return total_bytes / (time.perf_counter() - began), sorted(times)[len(times) // 2]


async def measure(url: str, entries: int, entry_bytes: int, seconds: float) -> None:
    client = CacheClient(url, timeout_s=10, put_timeout_s=10)
    await wait_ready(client)
    data = os.urandom(entry_bytes)

    def chain(number: int) -> list[PutEntry]:
        hashes = [f"{number:016d}{index:016d}".encode() for index in range(entries)]
        parents = [b"", *hashes[:-1]]
        return [
            PutEntry(hash_, data, parent, depth, cost_tokens=16)
            for depth, (hash_, parent) in enumerate(zip(hashes, parents, strict=True))
        ]

    async def put(number: int) -> int:
        assert await client.put(chain(number)), "everything was stored"
        return entries * entry_bytes

    async def get(number: int) -> int:
        found = await client.get_run([entry.hash for entry in chain(resident - number % 8)])
        assert len(found) == entries, "everything was there"
        return entries * entry_bytes

    rate, median = await timed(put, seconds)
    print(f"{url[:4]:>5} put {rate / 1e9:6.2f} GB/s, {median * 1e3:6.2f} ms a batch")
    stats = await client.stats()
    assert stats is not None, "the service answers"
    resident = stats["by_kind"]["kv"]["kept"] // entries - 1
    rate, median = await timed(get, seconds)
    print(f"{url[:4]:>5} get {rate / 1e9:6.2f} GB/s, {median * 1e3:6.2f} ms a batch")
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=32)
    parser.add_argument("--entry-bytes", type=int, default=368_640)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--port", type=int, default=7791)
    args = parser.parse_args()
    logs.setup("bench", level="error")
    with tempfile.TemporaryDirectory() as folder:
        urls = (f"unix://{Path(folder) / 'cache.sock'}", f"tcp://127.0.0.1:{args.port}")
        for url in urls:
            server = subprocess.Popen(
                [sys.executable, "-m", "headrace_cache"],
                env=os.environ
                | {
                    "HEADRACE_CACHE_LISTEN": url,
                    "HEADRACE_CACHE_BYTES": str(BUDGET_BYTES),
                    "HEADRACE_LOG_LEVEL": "error",
                },
            )
            try:
                asyncio.run(measure(url, args.entries, args.entry_bytes, args.seconds))
            finally:
                server.terminate()
                server.wait()


if __name__ == "__main__":
    main()
