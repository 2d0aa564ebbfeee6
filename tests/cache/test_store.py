"""The store keeps its budget and its promises whatever program is run against it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import data_of, facts_of, hash_of, make_store
from headrace.frames import KINDS, KV, PROMPT, EntryKey
from headrace.types import Band
from headrace_cache.index import OTHER_TENANTS, TENANTS_MAX
from headrace_cache.policy.names import POLICIES
from headrace_cache.store import (
    ENTRY_OVERHEAD_BYTES,
    Outcome,
    Store,
)

NO_LIMIT = 1 << 40


def put(store: Store, name: object, size_bytes: int = 100, **fields: object) -> Outcome:
    data = data_of(name, size_bytes)
    outcome = store.put(facts_of(name, data, **fields), memoryview(data), 0)  # type: ignore[arg-type]
    store.check_integrity()
    return outcome


def keys_of(*names: object, kind: str = KV) -> list[EntryKey]:
    return [EntryKey(kind, hash_of(name)) for name in names]


def room_for(count: int, size_bytes: int = 100) -> int:
    return count * (size_bytes + ENTRY_OVERHEAD_BYTES)


def test_what_was_put_is_found_up_to_the_first_gap() -> None:
    store = make_store()
    for name in "abd":
        assert put(store, name) is Outcome.KEPT
    run = store.get_run(keys_of(*"abcd"), 0, NO_LIMIT)
    assert [bytes(stored.data) for stored in run.entries] == [data_of("a"), data_of("b")]
    assert (run.bytes, run.more) == (200, False)
    assert (store.by_kind[KV].hits, store.by_kind[KV].misses) == (2, 2)


def test_a_run_is_cut_at_the_limit_and_says_so() -> None:
    store = make_store()
    for name in "abc":
        put(store, name)
    run = store.get_run(keys_of(*"abc"), 0, 250)
    assert (len(run.entries), run.more) == (2, True)
    assert store.by_kind[KV].misses == 0, "what did not fit the answer is no miss"


def test_kinds_do_not_meet() -> None:
    store = make_store()
    put(store, "a", kind=PROMPT)
    assert not store.get_run(keys_of("a"), 0, NO_LIMIT).entries
    assert store.get_run(keys_of("a", kind=PROMPT), 0, NO_LIMIT).entries


def test_an_entry_larger_than_the_budget_is_refused_and_evicts_nobody() -> None:
    store = make_store(room_for(2))
    put(store, "a")
    assert put(store, "giant", 10_000) is Outcome.TOO_LARGE
    assert len(store) == 1
    assert store.by_kind[KV].refused == 1


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
    assert store.by_tenant["t"].evictions == 1


def test_a_parent_is_not_evicted_to_make_room_for_its_child() -> None:
    store = make_store(room_for(2))
    put(store, "parent", band=Band.BATCH)
    put(store, "hot", band=Band.INTERACTIVE)
    outcome = put(store, "child", band=Band.BATCH, parent=hash_of("parent"), depth=1)
    assert outcome is Outcome.OUTRANKED
    assert keys_of("parent")[0] in store


def test_putting_again_counts_as_a_use_and_keeps_the_first_bytes() -> None:
    store = make_store(room_for(2))
    put(store, "a")
    put(store, "b")
    assert put(store, "a") is Outcome.PRESENT
    put(store, "c")
    assert [key in store for key in keys_of("a", "b", "c")] == [True, False, True]


def test_an_entry_whose_bytes_were_skipped_is_kept_only_if_it_was_there() -> None:
    store = make_store()
    put(store, "a")
    assert store.put(facts_of("a", data_of("a")), None, 0) is Outcome.PRESENT
    assert store.put(facts_of("b", data_of("b")), None, 0) is Outcome.SKIPPED
    assert keys_of("b")[0] not in store


def test_verify_drops_what_is_corrupt_and_nothing_else() -> None:
    store = make_store()
    put(store, "good")
    facts = facts_of("bad", data_of("bad"))
    store.put(facts, memoryview(b"x" * facts.size_bytes), 0)
    assert [store.verify(key) for key in keys_of("good", "bad", "absent")] == [False, True, False]
    store.check_integrity()
    assert (len(store), store.by_kind[KV].corrupt) == (1, 1)


def test_tenants_beyond_the_limit_are_counted_together() -> None:
    store = make_store()
    for index in range(TENANTS_MAX + 10):
        put(store, index, tenant=f"tenant-{index}")
    assert len(store.by_tenant) == TENANTS_MAX + 1
    assert store.by_tenant[OTHER_TENANTS].entries == 10


def test_stats_say_what_happened() -> None:
    store = make_store(room_for(1))
    put(store, "a", tenant="one")
    put(store, "b", tenant="two")
    store.get_run(keys_of("b", "a"), 0, NO_LIMIT)
    stats = store.stats()
    assert (stats["entries"], stats["used_bytes"]) == (1, room_for(1))
    assert stats["by_kind"][KV]["evictions"] == 1
    assert stats["by_tenant"]["one"]["entries"] == 0
    assert stats["by_tenant"]["two"]["hits"] == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "get", "verify", "rot"]),
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
    """Chains of depth 4, entries of every size, some of which rot; integrity after each step."""
    store = make_store(budget_bytes, policy)
    expected: dict[EntryKey, bytes] = {}
    for now_ms, (what, index, size_bytes, band, kind) in enumerate(steps):
        key = EntryKey(kind, hash_of(index))
        if what in ("put", "rot"):
            data = data_of(index, size_bytes)
            facts = facts_of(
                index, data, parent=hash_of(index - 1), depth=index % 4, band=band, kind=kind
            )
            kept = b"\0" * size_bytes if what == "rot" else data
            if store.put(facts, memoryview(kept), now_ms) is Outcome.KEPT:
                expected[key] = kept
        elif what == "verify":
            if store.verify(key):
                assert not any(expected[key]), "only what rotted is dropped"
        else:
            run = store.get_run([key], now_ms, NO_LIMIT, band)
            assert [bytes(stored.data) for stored in run.entries] in ([], [expected.get(key)])
        assert store.used_bytes <= budget_bytes
        store.check_integrity()
