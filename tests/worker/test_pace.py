"""How large a lower band's chunk of a prompt may be, from how long such steps took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace_worker.policy.pace import TOKENS_MIN, TOKENS_UNKNOWN, Pace


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
