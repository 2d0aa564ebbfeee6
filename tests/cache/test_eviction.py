"""Who leaves the cache, told policy by policy: no store, no bytes, no clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.builders import hash_of
from headrace.types import Band
from headrace_cache.policy.eviction import (
    FLOORS,
    HEAP_SLACK,
    POLICIES,
    WORTH_MAX,
    EvictionPolicy,
    Facts,
    KeepScore,
    Key,
    LeastRecentlyUsed,
)

SIZE = 1000


def key_of(name: object) -> Key:
    return ("kv", hash_of(name))


def facts(band: Band = Band.STANDARD, **fields: Any) -> Facts:
    return Facts(**({"size_bytes": SIZE, "band": band, "cost_ms": 10.0} | fields))


def admit_chain(policy: EvictionPolicy, name: str, length: int, band: Band = Band.STANDARD) -> None:
    parent = b""
    for depth in range(length):
        key = key_of((name, depth))
        policy.admit(key, facts(band, parent=parent, depth=depth), 0)
        parent = key[1]


def leave(policy: EvictionPolicy, count: int, now_ms: int = 0) -> list[Key]:
    """The keys of the next `count` victims."""
    victims = policy.victims(count * SIZE, now_ms)
    policy.check_integrity()
    return [victim.key for victim in victims]


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_leaves_from_its_tail(name: str) -> None:
    policy = POLICIES[name]()
    admit_chain(policy, "a", 4)
    assert leave(policy, 4) == [key_of(("a", depth)) for depth in (3, 2, 1, 0)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_parent_that_comes_after_its_child_is_protected_too(name: str) -> None:
    policy = POLICIES[name]()
    policy.admit(key_of("child"), facts(parent=hash_of("parent"), depth=1), 0)
    policy.admit(key_of("parent"), facts(), 0)
    assert leave(policy, 2) == [key_of("child"), key_of("parent")]


@pytest.mark.parametrize("name", POLICIES)
def test_entries_that_claim_to_be_each_others_parents_can_still_leave(name: str) -> None:
    """A ring would otherwise hold its bytes for ever, whoever sent it."""
    policy = POLICIES[name]()
    policy.admit(key_of("self"), facts(parent=hash_of("self"), depth=5), 0)
    policy.admit(key_of("a"), facts(parent=hash_of("b"), depth=1), 0)
    policy.admit(key_of("b"), facts(parent=hash_of("a"), depth=1), 0)
    assert len(leave(policy, 3)) == 3


def test_equal_scores_leave_in_order_of_arrival() -> None:
    policy = KeepScore()
    for index in range(5):
        policy.admit(key_of(index), facts(), 0)
    assert leave(policy, 5) == [key_of(index) for index in range(5)]


def test_a_lower_class_leaves_first() -> None:
    policy = KeepScore()
    for band in Band:
        policy.admit(key_of(band), facts(band), 0)
    assert leave(policy, 3) == [key_of(band) for band in reversed(Band)]


def test_a_class_is_a_head_start_not_a_right_to_stay() -> None:
    """An interactive entry nobody uses outlives its floor's worth of turnovers, and no more."""
    policy = KeepScore()
    policy.admit(key_of("idle"), facts(Band.INTERACTIVE), 0)
    turnovers = 0
    policy.admit(key_of(("batch", 0)), facts(Band.BATCH), 0)
    while leave(policy, 1) != [key_of("idle")]:
        turnovers += 1
        policy.admit(key_of(("batch", turnovers)), facts(Band.BATCH), 0)
    assert turnovers == FLOORS[Band.INTERACTIVE]


def test_being_read_by_a_higher_class_raises_an_entry() -> None:
    policy = KeepScore()
    policy.admit(key_of("shared"), facts(Band.BATCH), 0)
    policy.admit(key_of("other"), facts(Band.STANDARD), 0)
    policy.touch(key_of("shared"), 1, Band.INTERACTIVE)
    policy.touch(key_of("shared"), 2, Band.BATCH)
    assert leave(policy, 1) == [key_of("other")]


def test_what_costs_more_to_compute_or_takes_less_room_stays() -> None:
    policy = KeepScore()
    policy.admit(key_of("dear"), facts(cost_ms=100.0), 0)
    policy.admit(key_of("small"), facts(cost_ms=10.0, size_bytes=100), 0)
    policy.admit(key_of("usual"), facts(cost_ms=10.0), 0)
    assert leave(policy, 1) == [key_of("usual")]


def test_an_unmeasured_entry_counts_as_average() -> None:
    policy = KeepScore()
    policy.admit(key_of("dear"), facts(cost_ms=100.0), 0)
    policy.admit(key_of("cheap"), facts(cost_ms=1.0), 0)
    policy.admit(key_of("unknown"), facts(cost_ms=0.0), 0)
    policy.touch(key_of("dear"), 0)  # once more, now that the average is known
    assert leave(policy, 3) == [key_of("cheap"), key_of("unknown"), key_of("dear")]


def test_a_cost_in_tokens_stands_in_for_milliseconds() -> None:
    assert facts(cost_ms=0.0, cost_tokens=16).recompute_us == 16_000
    assert facts(cost_ms=2.5, cost_tokens=16).recompute_us == 2_500


def test_use_counts_up_to_a_limit() -> None:
    """However often it was used once, an entry leaves WORTH_MAX turnovers after its last use."""
    policy = KeepScore()
    policy.admit(key_of("hot"), facts(), 0)
    for _ in range(10_000):
        policy.touch(key_of("hot"), 0)
    (victim,) = policy.victims(1, 70)
    assert victim.score == FLOORS[Band.STANDARD] + WORTH_MAX
    assert "used 10001x, idle 70 ms" in victim.reason
    assert "standard" in victim.reason


def test_recency_counts_through_aging() -> None:
    """With equal use and cost, what was used before an eviction leaves before what came after."""
    policy = KeepScore()
    for name in ("first", "second"):
        policy.admit(key_of(name), facts(), 0)
    assert leave(policy, 1) == [key_of("first")]
    policy.admit(key_of("third"), facts(), 0)
    assert leave(policy, 1) == [key_of("second")]


def test_lru_looks_at_the_last_use_alone() -> None:
    policy = LeastRecentlyUsed()
    for band in Band:
        policy.admit(key_of(band), facts(band), 0)
    policy.touch(key_of(Band.BATCH), 1)
    assert leave(policy, 3) == [key_of(band) for band in (Band.INTERACTIVE, Band.STANDARD, 2)]


def test_touching_for_ever_does_not_grow_the_heap() -> None:
    policy = KeepScore()
    for index in range(10):
        policy.admit(key_of(index), facts(), 0)
    for turn in range(5_000):
        policy.touch(key_of(turn % 10), turn)
        assert len(policy._heap) <= 2 * 10 + HEAP_SLACK
    policy.check_integrity()


def test_removing_the_middle_of_a_chain_leaves_both_ends_evictable() -> None:
    policy = KeepScore()
    admit_chain(policy, "a", 3)
    policy.remove(key_of(("a", 1)))
    policy.check_integrity()
    assert set(leave(policy, 2)) == {key_of(("a", 0)), key_of(("a", 2))}


Step = tuple[str, int, int, Band, int]

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "touch", "remove", "victims"]),
        st.integers(0, 15),
        st.integers(0, 15),
        st.sampled_from(Band),
        st.integers(1, 5_000),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=STEPS)
def test_any_program_evicts_leaves_only_and_enough_of_them(name: str, steps: list[Step]) -> None:
    """Against a model that knows residents and their parents and nothing else."""
    policy = POLICIES[name]()
    residents: dict[Key, Facts] = {}
    for now_ms, (what, index, parent, band, amount) in enumerate(steps):
        key = key_of(index)
        if what == "admit" and key not in residents:
            # depth follows the index in part only: some links do not count
            entry = facts(
                band,
                size_bytes=amount,
                parent=hash_of(parent),
                depth=index % 4,
                cost_ms=float(amount % 7),
            )
            policy.admit(key, entry, now_ms)
            residents[key] = entry
        elif what == "touch" and key in residents:
            policy.touch(key, now_ms, band)
        elif what == "remove" and key in residents:
            policy.remove(key)
            del residents[key]
        elif what == "victims":
            check_victims(policy, residents, amount, now_ms)
        policy.check_integrity()


def check_victims(
    policy: EvictionPolicy, residents: dict[Key, Facts], size_bytes: int, now_ms: int
) -> None:
    freed_bytes = 0
    for victim in policy.victims(size_bytes, now_ms):
        assert freed_bytes < size_bytes, "no more than needed"
        gone = residents.pop(victim.key)
        assert victim.size_bytes == gone.size_bytes
        assert not any(
            other.depth == gone.depth + 1 and other.parent == victim.key[1]
            for other in residents.values()
        ), "no resident child"
        freed_bytes += gone.size_bytes
    assert freed_bytes >= size_bytes or not residents
