"""What the fault runs are made of: the truth, a real cache service, real clients, all killable.

Services and clients are processes of their own, forked from this one, which has imported what they
need: a start takes milliseconds, so that many fit into a run. Everything dies with the benchmark.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import select
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import headrace_cache.__main__ as service_main
from bench._fleet import free_port
from headrace import cache_ahead
from headrace.cache_client import CacheClient, WriteEntry
from headrace_cache import disk_files

CHAIN_LENGTH = 8
CHAINS = 120
SIZE_BYTES_MAX = 120_000
cache_ahead.BATCH_BYTES_MIN = 1
"""Chains here are shorter than those that are worth places ahead."""

VERSIONS = 2
"""Two writers of one block bring different bytes, each of which is right, as two GPUs would."""

CACHE_BYTES = 24 * 1024 * 1024
DISK_BYTES = 32 * 1024 * 1024
START_S_MAX = 20.0
PATIENCE_S = 10.0
MIDDLE_S_MAX = 1.0
DISK_COUNTS = (
    "written", "read", "promoted", "corrupt", "lost_records", "lost_segments", "write_errors",
    "disk_full", "segments_dropped", "carried", "job_failures",
)  # fmt: skip


class Truth:
    """What each entry must be, from the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._noise = random.Random(seed).randbytes(4 * 1024 * 1024)

    def hash_of(self, chain: int, depth: int) -> bytes:
        return hashlib.sha256(f"{self.seed}/{chain}/{depth}".encode()).digest()

    def data_of(self, chain: int, depth: int, version: int) -> bytes:
        """Bytes that begin with their own name and differ in every part from all others'."""
        draw = random.Random(f"{self.seed}/{chain}/{depth}")
        size = draw.choice([100, 5_000, 50_000, SIZE_BYTES_MAX])
        if chain % 2:  # alike, as a model's blocks are: one batch's places do for the next
            size = 50_000
        start = draw.randrange(len(self._noise) // 4) + version * len(self._noise) // 2
        return self.hash_of(chain, depth) + self._noise[start : start + size]

    def hashes(self, chain: int) -> list[bytes]:
        return [self.hash_of(chain, depth) for depth in range(CHAIN_LENGTH)]

    def is_right(self, chain: int, depth: int, data: memoryview) -> bool:
        return any(data == self.data_of(chain, depth, version) for version in range(VERSIONS))

    def entries(
        self, chain: int, version: int, filling: Callable[[], None] = lambda: None
    ) -> list[WriteEntry]:
        """A chain to write; `filling` is called in the middle of copying each entry."""
        return [self._entry(chain, depth, version, filling) for depth in range(CHAIN_LENGTH)]

    def _entry(
        self, chain: int, depth: int, version: int, filling: Callable[[], None]
    ) -> WriteEntry:
        data = self.data_of(chain, depth, version)

        def fill(view: memoryview) -> None:
            half = len(data) // 2
            view[:half] = data[:half]
            filling()
            view[half:] = data[half:]

        return WriteEntry(
            hash=self.hash_of(chain, depth),
            size_bytes=len(data),
            fill=fill,
            parent=self.hash_of(chain, depth - 1) if depth else b"",
            depth=depth,
            tenant=f"tenant {chain % 3}",
            cost_tokens=16,
            cost_ms=5.0,
        )


@dataclass(slots=True)
class Counts:
    """What reads and writes came to."""

    reads: int = 0
    hits: int = 0
    wrong: int = 0
    disk_runs: int = 0
    arena_runs: int = 0
    remote_runs: int = 0
    corrupt_refused: int = 0
    puts: int = 0
    puts_held: int = 0
    ahead: int = 0
    """Entries written to places that were had ahead."""
    errors: int = 0
    wrong_names: list[str] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own, which dies with this one; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def reap(pid: int, signal_number: int = signal.SIGKILL) -> None:
    os.kill(pid, signal_number)
    os.waitpid(pid, 0)


class Service:
    """`headrace_cache` in a process of its own, on one directory, started again and again."""

    def __init__(
        self, directory: Path, *, cache_bytes: int = CACHE_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self.directory = directory
        self.cache_bytes = cache_bytes
        self.disk_bytes = disk_bytes
        self.disk = directory / "disk"
        self.url = ""
        self.starts = 0
        self.deaths = 0
        self._pid = 0
        self._disk_now: dict[str, int] = {}
        self._disk_before: dict[str, int] = {}
        self._full = mmap.mmap(-1, 1)

    def set_full(self, full: bool) -> None:
        """Have every write to the disk fail half-way with ENOSPC, in services to come too."""
        self._full[0] = int(full)

    def start(self, *, tcp: bool) -> None:
        """Start, and wait until it answers."""
        self.starts += 1
        if tcp:
            self.url = f"tcp://127.0.0.1:{free_port()}"
        else:
            self.url = f"unix://{self.directory / 'socket'}"
        self._pid = fork(self._serve)
        asyncio.run(self._wait_ready())

    def _serve(self) -> None:
        log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
            del os.environ[name]
        os.environ |= {
            "HEADRACE_CACHE_LISTEN": self.url,
            "HEADRACE_CACHE_BYTES": str(self.cache_bytes),
            "HEADRACE_CACHE_DISK_PATH": str(self.disk),
            "HEADRACE_CACHE_DISK_BYTES": str(self.disk_bytes),
        }
        _fail_when_full(self._full)
        service_main.main()

    async def _wait_ready(self) -> None:
        async with asyncio.timeout(START_S_MAX):
            while True:
                if self._is_gone():
                    raise SystemExit(f"the service did not start: {self.log()[-2000:]}")
                client = CacheClient(self.url, timeout_s=1.0)
                ready = await client.ping()
                await client.close()
                if ready:
                    return
                await asyncio.sleep(0.005)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """End it by force, or let it stop (SIGTERM); a service that was dead already is counted."""
        if self._is_gone():
            self.deaths += 1
        else:
            reap(self._pid, signal_number)
        self._pid = 0
        self._disk_before = self.disk_counts()
        self._disk_now = {}

    async def look(self) -> None:
        """Note what the disk tier has counted in this life of the service."""
        client = CacheClient(self.url, timeout_s=PATIENCE_S)
        stats = await client.stats() or {}
        await client.close()
        self._disk_now = {name: stats.get("disk", {}).get(name, 0) for name in DISK_COUNTS}

    def disk_counts(self) -> dict[str, int]:
        """What the disk tier has counted in all lives, as far as `look` saw them."""
        before, now = self._disk_before, self._disk_now
        return {name: before.get(name, 0) + now.get(name, 0) for name in DISK_COUNTS}

    def _is_gone(self) -> bool:
        return os.waitpid(self._pid, os.WNOHANG)[0] != 0

    @property
    def pid(self) -> int:
        """Of its process; 0 where it does not run."""
        return self._pid

    def arena_file(self) -> Path | None:
        """The file of its shared memory."""
        return next(iter(Path("/dev/shm").glob(f"headrace-arena-{self._pid}-*")), None)

    def segments(self) -> list[Path]:
        return sorted(self.disk.glob("*.segment")) if self.disk.exists() else []

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""


def _fail_when_full(full: mmap.mmap) -> None:
    """Let appends of this process fail as on a full disk while `full` says so."""
    append = disk_files.Files.append

    def faulty(files: disk_files.Files, fd: int, buffers: Sequence[Any]) -> int:
        if full[0]:
            part = b"".join(buffers)
            append(files, fd, [part[: len(part) // 2]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(files, fd, buffers)

    disk_files.Files.append = faulty  # type: ignore[method-assign]


class Child:
    """A client in a process of its own, which tells of its counts when it is done."""

    def __init__(self, work: Callable[[Callable[[], None]], Coroutine[Any, Any, Counts]]) -> None:
        """`work` is called with what it calls in the middle of a copy."""
        self._out, told = os.pipe()
        self.middle, middle = os.pipe()

        def run() -> None:
            counts = asyncio.run(work(lambda: _pause(middle)))
            os.write(told, json.dumps(asdict(counts)).encode())

        self._pid = fork(run)
        os.close(told)
        os.close(middle)

    def kill_in_the_middle(self, times: int, after_s: float) -> bool:
        """Kill it `after_s` after it told for the `times`-th time that it is in the middle.

        Whether it came so far; killed in any case.
        """
        told = 0
        while told < times and select.select([self.middle], [], [], MIDDLE_S_MAX)[0]:
            came = os.read(self.middle, times - told)
            told += len(came)
            if not came:
                break
        time.sleep(after_s)
        reap(self._pid)
        self._close()
        return told >= times

    def result(self) -> dict[str, Any]:
        """What it counted; nothing but an error if it failed."""
        parts = []
        while part := os.read(self._out, 65_536):
            parts.append(part)
        os.waitpid(self._pid, 0)
        self._close()
        told = b"".join(parts)
        counts: dict[str, Any] = json.loads(told) if told else {"errors": 1}
        return counts

    def _close(self) -> None:
        os.close(self._out)
        os.close(self.middle)


def _pause(pipe: int) -> None:
    """Tell that a copy is in the middle, and stay there for a moment."""
    try:
        os.set_blocking(pipe, False)
        os.write(pipe, b".")
    except OSError:
        pass  # nobody listens any more, or not yet: the pipe is full
    time.sleep(0.0005)


async def read_chains(
    client: CacheClient,
    truth: Truth,
    chains: Sequence[int],
    counts: Counts,
    holding: Callable[[], None],
) -> None:
    """Read `chains` and compare each block with the truth; `holding` is called meanwhile."""
    for chain in chains:
        hashes = truth.hashes(chain)
        async with client.read(hashes) as run:
            if run.blocks:
                holding()
            for depth, block in enumerate(run.blocks):
                counts.hits += 1
                if run.hashes[depth] != hashes[depth] or not truth.is_right(chain, depth, block):
                    counts.wrong += 1
                    counts.wrong_names.append(f"{chain}/{depth} {run.tier}")
            counts.reads += len(hashes)
            counts.disk_runs += run.tier == "disk"
            counts.arena_runs += run.tier == "arena"
            counts.remote_runs += run.tier == "remote"


async def reading(
    url: str,
    truth: Truth,
    chains: Sequence[int],
    holding: Callable[[], None] = lambda: None,
    *,
    arena: bool,
    seconds: float,
) -> Counts:
    """Read `chains` over and over for a while (once at least)."""
    counts = Counts()
    client = CacheClient(url, timeout_s=PATIENCE_S, arena=arena)
    end_s = time.monotonic() + seconds
    while True:
        await read_chains(client, truth, chains, counts, holding)
        if time.monotonic() >= end_s:
            break
        await asyncio.sleep(0)
    counts.corrupt_refused = client.counts.corrupt
    await client.close()
    return counts


async def writing(
    url: str,
    truth: Truth,
    chains: Sequence[int],
    version: int,
    filling: Callable[[], None],
    *,
    arena: bool,
) -> Counts:
    """Write `chains`, one after the other."""
    counts = Counts()
    client = CacheClient(url, put_timeout_s=PATIENCE_S, arena=arena)
    for chain in chains:
        counts.puts += 1
        counts.puts_held += await client.write(truth.entries(chain, version, filling))
        await asyncio.sleep(0)
    counts.ahead = client.counts.puts_ahead
    await client.close()
    return counts
