"""Bandwidth of the cache service against this machine's memcpy: `python -m bench cache`.

Client and service are processes of their own. `shm` reads and writes in place, `unix` and `tcp`
send entries as frames. Every put is of new keys, so that once the budget is full each also evicts.
What is got is checked by CRC, as always; `get` copies it into the client's own memory, `view` uses
it where it lies. memcpy is measured in the same process, over the same sizes, from cold sources
(a ring larger than the CPU's caches) into the mapping of a file in /dev/shm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from headrace import logs
from headrace.cache_client import CacheClient, PutEntry, WriteEntry

BUDGET_BYTES = 1 << 30
RING_BYTES = 256 << 20
START_S_MAX = 20.0
CHAINS_READ = 16


async def wait_ready(client: CacheClient) -> None:
    """Until the service answers. Raises TimeoutError."""
    async with asyncio.timeout(START_S_MAX):
        while not await client.ping():
            await asyncio.sleep(0.05)


class Ring:
    """The client's own memory: batches in it come round too late to be in the CPU's caches."""

    def __init__(self, entries: int, entry_bytes: int) -> None:
        self._batch_bytes = entries * entry_bytes
        self._entry_bytes = entry_bytes
        self._entries = entries
        count = max(2, RING_BYTES // self._batch_bytes)
        self._memory = memoryview(bytearray(os.urandom(self._batch_bytes) * count))
        self._count = count

    def batch(self, number: int) -> list[memoryview]:
        """The entries of batch `number`, as views."""
        start = number % self._count * self._batch_bytes
        return [
            self._memory[start + at * self._entry_bytes : start + (at + 1) * self._entry_bytes]
            for at in range(self._entries)
        ]


def memcpy_rate(entries: int, entry_bytes: int, seconds: float) -> float:
    """Bytes a second of copying batches into shared memory, entry by entry."""
    ring = Ring(entries, entry_bytes)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, RING_BYTES)
        target = memoryview(mmap.mmap(file.fileno(), RING_BYTES))
        room = RING_BYTES // (entries * entry_bytes)

        def step(number: int) -> None:
            at = number % room * entries * entry_bytes
            for source in ring.batch(number):
                target[at : at + entry_bytes] = source
                at += entry_bytes

        for number in range(room):
            step(number)
        times: list[float] = []
        began = now = time.perf_counter()
        while now - began < seconds:
            step(len(times))
            times.append(time.perf_counter() - now)
            now = time.perf_counter()
        return entries * entry_bytes / sorted(times)[len(times) // 2]


async def timed(step: Callable[[int], Awaitable[None]], size_bytes: int, seconds: float) -> float:
    """Bytes a second of `step`, which moves `size_bytes`, by the median of its times."""
    times: list[float] = []
    began = now = time.perf_counter()
    while now - began < seconds:
        await step(len(times))
        times.append(time.perf_counter() - now)
        now = time.perf_counter()
    return size_bytes / sorted(times)[len(times) // 2]


async def measure(
    url: str, entries: int, entry_bytes: int, seconds: float, *, arena: bool
) -> dict[str, float]:
    """Rates of put, get and view over `url`."""
    client = CacheClient(url, timeout_s=10, put_timeout_s=10, arena=arena)
    await wait_ready(client)
    ring = Ring(entries, entry_bytes)
    batch_bytes = entries * entry_bytes
    resident: list[list[bytes]] = []

    def hashes(number: int) -> list[bytes]:
        return [f"{number:016d}{index:016d}".encode() for index in range(entries)]

    async def put(number: int) -> None:
        names = hashes(number)
        parents = [b"", *names[:-1]]
        sources = ring.batch(number)
        chain: list[PutEntry | WriteEntry] = [
            PutEntry(name, source, parent, depth, cost_tokens=16)
            for depth, (name, parent, source) in enumerate(
                zip(names, parents, sources, strict=True)
            )
        ]
        assert await client.write(chain), "everything was stored"
        resident.append(names)

    async def get(number: int) -> None:
        targets = ring.batch(number)
        async with client.read(resident[-1 - number % CHAINS_READ]) as run:
            assert len(run.blocks) == entries, "everything was there"
            for target, block in zip(targets, run.blocks, strict=True):
                target[:] = block

    async def view(number: int) -> None:
        async with client.read(resident[-1 - number % CHAINS_READ]) as run:
            assert len(run.blocks) == entries, "everything was there"

    # once through the budget, so that memory is there and evictions are part of it
    for number in range(BUDGET_BYTES // batch_bytes + 1):
        await put(number)
    first = len(resident)
    rates = {"put": await timed(lambda n: put(first + n), batch_bytes, seconds)}
    rates["get"] = await timed(get, batch_bytes, seconds)
    rates["view"] = await timed(view, batch_bytes, seconds)
    await client.close()
    return rates


def serve(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "headrace_cache"],
        env=os.environ
        | {
            "HEADRACE_CACHE_LISTEN": url,
            "HEADRACE_CACHE_BYTES": str(BUDGET_BYTES),
            "HEADRACE_LOG_LEVEL": "error",
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--entries", type=int, default=32)
    parser.add_argument("--entry-bytes", type=int, default=368_640, help="16 tokens of float32 KV")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--port", type=int, default=7791)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logs.setup("bench", level="error")
    sizes = (args.entries, args.entry_bytes)
    copied = memcpy_rate(*sizes, args.seconds)
    print(f"batches of {args.entries} x {args.entry_bytes} bytes")
    print(f"memcpy {copied / 1e9:.2f} GB/s")
    results: dict[str, dict[str, float]] = {"memcpy": {"rate": copied}}
    with tempfile.TemporaryDirectory() as folder:
        unix = f"unix://{Path(folder) / 'cache.sock'}"
        tcp = f"tcp://127.0.0.1:{args.port}"
        for name, url, arena in (("shm", unix, True), ("unix", unix, False), ("tcp", tcp, False)):
            server = serve(url)
            try:
                rates = asyncio.run(measure(url, *sizes, args.seconds, arena=arena))
            finally:
                server.terminate()
                server.wait()
            results[name] = rates
            text = ", ".join(
                f"{what} {rate / 1e9:.2f} GB/s ({100 * rate / copied:.0f} %)"
                for what, rate in rates.items()
            )
            print(f"{name:>6} {text}", flush=True)
    copied_after = memcpy_rate(*sizes, args.seconds)
    print(f"memcpy {copied_after / 1e9:.2f} GB/s, at the end")
    results["memcpy"]["rate_at_the_end"] = copied_after
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
