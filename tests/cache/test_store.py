"""The store keeps its budget and its promises whatever program is run against it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import data_of, facts_of, hash_of, make_store
from headrace.frames import KINDS, KV, PROMPT, EntryKey
from headrace.types import Band
from headrace_cache.grants import NOWHERE, Loan, Outcome
from headrace_cache.index import OTHER_TENANTS, TENANTS_MAX
from headrace_cache.policy.names import POLICIES
from headrace_cache.policy.quota import Share
from headrace_cache.room import charged_bytes
from headrace_cache.store import OURSELVES, Store

NO_LIMIT = 1 << 40


def put(store: Store, name: object, size_bytes: int = 100, **fields: object) -> Outcome:
    data = data_of(name, size_bytes)
    outcome = store.put(facts_of(name, data, **fields), memoryview(data), 0)  # type: ignore[arg-type]
    store.check_integrity()
    return outcome


def keys_of(*names: object, kind: str = KV) -> list[EntryKey]:
    return [EntryKey(kind, hash_of(name)) for name in names]


def room_for(count: int, size_bytes: int = 100) -> int:
    return count * charged_bytes(size_bytes)


def read(
    store: Store,
    keys: list[EntryKey],
    now_ms: int = 0,
    limit_bytes: int = NO_LIMIT,
    band: Band | None = None,
    layout: bytes = b"",
) -> tuple[Loan, list[bytes]]:
    """Borrow the run of `keys`, copy it and give it back."""
    loan = store.lend(OURSELVES, keys, now_ms, limit_bytes, band, layout)
    pieces = zip(loan.places, loan.sizes, strict=True)
    copies = [bytes(store.arena.view(place, size)) for place, size in pieces]
    store.end(OURSELVES, loan.lease)
    return loan, copies


def test_what_was_put_is_found_up_to_the_first_gap() -> None:
    store = make_store()
    for name in "abd":
        assert put(store, name) is Outcome.KEPT
    run, copies = read(store, keys_of(*"abcd"))
    assert copies == [data_of("a"), data_of("b")]
    assert (run.bytes, run.more) == (200, False)
    assert (store.tallies.by_kind[KV].hits, store.tallies.by_kind[KV].misses) == (2, 2)


def test_a_run_is_cut_at_the_limit_and_says_so() -> None:
    store = make_store()
    for name in "abc":
        put(store, name)
    run, copies = read(store, keys_of(*"abc"), limit_bytes=250)
    assert (len(copies), run.more) == (2, True)
    assert store.tallies.by_kind[KV].misses == 0, "what did not fit the answer is no miss"


def test_kinds_do_not_meet() -> None:
    store = make_store()
    put(store, "a", kind=PROMPT)
    assert not read(store, keys_of("a"))[1]
    assert read(store, keys_of("a", kind=PROMPT))[1]


def test_an_entry_larger_than_the_budget_is_refused_and_evicts_nobody() -> None:
    store = make_store(room_for(2))
    put(store, "a")
    assert put(store, "giant", 10_000) is Outcome.TOO_LARGE
    assert len(store) == 1
    assert store.tallies.by_kind[KV].refused == 1


def test_small_entries_pay_for_their_place_in_the_index() -> None:
    """A million one-byte entries must not take a gigabyte that nobody counted."""
    store = make_store(room_for(3, 1))
    for index in range(10):
        put(store, index, 1)
    assert len(store) == 3


def test_a_batch_entry_does_not_displace_interactive_ones() -> None:
    store = make_store(room_for(2))
    put(store, "a", band=Band.INTERACTIVE)
    put(store, "b", band=Band.INTERACTIVE)
    assert put(store, "c", band=Band.BATCH) is Outcome.OUTRANKED
    assert all(key in store for key in keys_of("a", "b"))
    assert put(store, "d", band=Band.INTERACTIVE) is Outcome.KEPT
    assert store.tallies.by_tenant["t"].evictions == 1


def test_a_parent_is_not_evicted_to_make_room_for_its_child() -> None:
    store = make_store(room_for(2))
    put(store, "parent", band=Band.BATCH)
    put(store, "hot", band=Band.INTERACTIVE)
    outcome = put(store, "child", band=Band.BATCH, parent=hash_of("parent"), depth=1)
    assert outcome is Outcome.OUTRANKED
    assert keys_of("parent")[0] in store


def test_putting_again_is_no_use_and_keeps_the_first_bytes() -> None:
    store = make_store(room_for(2))
    put(store, "a")
    put(store, "b")
    assert put(store, "a") is Outcome.PRESENT
    put(store, "c")
    assert [key in store for key in keys_of("a", "b", "c")] == [False, True, True]


def test_an_entry_is_read_by_nobody_before_it_is_committed() -> None:
    """And a second writer of it is told that somebody is at it."""
    store = make_store()
    facts = facts_of("a", data_of("a"))
    first = store.reserve(1, [facts], 0)
    store.check_integrity()
    assert not read(store, keys_of("a"))[1]
    assert keys_of("a")[0] not in store
    second = store.reserve(2, [facts], 0)
    assert (second.ticket, second.places, second.outcomes) == (0, (NOWHERE,), (Outcome.BUSY,))
    store.arena.view(first.places[0], facts.size_bytes)[:] = data_of("a")
    assert store.commit(2, first.ticket, [facts.crc], 0) == 0, "a ticket is its holder's"
    assert store.commit(1, first.ticket, [facts.crc], 0) == 1
    assert store.commit(1, first.ticket, [facts.crc], 0) == 0, "once"
    assert read(store, keys_of("a"))[1] == [data_of("a")]
    store.check_integrity()


def test_what_a_dead_writer_reserved_is_free_again() -> None:
    store = make_store()
    store.reserve(1, [facts_of(name, data_of(name)) for name in "abc"], 0)
    assert store.used_bytes == store.reserved_bytes == room_for(3)
    store.end_all(1)
    assert (store.used_bytes, store.reserved_bytes, len(store)) == (0, 0, 0)
    store.check_integrity()
    assert put(store, "a") is Outcome.KEPT


def test_a_writer_may_give_up_some_of_what_it_reserved() -> None:
    store = make_store()
    ticket = store.reserve(1, [facts_of(name, data_of(name)) for name in "ab"], 0).ticket
    assert store.commit(1, ticket, [-1, 5], 0) == 1
    assert [key in store for key in keys_of("a", "b")] == [False, True]
    store.check_integrity()


def test_what_is_written_at_a_time_is_bounded() -> None:
    store = make_store(room_for(100), reserved_bytes_max=room_for(3))
    entries = [facts_of(name, data_of(name)) for name in range(5)]
    reservation = store.reserve(1, entries, 0)
    assert reservation.outcomes == (*(Outcome.KEPT,) * 3, *(Outcome.SKIPPED,) * 2)
    store.end(1, reservation.ticket)
    assert store.reserve(1, entries[3:], 0).outcomes == (Outcome.KEPT,) * 2


def test_what_follows_a_refused_parent_is_not_written() -> None:
    store = make_store(room_for(2))
    parent = facts_of("parent", data_of("parent", 10_000))
    child = facts_of("child", data_of("child"), parent=hash_of("parent"), depth=1)
    outcomes = store.reserve(1, [parent, child], 0).outcomes
    assert outcomes == (Outcome.TOO_LARGE, Outcome.OUTRANKED)


def test_what_is_lent_does_not_leave() -> None:
    """Nor does its memory move: others leave instead, or the newcomer is refused."""
    store = make_store(room_for(2))
    put(store, "a", band=Band.BATCH)
    put(store, "b", band=Band.BATCH)
    loan = store.lend(1, keys_of("a"), 0, NO_LIMIT)
    assert put(store, "c") is Outcome.KEPT
    assert [key in store for key in keys_of("a", "b")] == [True, False]
    other = store.lend(2, keys_of("c"), 0, NO_LIMIT)
    assert put(store, "d", band=Band.INTERACTIVE) is Outcome.OUTRANKED
    store.end(2, other.lease)
    store.end(1, loan.lease)
    assert put(store, "d", band=Band.INTERACTIVE) is Outcome.KEPT


def test_what_is_dropped_while_it_is_lent_keeps_its_bytes_until_the_last_reader() -> None:
    store = make_store(room_for(1))
    put(store, "a")
    loans = [store.lend(holder, keys_of("a"), 0, NO_LIMIT) for holder in (1, 2)]
    store.drop(store.index.find(keys_of("a")[0]))
    store.check_integrity()
    assert not read(store, keys_of("a"))[1]
    assert put(store, "a", 50) is Outcome.OUTRANKED, "its memory is still read"
    assert bytes(store.arena.view(loans[0].places[0], 100)) == data_of("a")
    store.end_all(1)
    store.check_integrity()
    store.end_all(2)
    assert put(store, "a", 50) is Outcome.KEPT
    assert read(store, keys_of("a"))[1] == [data_of("a", 50)]


def test_another_layout_is_a_miss() -> None:
    store = make_store()
    put(store, "a", layout=b"float32.")
    put(store, "b", layout=b"bfloat16")
    keys = keys_of("a", "b")
    assert len(read(store, keys)[1]) == 2
    assert len(read(store, keys, layout=b"float32.")[1]) == 1
    assert not read(store, keys, layout=b"bfloat16")[1]


def test_a_pin_outlives_what_is_worth_more() -> None:
    store = make_store(room_for(2))
    put(store, "a", band=Band.BATCH, pin_ms=1_000)
    put(store, "b", band=Band.INTERACTIVE)
    assert put(store, "c", band=Band.INTERACTIVE) is Outcome.KEPT
    assert [key in store for key in keys_of("a", "b")] == [True, False]


def test_pieces_are_put_together_where_the_sum_is_enough() -> None:
    """Every second entry of 1 KB leaves; one of 3 KB needs three pieces of the arena."""
    store = make_store(room_for(8, 1024))
    for name in range(8):
        put(store, name, 1024)
    for name in range(0, 8, 2):
        store.drop(store.index.find(keys_of(name)[0]))
    assert put(store, "large", 3 * 1024) is Outcome.KEPT
    assert len(store) == 5, "nobody had to leave"
    for name in range(1, 8, 2):
        assert read(store, keys_of(name))[1] == [data_of(name, 1024)]


def test_a_minimum_is_not_broken_to_put_pieces_together() -> None:
    """What is free lies between lent entries: who has no more than its minimum keeps it."""
    size = 64 * 1024
    store = make_store(room_for(8, size))
    assert not store.set_quota("acme", Share(min_bytes=room_for(4, size)), 0)
    for name in range(8):
        put(store, name, size, tenant="acme" if name % 2 else "other")
    lent = store.lend(1, keys_of(2), 0, NO_LIMIT), store.lend(1, keys_of(6), 0, NO_LIMIT)
    for name in (0, 4):
        store.drop(store.index.find(keys_of(name)[0]))
    store.drop(store.index.find(keys_of(2)[0]))
    assert put(store, "large", 2 * size, tenant="third", band=Band.INTERACTIVE) is Outcome.OUTRANKED
    assert [key in store for key in keys_of(1, 3, 5, 7)] == [True] * 4
    for loan in lent:
        store.end(1, loan.lease)
    assert put(store, "large", 2 * size, tenant="third", band=Band.INTERACTIVE) is Outcome.KEPT


def test_verify_drops_what_is_corrupt_and_nothing_else() -> None:
    store = make_store()
    put(store, "good")
    facts = facts_of("bad", data_of("bad"))
    store.put(facts, b"x" * facts.size_bytes, 0)
    assert [store.verify(key) for key in keys_of("good", "bad", "absent")] == [False, True, False]
    store.check_integrity()
    assert (len(store), store.tallies.by_kind[KV].corrupt) == (1, 1)


def test_tenants_beyond_the_limit_are_counted_together() -> None:
    store = make_store()
    for index in range(TENANTS_MAX + 10):
        put(store, index, tenant=f"tenant-{index}")
    assert len(store.tallies.by_tenant) == TENANTS_MAX + 1
    assert store.tallies.by_tenant[OTHER_TENANTS].entries == 10


def test_stats_say_what_happened() -> None:
    store = make_store(room_for(1))
    put(store, "a", tenant="one")
    put(store, "b", tenant="two")
    read(store, keys_of("b", "a"))
    stats = store.stats()
    assert (stats["entries"], stats["used_bytes"]) == (1, room_for(1))
    assert stats["by_kind"][KV]["evictions"] == 1
    assert stats["by_tenant"]["one"]["entries"] == 0
    assert stats["by_tenant"]["two"]["hits"] == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "get", "verify", "rot", "hold", "let go", "drop"]),
        st.integers(0, 30),
        st.integers(1, 4_000),
        st.sampled_from(Band),
        st.sampled_from(KINDS),
    ),
    max_size=60,
)


@pytest.mark.parametrize("policy", POLICIES)
@given(steps=STEPS, budget_bytes=st.integers(1, 20_000))
def test_any_program_keeps_the_budget_and_serves_the_bytes_that_were_put(
    policy: str, steps: list[tuple[str, int, int, Band, str]], budget_bytes: int
) -> None:
    """Chains of depth 4, entries of every size, some of which rot, some lent for a while.

    Integrity after each step; what is lent keeps its bytes.
    """
    store = make_store(budget_bytes, policy)
    expected: dict[EntryKey, bytes] = {}
    held: dict[int, tuple[Loan, bytes]] = {}
    for now_ms, (what, index, size_bytes, band, kind) in enumerate(steps):
        key = EntryKey(kind, hash_of(index))
        slot = store.index.find(key)
        if what in ("put", "rot"):
            data = data_of(index, size_bytes)
            facts = facts_of(
                index, data, parent=hash_of(index - 1), depth=index % 4, band=band, kind=kind
            )
            kept = b"\0" * size_bytes if what == "rot" else data
            if store.put(facts, kept, now_ms) is Outcome.KEPT:
                expected[key] = kept
        elif what == "verify":
            if store.verify(key):
                assert not any(expected[key]), "only what rotted is dropped"
        elif what == "hold":
            loan = store.lend(now_ms + 1, [key], now_ms, NO_LIMIT)
            if loan.places:
                held[now_ms + 1] = (loan, expected[key])
        elif what == "let go" and held:
            holder, _ = held.popitem()
            store.end_all(holder)
        elif what == "drop" and slot >= 0:
            store.drop(slot)
        else:
            _, copies = read(store, [key], now_ms, NO_LIMIT, band)
            assert copies in ([], [expected.get(key)])
        for loan, data in held.values():
            assert bytes(store.arena.view(loan.places[0], loan.sizes[0])) == data
        assert store.used_bytes <= budget_bytes
        store.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_taken_in_at_once_is_as_its_entries_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores, one of which never takes the short way, are told the same."""
    rng = random.Random(seed)
    short, long = (make_store(room_for(60, 3_000)) for _ in range(2))
    monkeypatch.setattr(long.writes, "_reserve_at_once", lambda *_: None)
    for now_ms in range(150):
        name, length = rng.randrange(40), rng.randint(1, 12)
        sizes = [3_000] * length  # of one size, so that nothing depends on where they lie
        chain = [
            facts_of(
                (name, depth),
                bytes(size),
                parent=hash_of((name, depth - 1)) if depth else b"",
                depth=depth,
                tenant=f"t{name % 2}",
                pin_ms=50 if rng.random() < 0.05 else 0,
            )
            for depth, size in enumerate(sizes)
        ]
        crcs = [rng.choice([-1, 7]) for _ in chain]
        outcomes = []
        for store in (short, long):
            reservation = store.reserve(OURSELVES, chain, now_ms)
            given = sum(place != NOWHERE for place in reservation.places)
            store.commit(OURSELVES, reservation.ticket, crcs[:given], now_ms)
            keys = [facts.key for facts in chain]
            loan, _ = read(store, keys, now_ms)
            store.check_integrity()
            outcomes.append((reservation.outcomes, loan.sizes, loan.crcs, loan.saved_us))
        assert outcomes[0] == outcomes[1]
    assert short.stats() == long.stats()
    assert short.tallies.by_kind[KV].evictions > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_writing_what_is_there_does_not_keep_it(policy: str) -> None:
    """Whatever the policy: of two entries the one that is read stays, not the one rewritten."""
    store = make_store(room_for(2), policy)
    put(store, "a")
    put(store, "b")
    for _ in range(9):
        assert put(store, "a") is Outcome.PRESENT
    read(store, keys_of("b"), 1)
    for name in "cd":
        put(store, name)
        read(store, keys_of("b"), 2)
    assert keys_of("a")[0] not in store
    assert store.tallies.by_kind[KV].present == 9
