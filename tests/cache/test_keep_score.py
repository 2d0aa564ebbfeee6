"""What the default policy keeps: classes, cost, size, use and time."""

from __future__ import annotations

from cache.test_eviction import SIZE, facts, leave
from headrace.types import Band
from headrace_cache.policy.classic import LeastRecentlyUsed
from headrace_cache.policy.keep_score import FLOORS, KeepScore


def test_equal_scores_leave_in_order_of_arrival() -> None:
    policy = KeepScore()
    for slot in range(5):
        policy.admit(slot, facts(), 0)
    assert leave(policy, 5) == [0, 1, 2, 3, 4]


def test_a_lower_class_leaves_first() -> None:
    policy = KeepScore()
    for band in Band:
        policy.admit(band, facts(band), 0)
    assert leave(policy, 3) == list(reversed(Band))


def test_a_class_is_a_head_start_not_a_right_to_stay() -> None:
    """An interactive entry nobody uses outlives its floor's worth of turnovers, and no more."""
    policy = KeepScore()
    policy.admit(0, facts(Band.INTERACTIVE), 0)
    turnovers = 0
    policy.admit(1, facts(Band.BATCH), 0)
    while leave(policy, 1) != [0]:
        turnovers += 1
        policy.admit(1, facts(Band.BATCH), 0)
    assert turnovers == FLOORS[Band.INTERACTIVE]


def test_being_read_by_a_higher_class_raises_an_entry() -> None:
    policy = KeepScore()
    policy.admit(0, facts(Band.BATCH), 0)
    policy.admit(1, facts(Band.STANDARD), 0)
    policy.touch(0, 1, Band.INTERACTIVE)
    policy.touch(0, 2, Band.BATCH)
    assert leave(policy, 1) == [1]


def test_what_costs_more_to_compute_or_takes_less_room_stays() -> None:
    policy = KeepScore()
    policy.admit(0, facts(cost_us=100_000), 0)
    policy.admit(1, facts(size_bytes=100), 0)
    policy.admit(2, facts(), 0)
    assert leave(policy, 1) == [2]


def test_an_unmeasured_entry_counts_as_average() -> None:
    policy = KeepScore()
    policy.admit(0, facts(cost_us=100_000), 0)
    policy.admit(1, facts(cost_us=1_000), 0)
    policy.admit(2, facts(cost_us=0), 0)
    policy.touch(0, 0)  # once more, now that the average is known
    assert leave(policy, 3) == [1, 2, 0]


def test_recency_counts_through_aging() -> None:
    """With equal use and cost, what was used before an eviction leaves before what came after."""
    policy = KeepScore()
    for slot in range(2):
        policy.admit(slot, facts(), 0)
    assert leave(policy, 1) == [0]
    policy.admit(2, facts(), 0)
    assert leave(policy, 1) == [1]


def test_a_tenants_churn_ages_its_own_entries_and_nobody_elses() -> None:
    """Who turns over its quota a hundred times does not outrank the others by that."""
    policy = KeepScore()
    policy.admit(0, facts(tenant=1), 0)
    for _ in range(100):
        policy.admit(1, facts(tenant=2), 0)
        assert leave(policy, 1, spare={2: SIZE}) == [1]
    policy.admit(1, facts(tenant=2), 0)
    policy.admit(2, facts(tenant=1), 0)
    assert leave(policy, 3) == [0, 1, 2]


def test_lru_looks_at_the_last_use_alone() -> None:
    policy = LeastRecentlyUsed()
    for band in Band:
        policy.admit(band, facts(band), 0)
    policy.touch(Band.BATCH, 1)
    assert leave(policy, 3) == [Band.INTERACTIVE, Band.STANDARD, Band.BATCH]
