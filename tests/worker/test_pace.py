"""How large a chunk of a prompt may be, from how long steps took: a lower band's, and anybody's
beside running streams."""

from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.pace import (
    STEP_MS_MIN,
    STRETCH,
    TOKENS_MIN,
    TOKENS_UNKNOWN,
    TOKENS_UNLIMITED,
    Pace,
)
from headrace_worker.policy.scheduler import Scheduler
from worker.builders import make_sequence


def test_nothing_measured_is_a_moderate_chunk() -> None:
    assert Pace().tokens_within(100) == TOKENS_UNKNOWN


def test_a_slow_worker_computes_few_tokens_in_the_time_and_a_fast_one_many() -> None:
    for token_ms, expected in ((3.0, 33), (0.02, 5_000), (50.0, TOKENS_MIN)):
        pace = Pace()
        for _ in range(3):
            pace.note(256, 0, 256 * token_ms)
        assert abs(pace.tokens_within(100) - expected) <= 1


def test_steps_that_mostly_decode_say_nothing() -> None:
    pace = Pace()
    pace.note(256, 8, 264.0)
    before = pace.tokens_within(100)
    pace.note(20, 32, 900.0)
    pace.note(3, 0, 900.0)
    assert pace.tokens_within(100) == before == 100


def test_a_worker_that_slows_down_is_noticed() -> None:
    pace = Pace()
    pace.note(128, 0, 128.0)
    for _ in range(60):
        pace.note(128, 0, 512.0)
    assert 24 <= pace.tokens_within(100) <= 26


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 64), st.floats(-1, 1e6))))
def test_whatever_was_measured_lower_bands_get_on(steps: list[tuple[int, int, float]]) -> None:
    pace = Pace()
    for prompt, rows, took in steps:
        pace.note(prompt, rows, took)
        assert pace.tokens_within(100) >= TOKENS_MIN


# --- beside streams


def measured(streams: int, streams_ms: float, token_ms: float) -> Pace:
    """A pace that has seen a prompt alone, then `streams` alone."""
    pace = Pace(STRETCH)
    pace.note(512, 0, 512 * token_ms)
    pace.note(0, streams, streams_ms)
    return pace


def test_prompts_are_not_limited_where_nobody_streams_or_no_limit_is_set() -> None:
    assert measured(8, 80.0, 1.0).tokens_beside(0, 32) == TOKENS_UNLIMITED
    assert Pace().tokens_beside(8, 32) == TOKENS_UNLIMITED
    assert Pace(STRETCH).tokens_beside(8, 32) == TOKENS_UNKNOWN


def test_a_step_with_a_prompt_takes_so_many_times_what_streams_take() -> None:
    pace = measured(32, 100.0, 2.0)
    assert pace.tokens_beside(32, 32) == 35  # 70 ms of 170


def test_short_steps_may_become_as_long_as_nobody_sees() -> None:
    """One stream of 8 ms a token does not hold up a prompt for the sake of 6 ms."""
    assert measured(1, 8.0, 1.0).tokens_beside(1, 2) == STEP_MS_MIN - 8


def test_who_starts_among_many_is_not_held_up_by_the_first_of_them() -> None:
    """Steps may be as long as they will be when all who are here stream, which is 170 ms."""
    pace = measured(32, 100.0, 1.0)
    pace.note(0, 4, 20.0)
    assert pace.tokens_beside(4, 32) == 150
    assert pace.tokens_beside(4, 4) == STEP_MS_MIN - 20


def test_a_step_that_the_machine_held_up_does_not_count() -> None:
    pace = measured(32, 100.0, 1.0)
    for took_ms in (100.0, 900.0, 100.0, 101.0):
        pace.note(0, 32, took_ms)
    assert pace.tokens_beside(32, 32) == 70


def test_sizes_between_those_that_were_seen_are_between_them() -> None:
    pace = measured(8, 40.0, 1.0)
    pace.note(0, 16, 60.0)
    assert pace.streams_ms(12) == 50.0
    assert (pace.streams_ms(4), pace.streams_ms(32)) == (20.0, 120.0)


def test_what_a_chunk_costs_beside_streams_is_measured_there() -> None:
    """Small chunks are dearer than whole prompts, and attention grows with what stands before."""
    pace = measured(32, 100.0, 1.0)
    assert pace.tokens_beside(32, 32) == 70
    for _ in range(60):
        count = pace.tokens_beside(32, 32)
        pace.note(count, 32, 100.0 + 2.5 * count)
    assert pace.tokens_beside(32, 32) == 28


@given(
    steps=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 64), st.floats(0, 1e4))),
    streams=st.integers(1, 64),
    later=st.integers(0, 64),
)
def test_every_prompt_gets_on_beside_any_streams(steps, streams: int, later: int) -> None:
    pace = Pace(STRETCH)
    for prompt, rows, took_ms in steps:
        pace.note(prompt, rows, took_ms)
    assert TOKENS_MIN <= pace.tokens_beside(streams, later) <= TOKENS_UNLIMITED
    assert pace.streams_ms(streams) >= 0


def test_tokens_come_evenly_while_long_prompts_keep_arriving() -> None:
    """32 streams of 80 ms a step, a prompt of 2,048 tokens every 8 s, each of 1.4 ms.

    The slowest hundredth of the gaps stays below twice the median, and every prompt is answered
    before the next but one arrives.
    """
    pace = Pace(STRETCH)
    scheduler = Scheduler(BlockPool(8_000), running_max=40, step_tokens_max=512, pace=pace)
    for order in range(32):
        scheduler.add(make_sequence(f"s{order}", [order, 7], output=3_000, order=order))
    now, arrived, answered = 0.0, {}, {}
    gaps: list[float] = []
    while now < 60_000:
        if now > 8_000 * (len(arrived) + 1):
            name = f"long{len(arrived)}"
            arrived[name] = now
            prompt = [len(arrived)] * 2_048
            order = 100 + len(arrived)
            scheduler.add(make_sequence(name, prompt, output=1, order=order, added_ms=int(now)))
        plan = scheduler.schedule(int(now))
        rows = sum(item.count == 1 for item in plan.items)
        prompts = plan.tokens - rows
        took_ms = 10.0 + 2.2 * rows + 1.4 * prompts
        pace.note(prompts, rows, took_ms)
        now += took_ms
        if now > 8_000:
            gaps.append(took_ms)
        for outcome in scheduler.apply(plan, [[7] if item.samples else [] for item in plan.items]):
            if outcome.ending:
                answered[outcome.sequence.id] = now - arrived[outcome.sequence.id]
    gaps.sort()
    assert gaps[int(len(gaps) * 0.99)] < 2 * statistics.median(gaps)
    assert len(answered) >= len(arrived) - 2
    assert max(answered.values()) < 16_000
