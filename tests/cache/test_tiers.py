"""RAM with a disk behind it: what leaves the one comes back from the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cache.builders import chain, client_of, data_of, facts_of, hash_of, make_store
from headrace.cache_admin import Changed, ListEntries, Pin, Purge, SetQuota, decode_answer, encode
from headrace.cache_client import CacheClient, PutEntry
from headrace.cache_entries import keys_of
from headrace.frames import KV, parse_address
from headrace_cache.disk import BUDGET_BYTES_MIN, DiskTier
from headrace_cache.room import charged_bytes
from headrace_cache.server import CacheServer
from headrace_cache.store import Loan
from headrace_cache.tiers import Wanted

PATIENCE_S = 20.0
ROOM = 8
SIZE_BYTES = 4_096


@asynccontextmanager
async def with_disk(folder: Path, *, shared: bool = False) -> AsyncIterator[CacheServer]:
    """A service with room for ROOM entries in RAM, and many on disk."""
    budget_bytes = ROOM * charged_bytes(SIZE_BYTES)
    arena_folder = folder if shared else None
    store = make_store(budget_bytes, "lru", folder=arena_folder, reserved_bytes_max=budget_bytes)
    server = CacheServer(store, disk=DiskTier(folder / "disk", BUDGET_BYTES_MIN))
    await server.start(parse_address(f"unix://{folder / 'cache.sock'}"))
    assert server.tiers.disk is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not server.tiers.stats()["disk"]["ready"]:
                await asyncio.sleep(0.001)
        yield server
    finally:
        await server.stop()
        server.check_integrity()
        store.arena.close()


def url_in(folder: Path) -> str:
    return f"unix://{folder / 'cache.sock'}"


async def on_disk(server: CacheServer, entries: list[PutEntry]) -> None:
    """Until all of `entries` are on disk."""
    assert server.tiers.disk is not None
    async with asyncio.timeout(PATIENCE_S):
        while len(server.tiers.disk.find_run(keys_of(hashes(entries), KV))) < len(entries):
            await asyncio.sleep(0.01)


def hashes(entries: list[PutEntry]) -> list[bytes]:
    return [entry.hash for entry in entries]


async def read(client: CacheClient, entries: list[PutEntry]) -> tuple[int, str]:
    """How many of `entries` are found, all right, and in which tier."""
    async with client.read(hashes(entries)) as run:
        for block, entry in zip(run.blocks, entries, strict=False):
            assert block == entry.data
        return len(run.blocks), run.tier


async def test_what_was_evicted_comes_back_from_disk(tmp_path: Path) -> None:
    """Read in place: what is promoted lies in the arena like all else."""
    async with with_disk(tmp_path, shared=True) as server, client_of(url_in(tmp_path)) as client:
        old = chain("old", 5, SIZE_BYTES)
        assert await client.put(old)
        assert await read(client, old) == (5, "arena")
        await on_disk(server, old)
        for number in range(4):
            assert await client.put(chain(number, 4, SIZE_BYTES))  # type: ignore[arg-type]
        assert len(server.store) <= ROOM
        assert await client.has(hashes(old)) == [True] * 5, "wherever it lies"
        found, tier = await read(client, old)
        assert (found, tier) == (5, "disk")
        assert server.tiers.counts.promoted >= 1
        assert await read(client, old) == (5, "arena"), "it is in RAM again"


async def test_entries_survive_a_restart(tmp_path: Path) -> None:
    """Stopped right after a put: what is not on disk yet is written before the end."""
    entries = chain("a", 6, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put(entries)
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert len(server.store) == 0
        assert await read(client, entries) == (6, "disk")
        assert await read(client, entries) == (6, "remote")


async def test_a_run_goes_on_from_ram_to_disk(tmp_path: Path) -> None:
    """Two blocks in RAM, four on disk alone: one run, and nothing behind a gap."""
    entries = chain("a", 6, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put([*entries[:5], *chain("b", 1, SIZE_BYTES)])
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await read(client, entries[:2]) == (2, "disk")
        assert len(server.store) == 2
        assert await read(client, entries) == (5, "disk")


async def test_what_leaves_before_the_disk_is_read_is_read_from_there_too(tmp_path: Path) -> None:
    """Found in RAM when it was asked for, evicted before the answer began: the run is whole."""
    entries = chain("a", 4, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put(entries)
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await read(client, entries[:2]) == (2, "disk")
        awaited = server.tiers.lend(1, Wanted(keys_of(hashes(entries), KV), 1 << 20))
        assert not isinstance(awaited, Loan), "some of it is on disk alone"
        for number in range(ROOM):
            data = data_of(("b", number), SIZE_BYTES)
            facts = facts_of(("b", number), data)
            server.store.put(facts, memoryview(data), server.clock.now_ms())
        assert not any(key in server.store for key in keys_of(hashes(entries), KV))
        loan = await awaited
        assert [bytes(server.store.arena.view(p, SIZE_BYTES)) for p in loan.places] == [
            entry.data for entry in entries
        ]
        server.store.end(1, loan.lease)


async def test_administration_reaches_both_tiers(tmp_path: Path) -> None:
    """Listed where they lie; a purged chain is gone from both, and after a restart; pins stay."""
    entries, other = chain("a", 4, SIZE_BYTES, tenant="acme"), chain("b", 2, SIZE_BYTES)
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:

        async def manage(request: object) -> object:
            answer = await client.manage(encode(request))  # type: ignore[arg-type]
            assert answer is not None
            return decode_answer(answer)

        assert await client.put([*entries, *other])
        await on_disk(server, entries)
        await on_disk(server, other)
        listed = await manage(ListEntries("acme", limit=3))
        assert [each.depth for each in listed.entries] == [0, 1, 2]  # type: ignore[attr-defined]
        assert {each.tiers for each in listed.entries} == {3}  # type: ignore[attr-defined]
        rest = await manage(ListEntries("acme", cursor=listed.cursor))  # type: ignore[attr-defined]
        assert [each.depth for each in rest.entries] == [3]  # type: ignore[attr-defined]
        keys = keys_of(hashes(other), KV)
        assert await manage(Pin(keys, 60_000, "acme")) == Changed(0), "not theirs"
        assert await manage(Pin(keys, 60_000)) == Changed(2)
        found = await manage(ListEntries(prefix=entries[2].hash))
        assert len(found.entries) == 2  # type: ignore[attr-defined]
        assert await manage(Purge("acme", entries[2].hash)) == Changed(2, 2 * SIZE_BYTES)
        assert await read(client, entries) == (2, "remote")
        assert await manage(Purge("acme")) == Changed(2, 2 * SIZE_BYTES)
        assert await client.has(hashes(entries)) == [False] * 4
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await client.has(hashes(entries)) == [False] * 4
        assert await read(client, other) == (2, "disk")
        slot = server.store.index.find(keys[0])
        assert server.store.pinned_until_ms(slot) > 0, "pinned as before"


async def test_a_quota_holds_at_once_and_for_what_comes(tmp_path: Path) -> None:
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await client.put(chain("a", 6, SIZE_BYTES, tenant="acme"))
        quota = SetQuota("acme", 3 * charged_bytes(SIZE_BYTES), 0)
        assert await client.manage(encode(quota)) == encode(Changed(0))
        stats = await client.stats()
        assert stats is not None
        assert stats["by_tenant"]["acme"]["entries"] == 3
        assert stats["quotas"]["acme"]["used_bytes"] == quota.max_bytes
        for number in range(5):
            await client.put(chain(f"c{number}", 1, SIZE_BYTES, tenant="acme"))
            assert server.store.tallies.by_tenant["acme"].entries <= 3
        refused = await client.manage(encode(SetQuota("greedy", 0, 1 << 40)))
        assert refused is not None
        assert refused["what"] == "refused"


async def test_a_disk_in_trouble_is_a_miss(tmp_path: Path) -> None:
    """The files are gone while the service runs: misses, no error, and puts go on."""
    entries = chain("a", 4, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put(entries)
    for path in (tmp_path / "disk").glob("*"):
        if path.stat().st_size > SIZE_BYTES:
            with path.open("r+b") as file:
                file.truncate(200)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        found, _ = await read(client, entries)
        assert found < 4
        assert await client.put(entries)
        assert (await read(client, entries))[0] == 4
        assert hash_of(1)
