"""Places that a writer has ahead of its next batch: charged, bounded, and never anybody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import chain, client_of, facts_of, folder_of, hash_of, make_store, serving
from headrace import cache_ahead
from headrace.cache_client import CacheClient, PutEntry, WriteEntry
from headrace.frames import KV, NONE_AHEAD, EntryFacts, EntryKey, Reserved
from headrace_cache.advances import ADVANCE_SHARE_MAX, ADVANCES_SHARE_MAX
from headrace_cache.arena import Arena
from headrace_cache.grants import NOWHERE, Outcome
from headrace_cache.policy.names import POLICIES
from headrace_cache.policy.quota import Share
from headrace_cache.room import charged_bytes
from headrace_cache.server import Limits
from headrace_cache.store import Store

SIZE = 1000
PATIENCE_S = 20.0


def facts(*names: object, tenant: str = "t", size_bytes: int = SIZE) -> list[EntryFacts]:
    return [facts_of(name, bytes(size_bytes), tenant=tenant) for name in names]


def key(name: object) -> EntryKey:
    return EntryKey(KV, hash_of(name))


def had_ahead(store: Store, count: int, holder: int = 1, tenant: str = "t") -> tuple[int, int]:
    """A ticket for places, and how many they are."""
    ticket, places = store.reserve_ahead(holder, tenant, count, SIZE, 0)
    return ticket, len(places)


# the store


def test_what_is_had_ahead_is_named_later_and_read_once_it_is_written() -> None:
    store = make_store()
    ticket, places = store.reserve_ahead(1, "t", 3, SIZE, 0)
    reservation = store.reserve(1, facts("a", "b", "c"), 0, using=ticket)
    assert (reservation.ticket, reservation.places) == (ticket, places)
    assert key("a") not in store, "not before it is committed"
    assert store.commit(1, ticket, [1, 2, -1], 0) == 2
    assert (key("a") in store, key("b") in store, key("c") in store) == (True, True, False)
    assert store.reserved_bytes == 0
    store.check_integrity()


def test_a_place_whose_entry_is_not_wanted_is_nobody_elses_before_the_commit() -> None:
    """Its holder may be writing to it: it learns later that somebody else was first."""
    store = make_store()
    store.put(facts("there")[0], bytes(SIZE), 0)
    other = store.reserve(2, facts("on its way"), 0)
    ticket, places = store.reserve_ahead(1, "t", 5, SIZE, 0)
    names = ("there", "new", "on its way", "new")
    reservation = store.reserve(1, facts(*names), 0, using=ticket)
    kept = [outcome.value for outcome in reservation.outcomes]
    assert kept == [Outcome.PRESENT, Outcome.KEPT, Outcome.BUSY, Outcome.BUSY]
    assert reservation.places == (NOWHERE, places[1], NOWHERE, NOWHERE)
    taken = store.reserve(3, facts(*range(200)), 0).places
    assert not set(taken) & set(places[:4]), "only what is left over is free again"
    store.check_integrity()
    assert store.commit(1, ticket, [0, 1, 2, 3], 0) == 1
    assert store.commit(2, other.ticket, [4], 0) == 1
    store.check_integrity()
    store.end_all(3)
    assert store.reserved_bytes == 0


@pytest.mark.parametrize(
    "entries",
    [
        facts("a", tenant="another"),
        facts("a", size_bytes=SIZE - 1),
        facts(*range(9)),
    ],
    ids=["another tenant's", "another size", "more than there are places"],
)
def test_places_take_what_they_are_charged_for_and_nothing_else(entries: list[EntryFacts]) -> None:
    store = make_store()
    ticket, count = had_ahead(store, 8)
    assert count == 8
    outcomes = store.reserve(1, entries, 0, using=ticket).outcomes
    assert set(outcomes) == {Outcome.SKIPPED}
    store.end(1, ticket)
    store.check_integrity()
    assert store.used_bytes == 0


def test_a_ticket_is_good_once_and_for_its_holder() -> None:
    store = make_store()
    ticket, _ = had_ahead(store, 2)
    assert store.reserve(2, facts("a"), 0, using=ticket).ticket == 0
    assert store.reserve(1, facts("a"), 0, using=ticket).ticket == ticket
    assert store.reserve(1, facts("b"), 0, using=ticket).ticket == 0
    store.end_all(1)
    store.check_integrity()
    assert store.used_bytes == 0


def test_nobody_hoards_the_arena() -> None:
    budget_bytes = 64 * 1024 * 1024
    store = make_store(budget_bytes)
    for holder in range(1, 30):
        for _ in range(3):
            had_ahead(store, 1000, holder)
    ahead_bytes = store.stats()["ahead_bytes"]
    assert 0.9 * ADVANCES_SHARE_MAX < ahead_bytes / budget_bytes <= ADVANCES_SHARE_MAX
    store.end_all(1)
    freed_bytes = ahead_bytes - store.stats()["ahead_bytes"]
    assert 0 < freed_bytes <= ADVANCE_SHARE_MAX * budget_bytes
    store.check_integrity()


def test_a_quota_counts_what_is_had_ahead() -> None:
    store = make_store()
    charge = charged_bytes(SIZE)
    assert not store.set_quota("t", Share(4 * charge), 0)
    assert had_ahead(store, 5) == (0, 0), "more than the quota allows"
    ticket, count = had_ahead(store, 3)
    assert count == 3
    outcomes = store.reserve(2, facts(1, 2), 0).outcomes
    assert outcomes == (Outcome.KEPT, Outcome.OUTRANKED), "one is left beside them"
    assert not store.set_quota("t", Share(charge), 0)
    assert set(store.reserve(1, facts(3, 4), 0, using=ticket).outcomes) == {Outcome.SKIPPED}, (
        "the quota was lowered meanwhile"
    )
    store.end_all(1)
    store.check_integrity()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ahead", "name", "commit", "reserve", "end", "gone"]),
            st.integers(1, 3),
            st.integers(1, 6),
            st.integers(0, 40),
        ),
        max_size=60,
    )
)
def test_any_program_keeps_places_apart(steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever writers ask for, no two of them may ever write to the same bytes."""
    store = make_store(400 * charged_bytes(SIZE))
    mine: dict[int, dict[int, tuple[int, ...]]] = {1: {}, 2: {}, 3: {}}
    named: dict[int, dict[int, int]] = {1: {}, 2: {}, 3: {}}
    for now_ms, (what, holder, count, first) in enumerate(steps):
        entries = facts(*range(first, first + count))
        tickets = mine[holder]
        if what == "ahead":
            ticket, places = store.reserve_ahead(holder, "t", count, SIZE, now_ms)
            if ticket:
                tickets[ticket] = places
        elif what == "reserve":
            reservation = store.reserve(holder, entries, now_ms)
            if reservation.ticket:
                given = tuple(place for place in reservation.places if place != NOWHERE)
                tickets[reservation.ticket] = given
                named[holder][reservation.ticket] = len(given)
        elif what == "name":
            open_ = [t for t, p in tickets.items() if t not in named[holder] and len(p) >= count]
            if open_:
                store.reserve(holder, entries, now_ms, using=open_[0])
                tickets[open_[0]] = tickets[open_[0]][:count]
                named[holder][open_[0]] = count
        elif what == "commit" and named[holder]:
            ticket, crcs = named[holder].popitem()
            store.commit(holder, ticket, [7] * crcs, now_ms)
            del tickets[ticket]
        elif what == "end" and tickets:
            ticket, _ = tickets.popitem()
            named[holder].pop(ticket, None)
            store.end(holder, ticket)
        elif what == "gone":
            store.end_all(holder)
            tickets.clear()
            named[holder].clear()
        store.trim(now_ms)
        writable = [p for each in mine.values() for places in each.values() for p in places]
        assert len(writable) == len(set(writable)), "one writer a place"
        store.check_integrity()
    for holder in mine:
        store.end_all(holder)
    assert store.reserved_bytes == 0


# client and service


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service's, with an arena beside its socket; any batch is worth places ahead."""
    monkeypatch.setattr(cache_ahead, "BATCH_BYTES_MIN", 1)
    (tmp_path / "arena").mkdir()
    return f"unix://{tmp_path / 'arena' / 'cache.sock'}"


async def eventually(fact: object) -> None:
    """Until `fact()` is true. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not fact():  # type: ignore[operator]
            await asyncio.sleep(0.002)


def hashes(entries: list[PutEntry]) -> list[bytes]:
    return [entry.hash for entry in entries]


async def test_batch_after_batch_is_written_to_places_had_ahead(url: str) -> None:
    """Longer ones than before, shorter ones, and such as do not fit: all arrive as they are."""
    batches = [chain(name, length) for name, length in (("a", 5), ("b", 5), ("c", 9), ("d", 2))]
    others = [chain("e", 4, 700), chain("f", 4, tenant="another"), chain("g", 4)]
    async with serving(url) as (server, _), client_of(url) as client:
        for entries in (*batches, *others):
            assert await client.write(entries)
        assert client.counts.puts_ahead == 5 + 5 + 2
        for entries in (*batches, *others):
            run = await client.get_run(hashes(entries))
            assert [data for _, data in run] == [entry.data for entry in entries]
        server.check_integrity()


async def test_what_the_service_has_already_stays_as_it_is(url: str) -> None:
    """It is copied to no purpose, and counts as held."""
    entries = chain("a", 5)
    async with serving(url) as (server, _), client_of(url) as client:
        assert await client.write(entries)
        again = [entry._replace(data=bytes(SIZE)) for entry in entries]
        assert await client.write([*again, *chain("b", 2)])
        run = await client.get_run(hashes(entries))
        assert [data for _, data in run] == [entry.data for entry in entries]
        server.check_integrity()


async def test_places_that_are_not_used_are_given_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_ahead, "KEPT_S", 0.05)
    async with serving(url) as (server, _), client_of(url) as client:
        assert await client.write(chain("a", 5))
        assert server.store.stats()["ahead_bytes"] > 0
        await eventually(lambda: server.store.stats()["ahead_bytes"] == 0)
        assert await client.write(chain("b", 5))


async def test_what_fails_to_copy_itself_gives_its_places_back(url: str) -> None:
    def broken(view: memoryview) -> None:
        raise RuntimeError("the block is gone")

    async with serving(url) as (server, _), client_of(url) as client:
        assert await client.write(chain("a", 5))
        with pytest.raises(RuntimeError, match="gone"):
            await client.write([WriteEntry(hash_of("x"), SIZE, broken)])
        await eventually(lambda: server.store.reserved_bytes == 0)
        assert await client.get_run([hash_of("x")]) == []
        assert await client.write(chain("b", 5))


async def test_a_client_that_keeps_places_too_long_is_cut_off(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that keeps a lease is; its places are free when it has the arena mapped no more."""
    monkeypatch.setattr(cache_ahead, "KEPT_S", 1e6)
    async with serving(url, limits=Limits(lease_ms_max=-1)) as (server, _):
        client = CacheClient(url, timeout_s=PATIENCE_S)
        assert await client.write(chain("a", 5))
        server.sweep()
        await eventually(lambda: server.snapshot()["connections"] == 0)
        server.sweep()
        await eventually(lambda: server.store.reserved_bytes == 0)
        await client.close()


DYING = """
import asyncio, sys
from cache.builders import chain
from headrace import cache_ahead
from headrace.cache_client import CacheClient

async def main():
    cache_ahead.BATCH_BYTES_MIN, cache_ahead.KEPT_S = 1, 1e6
    client = CacheClient(sys.argv[1], timeout_s=20)
    assert await client.write(chain("a", 5))
    print("ahead", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def dying(url: str) -> subprocess.Popen[bytes]:
    """A client that has places ahead, says so, and waits for its end."""
    return subprocess.Popen(
        [sys.executable, "-c", DYING, url],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )


async def test_a_killed_client_leaves_no_place_behind(url: str) -> None:
    async with serving(url) as (server, _):
        process = dying(url)
        assert process.stdout is not None
        said = await asyncio.to_thread(process.stdout.readline)
        assert said == b"ahead\n" and server.store.stats()["ahead_bytes"] > 0
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.communicate)
        await eventually(lambda: server.sweep() is None and server.store.reserved_bytes == 0)
        server.check_integrity()


async def test_writers_side_by_side_share_what_is_had_ahead(url: str) -> None:
    async with (
        serving(url, store=make_store(folder=folder_of(url))) as (server, _),
        client_of(url) as client,
    ):
        batches = [chain(number, 6, 5000) for number in range(40)]
        for first in range(0, 40, 4):
            assert all(await asyncio.gather(*map(client.write, batches[first : first + 4])))
        for entries in batches:
            run = await client.get_run(hashes(entries))
            assert [data for _, data in run] == [entry.data for entry in entries]
        assert client.counts.puts_ahead > 0
        server.check_integrity()


async def test_places_are_asked_for_once_at_a_time() -> None:
    """And not while such as are wished for are here: what is not used is only given back."""
    returned: list[int] = []
    kept, wish = cache_ahead.Kept(returned.append), (2, SIZE)
    assert kept.wants(wish, "t") and not kept.wants(NONE_AHEAD, "t")
    answer: asyncio.Future[Reserved | None] = asyncio.get_running_loop().create_future()
    kept.note_asked(answer)
    assert not kept.wants(wish, "t")
    answer.set_result(None)
    assert kept.wants(wish, "t"), "there were none"
    kept.keep(Reserved(1, 0, (), 0, 7, (0, 1024)), wish, "t")
    assert not kept.wants(wish, "t")
    assert kept.wants(wish, "another") and kept.wants((2, SIZE + 1), "t")
    kept.drop()
    assert kept.wants(wish, "t") and returned == [7]


async def test_room_is_made_while_a_writer_copies_long_and_once_it_has_committed(url: str) -> None:
    """Ahead of need: neither waits for the other, and a trim that is to come later comes now."""
    budget_bytes = 400 * charged_bytes(SIZE)
    arena = Arena(budget_bytes, folder_of(url))
    store = Store(budget_bytes, POLICIES["keep-score"](None), arena, watermarks=(1.0, 0.5))
    low_bytes = budget_bytes // 2
    async with serving(url, store=store) as (server, _), client_of(url) as client:
        assert await client.write(chain("a", 180))
        before = store.used_bytes
        assert await client.write(chain("b", 60))
        await eventually(lambda: store.used_bytes <= low_bytes < before + 60 * SIZE)
        store.reserve(99, facts(*range(60)), 0)
        assert store.used_bytes > low_bytes
        server._trim_soon(0.01)
        await eventually(lambda: store.used_bytes <= low_bytes)
        store.end_all(99)
        store.reserve(99, facts(*range(100)), 0)
        server._trim_soon(1000.0)
        server._trim_soon()
        await eventually(lambda: store.used_bytes <= low_bytes)
        store.end_all(99)
