"""What the cache tests build: keys, entries, chains, servers in this process and beside it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

from headrace.cache_client import CacheClient, PutEntry
from headrace.checksum import checksum
from headrace.clock import Clock
from headrace.frames import KV, EntryFacts, EntryKey, parse_address
from headrace.types import Band
from headrace_cache.arena import Arena
from headrace_cache.policy.names import POLICIES
from headrace_cache.server import CacheServer, Limits
from headrace_cache.store import Store

BUDGET_BYTES = 64 * 1024 * 1024
START_S_MAX = 20.0
PATIENCE_S = 10.0


def hash_of(name: object) -> bytes:
    return sha256(str(name).encode()).digest()


def data_of(name: object, size_bytes: int = 100) -> bytes:
    """Bytes that differ from name to name."""
    seed = hash_of(name)
    return (seed * (size_bytes // len(seed) + 1))[:size_bytes]


def facts_of(
    name: object,
    data: bytes,
    *,
    parent: bytes = b"",
    depth: int = 0,
    band: Band = Band.STANDARD,
    tenant: str = "t",
    cost_ms: float = 1.0,
    kind: str = KV,
    layout: bytes = b"",
    pin_ms: int = 0,
) -> EntryFacts:
    return EntryFacts(
        key=EntryKey(kind, hash_of(name)),
        parent=parent,
        depth=depth,
        size_bytes=len(data),
        crc=checksum(data),
        band=band,
        tenant=tenant,
        cost_tokens=16,
        cost_ms=cost_ms,
        layout=layout,
        pin_ms=pin_ms,
    )


def chain(name: str, length: int, size_bytes: int = 1000, **fields: object) -> list[PutEntry]:
    """`length` entries, each the child of the one before."""
    entries: list[PutEntry] = []
    parent = b""
    for depth in range(length):
        key = hash_of((name, depth))
        data = data_of((name, depth), size_bytes)
        entries.append(PutEntry(key, data, parent, depth, **fields))  # type: ignore[arg-type]
        parent = key
    return entries


def make_store(
    budget_bytes: int = BUDGET_BYTES,
    policy: str = "keep-score",
    *,
    folder: Path | None = None,
    reserved_bytes_max: int | None = None,
) -> Store:
    """A store in private memory, or in a file in `folder` that clients can map."""
    arena = Arena(budget_bytes, folder)
    return Store(budget_bytes, POLICIES[policy](None), arena, reserved_bytes_max)


def folder_of(url: str) -> Path | None:
    """Where the arena of a service at `url` is: beside its socket, if that folder is so called."""
    path = parse_address(url).path
    return Path(path).parent if path and Path(path).parent.name == "arena" else None


@asynccontextmanager
async def serving(
    url: str,
    *,
    store: Store | None = None,
    clock: Clock | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[tuple[CacheServer, str]]:
    """A server in this event loop, and the URL it is reached at; whole when it stops."""
    server = CacheServer(
        make_store(folder=folder_of(url)) if store is None else store, clock, limits
    )
    address = await server.start(parse_address(url))
    try:
        yield server, str(address)
    finally:
        await server.stop()
        server.check_integrity()
        server.store.arena.close()


@asynccontextmanager
async def client_of(url: str, **options: object) -> AsyncIterator[CacheClient]:
    """A patient client, as the machine may be busy; tests of impatience set a limit."""
    client = CacheClient(url, **({"timeout_s": PATIENCE_S} | options))  # type: ignore[arg-type]
    try:
        yield client
    finally:
        client.check_integrity()
        await client.close()


def spawn(url: str, **variables: str) -> subprocess.Popen[bytes]:
    """`python -m headrace_cache` listening on `url`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    environment |= {"HEADRACE_CACHE_LISTEN": url} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "headrace_cache"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def reap(process: subprocess.Popen[bytes]) -> str:
    """End `process` if it has not, and return what it said on stderr."""
    process.kill()
    _, errors = process.communicate()
    return errors.decode()


async def wait_ready(url: str) -> None:
    """Until a service answers at `url`. Raises TimeoutError."""
    async with asyncio.timeout(START_S_MAX):
        while True:
            async with client_of(url) as client:
                if await client.ping():
                    return
            await asyncio.sleep(0.02)
