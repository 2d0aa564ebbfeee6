"""Bandwidth of the cache service against this machine's memcpy: `python -m bench cache`.

Client and service are processes of their own. `shm` reads and writes in place, `unix` and `tcp`
send entries as frames. A client keeps one, two or four batches in flight; workers keep
WORKERS_IN_FLIGHT. Every put is of new keys, so that once the budget is full each also evicts.
What is got is checked by CRC, as always; `get` copies it into the client's own memory, `view` uses
it where it lies. A put is all of it: naming the entries, their places, the copy, the checksum, and
whatever leaves for them; a get is from the call to checked bytes in the caller's memory.

What is possible is measured in the same run, over the same sizes. `memcpy`: one thread's,
from a ring larger than the CPU's caches to one of the same size in a file in /dev/shm, whose pages
are mapped: source and target are cold, for a copy as for a put and a get (which read the last
CHAINS_READ batches in turn). `fresh`: the same to pages nobody touched yet. `checked`: the copy
with a CRC that puts and gets make, by one thread and by all copiers. `loopback`: what two processes
move over a TCP connection, doing nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from headrace import copying, logs, loops, turns
from headrace.arena_view import HEADER_BYTES
from headrace.cache_client import CacheClient, PutEntry, WriteEntry
from headrace.cache_threads import COPIERS
from headrace.copying import Copies, copy_checked
from headrace_worker.put_queue import BATCHES_MAX

BUDGET_BYTES = 1 << 30
RING_BYTES = 256 << 20
START_S_MAX = 20.0
CHAINS_READ = 16
WORKERS_IN_FLIGHT = BATCHES_MAX


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


class Shared:
    """A ring of shared memory to copy batches to, in places as entries have them in the arena."""

    def __init__(self, entries: int, entry_bytes: int) -> None:
        self._batch_bytes = entries * entry_bytes
        self._entry_bytes = entry_bytes
        self.batches = RING_BYTES // self._batch_bytes
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            size = RING_BYTES + HEADER_BYTES
            os.posix_fallocate(file.fileno(), 0, size)
            self._memory = memoryview(mmap.mmap(file.fileno(), size))[HEADER_BYTES:]

    def batch(self, number: int) -> list[memoryview]:
        start = number % self.batches * self._batch_bytes
        size = self._entry_bytes
        return [
            self._memory[at : at + size] for at in range(start, start + self._batch_bytes, size)
        ]


def median_rate(step: Callable[[int], None], size_bytes: int, seconds: float) -> float:
    """Bytes a second of `step`, which moves `size_bytes`, one after the other."""
    times: list[float] = []
    began = now = time.perf_counter()
    while now - began < seconds:
        step(len(times))
        times.append(time.perf_counter() - now)
        now = time.perf_counter()
    return size_bytes / sorted(times)[len(times) // 2]


def copy_rates(entries: int, entry_bytes: int, seconds: float) -> dict[str, float]:
    """Bytes a second of copying batches into shared memory: `memcpy`, `fresh`, `checked`."""
    ring, size_bytes = Ring(entries, entry_bytes), entries * entry_bytes
    shared = Shared(entries, entry_bytes)

    def copy(number: int) -> None:
        for source, target in zip(ring.batch(number), shared.batch(number), strict=True):
            target[:] = source

    def checked(number: int, threads: int) -> None:
        copies = Copies.of(shared.batch(number), ring.batch(number))
        if copies is None:
            for source, target in zip(ring.batch(number), shared.batch(number), strict=True):
                copy_checked(target, source)
            return
        helpers = [threading.Thread(target=copies.run) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        copies.run()
        for helper in helpers:
            helper.join()

    began = time.perf_counter()
    for number in range(shared.batches):
        copy(number)
    fresh = shared.batches * size_bytes / (time.perf_counter() - began)
    return {
        "memcpy": median_rate(copy, size_bytes, seconds),
        "fresh": fresh,
        "checked": median_rate(partial(checked, threads=1), size_bytes, seconds),
        "checked by all": median_rate(partial(checked, threads=COPIERS), size_bytes, seconds),
    }


def loopback_rate(entry_bytes: int, seconds: float) -> float:
    """Bytes a second that two bare processes move over TCP, from and to rings of their own."""
    count = RING_BYTES // entry_bytes
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if not child:
            try:
                _send_for(listener.getsockname(), Ring(1, entry_bytes), seconds)
            finally:
                os._exit(0)
        memory = memoryview(bytearray(b"1" * RING_BYTES))
        connection, _ = listener.accept()
    with connection:
        connection.sendall(b"!")
        began, received = time.perf_counter(), 0
        for number in itertools.cycle(range(count)):
            rest = memory[number * entry_bytes : (number + 1) * entry_bytes]
            while rest and (came := connection.recv_into(rest)):
                rest, received = rest[came:], received + came
            if rest:
                break
        rate = received / (time.perf_counter() - began)
    os.waitpid(child, 0)
    return rate


def _send_for(address: tuple[str, int], ring: Ring, seconds: float) -> None:
    with socket.create_connection(address) as connection:
        connection.recv(1)
        end = time.perf_counter() + seconds
        for number in itertools.count():
            if time.perf_counter() > end:
                return
            connection.sendall(ring.batch(number)[0])


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
    possible = copy_rates(*sizes, args.seconds)
    possible["loopback"] = loopback_rate(entry_bytes, args.seconds)
    copied = possible["memcpy"]
    text = ", ".join(f"{what} {rate / 1e9:.2f}" for what, rate in possible.items())
    print(f"batches of {entries} x {entry_bytes} bytes, possible in GB/s: {text}")
    results: dict[str, dict[str, float]] = {"possible": possible}
    with tempfile.TemporaryDirectory() as folder:
        unix = f"unix://{Path(folder) / 'cache.sock'}"
        tcp = f"tcp://127.0.0.1:{args.port}"
        ways = {"shm": (unix, True), "unix": (unix, False), "tcp": (tcp, False)}
        for way, in_flight in itertools.product(args.ways, args.in_flight):
            url, arena = ways[way]
            server = serve(url)
            try:
                measured = measure(url, *sizes, args.seconds, arena=arena, in_flight=in_flight)
                with asyncio.Runner(loop_factory=loops.loop_factory()) as runner:
                    rates = runner.run(measured)
            finally:
                server.terminate()
                server.wait()
            results[f"{way} {in_flight}"] = rates
            most = possible["loopback"] if way == "tcp" else copied
            text = ", ".join(
                f"{what} {rate / 1e9:.2f} GB/s ({100 * rate / most:.0f} %)"
                for what, rate in rates.items()
            )
            usual = ", as workers have" if in_flight == WORKERS_IN_FLIGHT else ""
            print(f"{way:>6}, {in_flight} in flight{usual}: {text}", flush=True)
    after = copy_rates(*sizes, args.seconds)["memcpy"]
    print(f"memcpy {after / 1e9:.2f} GB/s, at the end")
    possible["memcpy at the end"] = after
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
    copying.prepare()
    turns.ask(turns.SHORT_NS)  # as a worker does
    results = {}
    for batch in args.batch or ["32x368640", "16x2097152"]:
        entries, _, entry_bytes = batch.partition("x")
        results[batch] = compare(int(entries), int(entry_bytes), args)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
