"""Whether to fetch or to compute: what was measured decides, and time ends it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_worker.policy.fetching import (
    NO_TIER,
    PROBE_BLOCKS,
    PROBE_EVERY_MS,
    TIME_MARGIN,
    Reason,
    Speeds,
    Wanted,
    plan,
)
from headrace_worker.policy.pace import Pace
from headrace_worker.results import Outlook

BLOCK_BYTES = 400_000
PROMPT = Wanted(64, BLOCK_BYTES, token_ms=1.0, wait_ms=0.0, left_ms=10_000.0)
"""A block takes 16 ms to compute."""


def measured(block_ms: float, *, trip_ms: float = 1.0, tier: str = "arena") -> Speeds:
    """After a miss and a fetch of 10 blocks."""
    speeds = Speeds()
    note(speeds, found=0, took_ms=trip_ms, tier=NO_TIER)
    note(speeds, found=10, took_ms=trip_ms + 10 * block_ms, tier=tier)
    return speeds


def note(speeds: Speeds, *, found: int, took_ms: float, tier: str, now_ms: int = 0) -> None:
    size_bytes = found * BLOCK_BYTES
    speeds.note(
        asked=10, found=found, tier=tier, size_bytes=size_bytes, took_ms=took_ms, now_ms=now_ms
    )


def test_at_first_a_part_is_fetched_to_learn_from() -> None:
    """Its rest is planned on what that part took."""
    first = plan(PROMPT, Speeds(), 0)
    assert (first.blocks, first.reason) == (PROBE_BLOCKS, Reason.UNMEASURED)
    rest = replace(PROMPT, blocks=64 - PROBE_BLOCKS, tier="arena")
    then = plan(rest, measured(0.5), 0)
    assert (then.blocks, then.reason) == (64 - PROBE_BLOCKS, Reason.CHEAPER)


def test_the_faster_way_is_taken() -> None:
    """16 ms to compute a block: 2 ms to fetch one are worth it, 40 ms are not."""
    cheap = plan(PROMPT, measured(2.0), 0)
    assert (cheap.blocks, cheap.reason) == (64, Reason.CHEAPER)
    assert cheap.fetch_ms == pytest.approx(1 + 64 * 2, rel=0.1)
    assert cheap.compute_ms == 64 * 16
    dear = plan(PROMPT, measured(40.0), 0)
    assert (dear.blocks, dear.reason) == (0, Reason.DEARER)


def test_a_round_trip_costs_a_short_prompt_more_than_it_saves() -> None:
    """One block is computed while the service, 30 ms away, would be asked."""
    speeds = measured(1.0, trip_ms=30.0)
    assert plan(replace(PROMPT, blocks=1), speeds, 0).reason is Reason.DEARER
    assert plan(PROMPT, speeds, 0).reason is Reason.CHEAPER


def test_who_waits_fetches_for_nothing() -> None:
    """Computing is faster, but not its turn yet: as much of the head as comes until then."""
    speeds = measured(40.0)
    waiting = plan(replace(PROMPT, wait_ms=1_000.0), speeds, 0)
    assert waiting.reason is Reason.WHILE_WAITING
    assert 20 <= waiting.blocks <= 25
    assert waiting.fetch_ms <= 1_001


def test_what_does_not_come_in_time_is_not_asked_for() -> None:
    """A lookup's limit cuts the tail, with a margin for what estimates are worth."""
    cut = plan(replace(PROMPT, left_ms=100.0), measured(2.0), 0)
    assert cut.reason is Reason.CHEAPER and 0 < cut.blocks < 64
    assert cut.fetch_ms <= 100.0 / TIME_MARGIN
    assert plan(replace(PROMPT, left_ms=1.0), measured(2.0), 0).reason is Reason.NO_TIME
    assert plan(replace(PROMPT, left_ms=0.0), Speeds(), 0).reason is Reason.NO_TIME


def test_an_engine_that_has_computed_nothing_yet_fetches() -> None:
    """As after a restart, which is what the disk tier is for."""
    fetch = plan(replace(PROMPT, token_ms=0.0), measured(40.0), 0)
    assert (fetch.blocks, fetch.reason) == (64, Reason.UNMEASURED)


def test_a_slow_tier_is_tried_again_after_a_while() -> None:
    """It may be fast by now; a try costs a few blocks."""
    speeds = measured(40.0)
    assert plan(PROMPT, speeds, PROBE_EVERY_MS - 1).blocks == 0
    probe = plan(PROMPT, speeds, PROBE_EVERY_MS)
    assert (probe.blocks, probe.reason) == (PROBE_BLOCKS, Reason.PROBE)
    speeds.note_probe(PROBE_EVERY_MS)
    assert plan(PROMPT, speeds, PROBE_EVERY_MS + 1).blocks == 0
    for _ in range(30):
        note(speeds, found=10, took_ms=11.0, tier="arena", now_ms=PROBE_EVERY_MS)
    assert plan(PROMPT, speeds, PROBE_EVERY_MS + 1).reason is Reason.CHEAPER


def test_tiers_are_told_apart() -> None:
    """A slow disk does not make the arena look slow to a run that is known to lie there."""
    speeds = measured(0.1)
    for _ in range(8):
        note(speeds, found=10, took_ms=600.0, tier="disk")
    assert plan(PROMPT, speeds, 0).reason is Reason.DEARER, "they mostly come from disk by now"
    assert plan(replace(PROMPT, tier="arena"), speeds, 0).reason is Reason.CHEAPER
    assert plan(replace(PROMPT, tier="disk"), speeds, 0).reason is Reason.DEARER


def test_rare_hits_weigh_less_than_the_way_there() -> None:
    """Where nothing is mostly found, a far service is asked for long prompts only."""
    speeds = measured(1.0, trip_ms=100.0)
    for _ in range(40):
        note(speeds, found=0, took_ms=100.0, tier=NO_TIER)
    assert plan(replace(PROMPT, blocks=20), speeds, 0).reason is Reason.DEARER
    assert plan(replace(PROMPT, blocks=200), speeds, 0).reason is Reason.CHEAPER


times = st.floats(0, 1e5)
lookups = st.tuples(st.integers(0, 10), st.floats(0, 1e4), st.sampled_from(["arena", "disk"]))


@given(
    st.lists(lookups, max_size=12),
    st.builds(Wanted, st.integers(0, 5_000), st.integers(1, 10**8), times, times, times),
    st.integers(0, 10**6),
)
def test_no_more_is_asked_for_than_pays_or_is_a_probe(
    history: list[tuple[int, float, str]], wanted: Wanted, now_ms: int
) -> None:
    speeds = Speeds()
    for found, took_ms, tier in history:
        note(speeds, found=found, took_ms=took_ms, tier=tier if found else NO_TIER)
    fetch = plan(wanted, speeds, now_ms)
    assert 0 <= fetch.blocks <= wanted.blocks
    match fetch.reason:
        case Reason.CHEAPER:
            assert fetch.fetch_ms - wanted.wait_ms < fetch.compute_ms
            assert fetch.fetch_ms <= wanted.left_ms
        case Reason.WHILE_WAITING:
            assert fetch.fetch_ms <= wanted.wait_ms
            assert fetch.fetch_ms <= wanted.left_ms
        case Reason.UNMEASURED:
            assert not wanted.token_ms or fetch.blocks <= PROBE_BLOCKS
        case Reason.PROBE:
            assert fetch.blocks <= PROBE_BLOCKS and speeds.is_stale(now_ms)
        case _:
            assert fetch.blocks == 0


def test_what_waits_before_a_prompt_counts_by_band() -> None:
    """Better bands and its own go first, at the pace that was measured."""
    pace = Pace()
    assert pace.token_ms == 0.0
    pace.note(100, 0, 200.0)
    outlook = Outlook(pace.token_ms, (100, 50, 1_000))
    waits = [outlook.wait_ms(band) for band in Band]
    assert waits == pytest.approx([200, 300, 2_300])
