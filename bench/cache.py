"""Bandwidth of the cache service against this machine's memcpy: `python -m bench cache`.

Client and service are processes of their own. `shm` reads and writes in place, `unix` and `tcp`
send entries as frames. A client keeps one, two or four batches in flight. Every put is of new keys,
so that once the budget is full each also evicts.
What is got is checked by CRC, as always; `get` copies it into the client's own memory, `view` uses
it where it lies. A put is all of it: naming the entries, their places, the copy, the checksum, and
whatever leaves for them; a get is from the call to checked bytes in the caller's memory.
memcpy is one thread's, in the same process, over the same sizes, from a ring larger than the CPU's
caches to one of the same size in a file in /dev/shm, whose pages are mapped: source and target are
cold, for a copy as for a put and a get (which read the last CHAINS_READ batches in turn).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
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


async def timed(
    step: Callable[[int], Awaitable[None]], size_bytes: int, seconds: float, in_flight: int
) -> float:
    """Bytes a second of `step`, which moves `size_bytes`, `in_flight` of them at a time.

    By the median of the times from one end of a step to that of the `in_flight`th after it.
    """
    ends: list[float] = []
    numbers = itertools.count()
    end = time.perf_counter() + seconds

    async def go_on() -> None:
        while time.perf_counter() < end:
            await step(next(numbers))
            ends.append(time.perf_counter())

    await asyncio.gather(*(go_on() for _ in range(in_flight)))
    spans = sorted(late - early for early, late in zip(ends, ends[in_flight:], strict=False))
    return in_flight * size_bytes / spans[len(spans) // 2]


async def measure(
    url: str, entries: int, entry_bytes: int, seconds: float, *, arena: bool, in_flight: int
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
        found = await client.read_into(resident[-1 - number % CHAINS_READ], targets)
        assert found == entries, "everything was there"

    async def view(number: int) -> None:
        async with client.read(resident[-1 - number % CHAINS_READ]) as run:
            assert len(run.blocks) == entries, "everything was there"

    # once through the budget, so that memory is there and evictions are part of it; read, too:
    # gets have a connection and a mapping of their own, whose pages are mapped by their first use
    for number in range(BUDGET_BYTES // batch_bytes + 1):
        await put(number)
        await view(0)
    first = len(resident)
    how = (batch_bytes, seconds, in_flight)
    rates = {"put": await timed(lambda n: put(first + n), *how)}
    rates["get"] = await timed(get, *how)
    rates["view"] = await timed(view, *how)
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


def compare(
    entries: int, entry_bytes: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Rates of all ways, beside memcpy's; printed as they come."""
    sizes = (entries, entry_bytes)
    copied = memcpy_rate(*sizes, args.seconds)
    print(f"batches of {entries} x {entry_bytes} bytes: memcpy {copied / 1e9:.2f} GB/s")
    results: dict[str, dict[str, float]] = {"memcpy": {"rate": copied}}
    with tempfile.TemporaryDirectory() as folder:
        unix = f"unix://{Path(folder) / 'cache.sock'}"
        tcp = f"tcp://127.0.0.1:{args.port}"
        ways = {"shm": (unix, True), "unix": (unix, False), "tcp": (tcp, False)}
        for way, in_flight in itertools.product(args.ways, args.in_flight):
            url, arena = ways[way]
            server = serve(url)
            try:
                rates = asyncio.run(
                    measure(url, *sizes, args.seconds, arena=arena, in_flight=in_flight)
                )
            finally:
                server.terminate()
                server.wait()
            results[f"{way} {in_flight}"] = rates
            text = ", ".join(
                f"{what} {rate / 1e9:.2f} GB/s ({100 * rate / copied:.0f} %)"
                for what, rate in rates.items()
            )
            print(f"{way:>6}, {in_flight} in flight: {text}", flush=True)
    after = memcpy_rate(*sizes, args.seconds)
    print(f"memcpy {after / 1e9:.2f} GB/s, at the end")
    results["memcpy"]["rate_at_the_end"] = after
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--batch",
        action="append",
        help="entries x bytes; 32x368640 and 16x2097152 if not given: 16 tokens of a small "
        "model's float32 KV, and of an 8B model's float16",
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=["shm", "unix", "tcp"])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=7791)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logs.setup("bench", level="error")
    results = {}
    for batch in args.batch or ["32x368640", "16x2097152"]:
        entries, _, entry_bytes = batch.partition("x")
        results[batch] = compare(int(entries), int(entry_bytes), args)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
