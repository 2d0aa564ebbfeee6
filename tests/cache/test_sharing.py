"""Reading and writing the arena in place: leases, late answers, and processes that die at it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.builders import chain, client_of, data_of, folder_of, hash_of, make_store, serving
from headrace import cache_threads
from headrace.cache_client import CacheClient, Entry, PutEntry, WriteEntry
from headrace.errors import WireError
from headrace.frame_codec import encode
from headrace.frames import KV, EntryKey, Lend
from headrace_cache.server import Limits

PATIENCE_S = 20.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A service's, with an arena beside its socket."""
    (tmp_path / "arena").mkdir()
    return f"unix://{tmp_path / 'arena' / 'cache.sock'}"


def hashes(entries: list[PutEntry]) -> list[bytes]:
    return [entry.hash for entry in entries]


async def eventually(fact: object) -> None:
    """Until `fact()` is true. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not fact():  # type: ignore[operator]
            await asyncio.sleep(0.002)


async def test_a_run_is_read_where_it_lies(url: str) -> None:
    """The same memory, not a copy; lent within the block, given back behind it."""
    entries = chain("a", 5)
    async with serving(url) as (server, _), client_of(url) as client:
        assert await client.put(entries)
        async with client.read(hashes(entries), tenant="t") as run:
            assert (run.tier, run.bytes) == ("arena", 5000)
            slot = server.store.index.find(EntryKey(KV, entries[0].hash))
            server.store.data(slot)[3:6] = b"!!!"
            assert run.blocks[0][3:6] == b"!!!"
            kept = run.blocks[0]
            assert len(server.store.leases) == 1
        await eventually(lambda: len(server.store.leases) == 0)
        with pytest.raises(ValueError, match="released"):
            len(kept[0:1])


async def test_entries_copy_themselves_and_only_if_they_are_wanted(url: str) -> None:
    filled: list[int] = []

    def entry(number: int) -> WriteEntry:
        def fill(view: memoryview) -> None:
            filled.append(number)
            view[:] = data_of(number)

        return WriteEntry(hash_of(number), 100, fill, layout=b"float32.")

    async with serving(url), client_of(url) as client:
        assert await client.write([entry(1), entry(2)])
        assert await client.write([entry(2), entry(3)])
        assert filled == [1, 2, 3]
        run = await client.get_run([hash_of(number) for number in (1, 2, 3)], layout=b"float32.")
        assert [bytes(data) for _, data in run] == [data_of(number) for number in (1, 2, 3)]
        assert await client.get_run([hash_of(1)], layout=b"bfloat16") == []


async def test_what_fails_to_copy_itself_is_not_stored(url: str) -> None:
    def broken(view: memoryview) -> None:
        view[:10] = b"0123456789"
        raise RuntimeError("the block is gone")

    async with serving(url) as (server, _), client_of(url) as client:
        with pytest.raises(RuntimeError, match="gone"):
            await client.write([WriteEntry(hash_of(1), 100, broken)])
        await eventually(lambda: server.store.reserved_bytes == 0)
        assert await client.get_run([hash_of(1)]) == []


async def test_places_that_were_asked_for_ahead_are_given_back(url: str) -> None:
    """The first of several pieces fails once the next ones' places are there."""
    size = 600_000

    def broken(view: memoryview) -> None:
        time.sleep(0.05)  # in a copier: the next pieces' places come meanwhile
        raise RuntimeError("the block is gone")

    entries: list[Entry] = [PutEntry(hash_of(n), data_of(n, size)) for n in range(1, 30)]
    async with (
        serving(url, store=make_store(64_000_000, folder=folder_of(url))) as (server, _),
        client_of(url) as client,
    ):
        for _ in range(3):
            failing = [WriteEntry(hash_of(each), size, broken) for each in (100, 101)]
            with pytest.raises(RuntimeError, match="gone"):
                await client.write([*failing, *entries])
            await eventually(lambda: server.store.reserved_bytes == 0)
        assert await client.write(entries), "nobody holds their places"


async def test_large_batches_are_copied_in_threads_and_arrive_whole(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several pieces, reserved ahead while others are copied; odd sizes."""
    monkeypatch.setattr(cache_threads, "INLINE_BYTES_MAX", 10_000)
    entries = [
        PutEntry(hash_of(number), data_of(number, 400_000 + 777 * number)) for number in range(40)
    ]
    async with serving(url), client_of(url) as client:
        assert await client.write(entries)
        run = await client.get_run(hashes(entries))
        assert [data for _, data in run] == [entry.data for entry in entries]


async def test_over_a_socket_a_large_batch_goes_in_several_frames(url: str) -> None:
    """Sent from where it lies, one frame while the next is read; a failing one ends no other."""
    entries = [
        PutEntry(hash_of(number), data_of(number, 400_000 + 777 * number)) for number in range(40)
    ]

    def broken(view: memoryview) -> None:
        raise RuntimeError("the block is gone")

    async with serving(url) as (server, _), client_of(url, arena=False) as client:
        assert await client.write(entries)
        run = await client.get_run(hashes(entries))
        assert [data for _, data in run] == [entry.data for entry in entries]
        late = WriteEntry(hash_of("late"), 400_000, broken)
        with pytest.raises(RuntimeError, match="gone"):
            await client.write([*(each for each in chain("b", 30, 400_000)), late])
        assert client.counts.failures == 0
        assert all(await client.has(hashes(chain("b", 9, 400_000))))
        await eventually(lambda: server.store.reserved_bytes == 0)


async def test_what_a_reader_has_does_not_change_under_it(url: str) -> None:
    """The store is turned over several times while a run is lent: it keeps its bytes."""
    entries = chain("a", 3)
    store = make_store(30_000, folder=Path(url.removeprefix("unix://")).parent)
    async with serving(url, store=store), client_of(url) as client:
        assert await client.put(entries)
        async with client.read(hashes(entries)) as run:
            for number in range(30):
                await client.put(chain(f"other {number}", 2))
            assert [bytes(block) for block in run.blocks] == [entry.data for entry in entries]


async def test_a_lease_that_nobody_waits_for_any_more_is_given_back(url: str) -> None:
    """The caller is cancelled between asking and answer."""
    entries = chain("a", 3)
    async with serving(url) as (server, _), client_of(url) as client:
        assert await client.put(entries)
        await client.get_run(hashes(entries))
        for _ in range(20):
            asked = asyncio.ensure_future(client.get_run(hashes(entries)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        await eventually(lambda: len(server.store.leases) == 0)
        assert len(await client.get_run(hashes(entries))) == 3


async def test_who_keeps_what_was_lent_is_cut_off_but_not_robbed(url: str) -> None:
    """Past the limit the connection ends; the memory is reused only when it is unmapped."""
    entries = chain("a", 2)
    async with serving(url, limits=Limits(lease_ms_max=0)) as (server, _), client_of(url) as client:
        assert await client.put(entries)
        async with client.read(hashes(entries)) as run:
            await asyncio.sleep(0.01)
            server.sweep()
            await eventually(lambda: server.snapshot()["connections"] == 1)
            server.sweep()
            assert len(server.store.leases) == 1, "still mapped"
            assert bytes(run.blocks[0]) == entries[0].data
        del run

        def let_go() -> bool:
            server.sweep()
            return len(server.store.leases) == 0

        await eventually(let_go)


async def test_nothing_is_lent_to_who_has_not_mapped_the_arena(url: str) -> None:
    async with serving(url) as (server, _), client_of(url, arena=False) as client:
        assert await client.put(chain("a", 1))
        reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix://"))
        writer.write(encode(Lend(1, (EntryKey(KV, chain("a", 1)[0].hash),))))
        assert await reader.read() == b""
        writer.close()
        assert len(server.store.leases) == 0
        assert WireError is not None


WRITER = """
import asyncio, os, sys, time
from headrace.cache_client import CacheClient, WriteEntry

def fill(view):
    view[: len(view) // 2] = b"x" * (len(view) // 2)
    print("half", flush=True)
    time.sleep(60)

async def main():
    client = CacheClient(sys.argv[1], timeout_s=10)
    key = bytes.fromhex(sys.argv[2])
    if sys.argv[3] == "write":
        await client.write([WriteEntry(key, 3_000_000, fill)])
    else:
        async with client.read([key]) as run:
            print(len(run.blocks), flush=True)
            time.sleep(60)

asyncio.run(main())
"""


def start_client(url: str, name: str, what: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, url, hash_of(name).hex(), what]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("what", ["write", "read"])
async def test_a_client_killed_at_it_leaves_nothing_behind(url: str, what: str) -> None:
    """kill -9 in the middle of a copy: its places are free, and what it half wrote is no entry."""
    async with serving(url) as (server, _), client_of(url) as client:
        if what == "read":
            assert await client.put([PutEntry(hash_of("a"), data_of("a"))])
        process = start_client(url, "a", what)
        try:
            assert process.stdout is not None
            said = await asyncio.to_thread(process.stdout.readline)
            assert said.strip() in ("half", "1")
            assert server.store.reserved_bytes + len(server.store.leases) > 0
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()

        def reclaimed() -> bool:
            server.sweep()
            return not server.store.reserved_bytes and not len(server.store.leases)

        await eventually(reclaimed)
        assert (hash_of("a") in [key for key, _ in await client.get_run([hash_of("a")])]) == (
            what == "read"
        )
        assert await client.put([PutEntry(hash_of("b"), data_of("b"))])


async def test_two_writers_of_one_block_make_one_entry(url: str) -> None:
    entries = chain("a", 8, 200_000)
    async with (
        serving(url) as (server, _),
        client_of(url) as first,
        client_of(url) as second,
    ):
        clients: list[CacheClient] = [first, second, first, second]
        await asyncio.gather(*(client.write(entries) for client in clients))
        assert len(server.store) == 8
        run = await second.get_run(hashes(entries))
        assert [data for _, data in run] == [entry.data for entry in entries]
