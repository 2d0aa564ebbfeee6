"""RAM with a disk behind it: what leaves the one comes back from the other."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import chain, client_of, data_of, facts_of, hash_of, make_store
from headrace.cache_admin import (
    Changed,
    EntryInfo,
    ListEntries,
    Pin,
    Purge,
    SetQuota,
    Unpin,
    decode_answer,
    encode,
)
from headrace.cache_client import CacheClient, PutEntry
from headrace.cache_entries import keys_of
from headrace.errors import WireError
from headrace.frames import KV, parse_address
from headrace_cache.disk import BUDGET_BYTES_MIN, DiskTier
from headrace_cache.grants import Loan
from headrace_cache.policy.quota import Share
from headrace_cache.promises import decode_shares, encode_shares
from headrace_cache.room import charged_bytes
from headrace_cache.server import CacheServer
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
        assert await client.put([*entries, *other])
        await on_disk(server, entries)
        await on_disk(server, other)
        first = await manage(client, ListEntries("acme", limit=3))
        assert [each.depth for each in first.entries] == [0, 1, 2]
        assert {each.tiers for each in first.entries} == {3}
        rest = await manage(client, ListEntries("acme", cursor=first.cursor))
        assert [each.depth for each in rest.entries] == [3]
        keys = keys_of(hashes(other), KV)
        assert await manage(client, Pin(keys, 60_000, "acme")) == Changed(0), "not theirs"
        assert await manage(client, Pin(keys, 60_000)) == Changed(2)
        found = await manage(client, ListEntries(prefix=entries[2].hash))
        assert len(found.entries) == 2
        assert await manage(client, Purge("acme", entries[2].hash)) == Changed(2, 2 * SIZE_BYTES)
        assert await read(client, entries) == (2, "remote")
        assert await manage(client, Purge("acme")) == Changed(2, 2 * SIZE_BYTES)
        assert await client.has(hashes(entries)) == [False] * 4
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await client.has(hashes(entries)) == [False] * 4
        assert await read(client, other) == (2, "disk")
        slot = server.store.index.find(keys[0])
        assert server.store.pinned_until_ms(slot) > 0, "pinned as before"


async def manage(client: CacheClient, request: Any) -> Any:
    answer = await client.manage(encode(request))
    assert answer is not None
    return decode_answer(answer)


async def listed(client: CacheClient, **asked: Any) -> list[EntryInfo]:
    """All pages of a list, of three rows each."""
    rows: list[EntryInfo] = []
    cursor = 0
    while True:
        page = await manage(client, ListEntries(limit=3, cursor=cursor, **asked))
        rows += page.entries
        cursor = page.cursor
        if not cursor:
            return rows


async def test_what_is_on_disk_alone_is_administered_too(tmp_path: Path) -> None:
    """Listed once each, pinned where it lies, kept through compaction, unpinned, purged."""
    entries, other = chain("a", 6, SIZE_BYTES, tenant="acme"), chain("b", 3, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put([*entries, *other[:2]])
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        disk = server.tiers.disk
        assert disk is not None
        assert await read(client, entries[:2]) == (2, "disk")
        rows = await listed(client, tenant="acme")
        assert sorted((row.depth, row.tiers) for row in rows) == [
            (0, 3), (1, 3), (2, 2), (3, 2), (4, 2), (5, 2)
        ]  # fmt: skip
        assert all(not row.pin_ms for row in rows)
        rows = await listed(client, prefix=entries[3].hash)
        assert sorted(row.depth for row in rows) == [3, 4, 5]
        keys = keys_of(hashes(entries), KV)
        assert await manage(client, Pin(keys, 600_000, "zen")) == Changed(0), "not theirs"
        assert await manage(client, Pin(keys, 600_000, "acme")) == Changed(6)
        rows = await listed(client, tenant="acme")
        assert all(0 < row.pin_ms <= 600_000 for row in rows) and len(rows) == 6
        assert len(server.store) == 2, "pinning brings nothing into RAM"
        for number in range(400):
            data = data_of(("c", number), 8 * SIZE_BYTES)
            while not disk.offer(facts_of(("c", number), data), data):
                await asyncio.sleep(0.001)
        assert await asyncio.to_thread(disk.settle, PATIENCE_S)
        assert disk.stats()["segments_dropped"] > 0
        assert len(disk.find_run(keys)) == 6, "and whoever is not pinned left"
        assert disk.find(keys_of(hashes(other), KV)[0]) is None
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert {row.pin_ms > 0 for row in await listed(client, tenant="acme")} == {True}
        assert await manage(client, Unpin(keys[4:], "acme")) == Changed(2)
        assert [row.depth for row in await listed(client, tenant="acme") if not row.pin_ms]
        assert await manage(client, Purge("acme")) == Changed(6, 6 * SIZE_BYTES)
        assert await client.has(hashes(entries)) == [False] * 6
        assert await listed(client, tenant="acme") == []


async def test_a_chain_is_purged_through_both_tiers(tmp_path: Path) -> None:
    """Its middle is on disk alone, its end in RAM alone: in one pass over the disk all of it goes.

    0 - 1 - 2 - 3 - 4 - 5, of which 2 and 3 link what is asked for with the rest.
    """
    entries = chain("a", 6, SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.put(entries[:4])
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await read(client, entries[:2]) == (2, "disk")
        assert await client.put(entries[4:])
        await on_disk(server, entries)
        scans = count_scans(server)
        assert await manage(client, Purge(prefix=entries[1].hash)) == Changed(5, 5 * SIZE_BYTES)
        assert len(scans) <= 2
        assert await client.has(hashes(entries)) == [True] + [False] * 5
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        assert await client.has(hashes(entries)) == [True] + [False] * 5


def count_scans(server: CacheServer) -> list[None]:
    """Grows by one whenever all heads on disk are read."""
    scans: list[None] = []
    assert server.tiers.disk is not None
    disk_log = server.tiers.disk._log
    records = disk_log.records

    def counted(**options: bool) -> Any:
        scans.append(None)
        return records(**options)

    disk_log.records = counted  # type: ignore[method-assign]
    return scans


async def test_quotas_and_minimums_survive_a_restart(tmp_path: Path) -> None:
    """Those that hold, as they were last set; damage to the file costs them, not the start."""
    charge = charged_bytes(SIZE_BYTES)
    async with with_disk(tmp_path), client_of(url_in(tmp_path)) as client:
        for quota in (
            SetQuota("acme", 3 * charge, charge),
            SetQuota("zen", 2 * charge, 0),
            SetQuota("zen", 0, 2 * charge),
        ):
            assert await manage(client, quota) == Changed(0)
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert server.store.shares() == {
            "acme": Share(3 * charge, charge), "zen": Share(None, 2 * charge)
        }  # fmt: skip
        await client.put(chain("a", 6, SIZE_BYTES, tenant="acme"))
        assert server.store.tallies.by_tenant["acme"].entries <= 3
    [note] = (tmp_path / "disk").glob("note")
    note.write_bytes(note.read_bytes()[:-1] + b"?")
    async with with_disk(tmp_path) as server:
        assert server.store.shares() == {}


async def test_a_quota_that_cannot_be_kept_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert server.tiers.disk is not None

        def full(*_: object) -> None:
            raise OSError(28, "no space left")

        monkeypatch.setattr(server.tiers.disk._files, "append", full)
        refused = await manage(client, SetQuota("acme", 1 << 16, 0))
        assert "until the next restart" in refused.message
        assert server.store.shares() == {"acme": Share(1 << 16, 0)}


@given(st.binary(max_size=60))
def test_any_bytes_are_promises_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert decode_shares(data) == {}
    shares = {"acme": Share(5, 1), "zen": Share(None, 0)}
    assert decode_shares(encode_shares(shares)) == shares
    with pytest.raises(WireError):
        decode_shares(encode_shares(shares) + data + b"x")


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


async def scraped(server: CacheServer) -> dict[str, float]:
    """The disk's figures as Prometheus reads them, by name and labels."""
    port = server.metrics.listen("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{port}/metrics"
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            lines = (await answer.text()).splitlines()
    finally:
        await server.metrics.close()
    rows = [line.rpartition(" ") for line in lines if line.startswith("headrace_cache_disk_")]
    return {name.removeprefix("headrace_cache_disk_"): float(value) for name, _, value in rows}


async def test_the_disk_is_seen_in_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there, hits, writes, what was corrupt, and pauses because it is full."""
    entries = chain("a", 6, SIZE_BYTES, tenant="acme")
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await client.put(entries)
        await on_disk(server, entries)
        found = await scraped(server)
        assert found["written_total"] == found["entries"] == 6
        assert found["written_bytes_total"] == found["bytes"] == 6 * SIZE_BYTES
        assert found['tenant_bytes{tenant="acme"}'] == 6 * SIZE_BYTES
        assert found["used_bytes"] >= found["bytes"] and found["ready"] == 1
        assert found["disk_full_total"] == found["paused"] == found["corrupt_total"] == 0
    [segment] = (tmp_path / "disk").glob("*.segment")
    data = bytearray(segment.read_bytes())
    at = bytes(data).index(entries[4].data)
    data[at] ^= 1
    segment.write_bytes(data)
    async with with_disk(tmp_path) as server, client_of(url_in(tmp_path)) as client:
        assert await read(client, entries) == (4, "disk")
        found = await scraped(server)
        assert found["read_total"] >= found["promoted_total"] == 4
        assert found["promoted_bytes_total"] == 4 * SIZE_BYTES
        assert found["corrupt_total"] == 1

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        assert server.tiers.disk is not None
        monkeypatch.setattr(server.tiers.disk._files, "append", full)
        found, tries = await scraped(server), 0
        async with asyncio.timeout(PATIENCE_S):
            # a pause may end before it is seen, and the next write begins another
            while not (found["disk_full_total"] and found["paused"]):
                tries += 1
                assert await client.put(chain(f"b{tries}", 1, SIZE_BYTES))
                await asyncio.sleep(0.02)
                found = await scraped(server)


async def test_without_a_disk_there_are_no_figures_of_it(tmp_path: Path) -> None:
    server = CacheServer(make_store())
    await server.start(parse_address(url_in(tmp_path)))
    assert await scraped(server) == {}
    await server.stop()
    server.store.arena.close()


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
