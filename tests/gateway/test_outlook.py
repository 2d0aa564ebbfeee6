"""How fast the fleet works and how long who arrives now will wait."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_gateway.policy.outlook import HALF_LIFE_MS, INTERVAL_MS, Outlook, Throughput

SHARES = (0.0, 0.1, 0.05)


def busy(per_interval: int, intervals: int, queued: tuple[int, int, int]) -> Throughput:
    """A fleet that served `per_interval` tokens in each interval while `queued` waited."""
    throughput = Throughput(SHARES)
    throughput.set_workers(2, 0)
    for number in range(1, intervals + 1):
        throughput.served(per_interval)
        look(throughput, number * INTERVAL_MS, queued)
    return throughput


def look(
    throughput: Throughput,
    now_ms: int,
    queued: tuple[int, int, int] = (0, 0, 0),
    work: tuple[int, int, int] = (0, 0, 0),
    *,
    free: bool = False,
) -> Outlook:
    return throughput.outlook(queued, work, 0.0, free, now_ms)


def test_nothing_is_known_before_something_was_served() -> None:
    throughput = Throughput(SHARES)
    throughput.set_workers(1, 0)
    outlook = look(throughput, 10_000, (1, 1, 1), (100, 100, 100))
    assert (outlook.work_per_s, outlook.waits_ms) == (0, (0, 0, 0))


def test_an_idle_fleet_does_not_forget_how_fast_it_is() -> None:
    """An hour without requests says nothing of what a busy hour would give."""
    throughput = busy(500, 60, (0, 5, 0))
    rate = throughput.work_per_s
    assert abs(rate - 1_000) < 10
    for number in range(61, 7_000):
        look(throughput, number * INTERVAL_MS)
    assert throughput.work_per_s == rate


def test_a_busy_fleet_that_slows_down_is_noticed_within_some_half_lives() -> None:
    throughput = busy(500, 60, (0, 5, 0))
    end = 60 + 5 * HALF_LIFE_MS // INTERVAL_MS
    for number in range(61, end):
        throughput.served(50)
        look(throughput, number * INTERVAL_MS, (0, 5, 0))
    assert 100 <= throughput.work_per_s < 140


def test_where_jobs_leave_seldom_the_rate_is_that_of_many() -> None:
    """A job of 1,000 tokens in ten intervals, at random: the wait told must not swing with it."""
    throughput, dice = Throughput(SHARES), random.Random(5)
    throughput.set_workers(1, 0)
    waits = []
    for number in range(1, 6_000):
        throughput.served(100)
        if dice.random() < 0.1:
            throughput.dispatched(Band.STANDARD, 1_000)
        told = look(throughput, number * INTERVAL_MS, (0, 9, 0), (0, 4_000, 0))
        waits.append(told.waits_ms[Band.STANDARD])
    steady = sorted(waits[500:])
    middle, high = steady[len(steady) // 2], steady[len(steady) * 95 // 100]
    assert 18_000 < middle < 24_000
    assert high < 2 * middle


def test_a_band_waits_for_itself_and_the_better_ones() -> None:
    throughput = busy(500, 60, (1, 1, 1))
    outlook = look(throughput, 60 * INTERVAL_MS, (1, 1, 1), (1_000, 2_000, 4_000))
    interactive, standard, batch = outlook.waits_ms
    assert 900 < interactive < 1_300
    assert standard >= 2_900 and batch >= 6_900


def test_nobody_waits_where_a_worker_has_a_slot_and_nobody_stands_before() -> None:
    throughput = busy(500, 10, (0, 1, 0))
    outlook = look(throughput, 10_000, (0, 0, 3), (0, 0, 900), free=True)
    assert outlook.waits_ms[Band.INTERACTIVE] == 0
    assert outlook.waits_ms[Band.STANDARD] == 0
    assert outlook.waits_ms[Band.BATCH] > 0


def test_a_starved_band_is_told_of_its_own_rate() -> None:
    """Under steady overload by others, batch moves at its share, and its callers learn that."""
    throughput = Throughput(SHARES)
    throughput.set_workers(1, 0)
    for number in range(1, 200):
        throughput.served(500)
        throughput.dispatched(Band.STANDARD, 450)
        throughput.dispatched(Band.BATCH, 50)
        outlook = look(throughput, number * INTERVAL_MS, (0, 50, 50), (0, 5_000, 5_000))
    assert 45_000 < outlook.waits_ms[Band.BATCH] < 55_000
    assert 4_500 < outlook.waits_ms[Band.STANDARD] < 6_500


def test_a_fleet_twice_as_large_is_taken_to_be_twice_as_fast() -> None:
    throughput = busy(500, 60, (0, 1, 0))
    before = throughput.work_per_s
    throughput.set_workers(4, 100_000)
    assert throughput.work_per_s == 2 * before


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3_000), st.integers(0, 5_000), st.tuples(*[st.integers(0, 9)] * 3)
        ),
        max_size=40,
    )
)
def test_whatever_happens_waits_are_bounded_and_ordered_for_equal_work(
    program: list[tuple[int, int, tuple[int, int, int]]],
) -> None:
    throughput = Throughput(SHARES)
    throughput.set_workers(1, 0)
    now = 0
    for elapsed, served, queued in program:
        now += elapsed
        throughput.served(served)
        outlook = look(throughput, now, queued, (queued[0] * 9, queued[1] * 9, queued[2] * 9))
        assert all(0 <= wait <= 24 * 3_600_000 for wait in outlook.waits_ms)
        assert outlook.work_per_s >= 0
        assert all(0 <= rate <= outlook.work_per_s for rate in outlook.band_work_per_s)


def test_when_the_better_bands_have_left_the_band_behind_them_is_told_of_it_soon() -> None:
    """After an overload batch has the fleet for itself; a minute of its past must not hide that."""
    throughput = Throughput(SHARES)
    throughput.set_workers(1, 0)
    for number in range(1, 241):  # two minutes in which standard work takes all but its share
        throughput.served(500)
        throughput.dispatched(Band.STANDARD, 475)
        if number % 20 == 0:
            throughput.dispatched(Band.BATCH, 500)
        look(throughput, number * INTERVAL_MS, (0, 9, 9), (0, 9_000, 9_000))
    during = look(throughput, 241 * INTERVAL_MS, (0, 9, 9), (0, 9_000, 9_000))
    for number in range(242, 242 + 2 * HALF_LIFE_MS // INTERVAL_MS):
        throughput.served(500)
        after = look(throughput, number * INTERVAL_MS, (0, 0, 9), (0, 0, 9_000))
    assert during.waits_ms[Band.BATCH] > 60_000
    assert after.waits_ms[Band.BATCH] < 20_000
