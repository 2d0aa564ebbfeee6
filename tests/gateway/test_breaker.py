"""Breakers: who stalls or fails is taken out, looked at by one probe, and let back by tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_gateway.policy.breaker import (
    TRANSITIONS,
    BreakerConfig,
    Breakers,
    News,
    State,
)

NOW = 1_700_000_000_000
STALL = 5_000
COOL = 2_000


class Bench:
    """Breakers with a worker whose jobs are counted here."""

    def __init__(self) -> None:
        self.jobs = {"w": 0}
        self.now = NOW
        self.breakers = Breakers(
            lambda worker: self.jobs[worker], BreakerConfig(STALL, 3, COOL, 10_000)
        )

    def dispatch(self) -> None:
        self.jobs["w"] += 1
        self.breakers.dispatched("w", self.now)

    def wait(self, ms: int) -> None:
        self.now += ms

    @property
    def allows(self) -> bool:
        return self.breakers.allows("w", self.now)

    @property
    def state(self) -> State:
        return self.breakers.state("w", self.now)

    def stall(self) -> None:
        self.dispatch()
        self.wait(STALL)
        assert self.state is State.OPEN


def test_only_the_transitions_of_the_table_exist() -> None:
    assert set(TRANSITIONS) == set(State)
    moves = {(state, news) for state in State for news in TRANSITIONS[state]}
    assert (State.CLOSED, News.TOKENS) not in moves
    assert TRANSITIONS[State.HALF_OPEN][News.TOKENS] is State.CLOSED
    assert all(State.HALF_OPEN in TRANSITIONS[State.OPEN].values() for _ in moves)


def test_a_worker_that_makes_tokens_stays_in() -> None:
    bench = Bench()
    assert bench.allows, "nothing is known of it"
    bench.dispatch()
    for _ in range(20):
        bench.wait(STALL - 1)
        assert bench.allows
        bench.breakers.progress("w", bench.now, 1)
    bench.wait(STALL - 1)
    bench.breakers.progress("w", bench.now, 0)
    bench.wait(1)
    assert not bench.allows, "a report without tokens is no progress"


def test_an_idle_worker_owes_no_tokens() -> None:
    bench = Bench()
    bench.dispatch()
    bench.wait(100)
    bench.breakers.succeeded("w", bench.now)
    bench.jobs["w"] = 0
    bench.wait(1_000_000)
    assert bench.allows
    bench.dispatch()
    bench.wait(STALL - 1)
    assert bench.allows, "it is given the whole time from its first job on"
    bench.wait(1)
    assert not bench.allows


def test_a_stalled_worker_is_probed_once_and_comes_back_with_tokens() -> None:
    bench = Bench()
    bench.stall()
    bench.wait(COOL - 1)
    assert not bench.allows
    bench.wait(1)
    assert bench.allows and bench.state is State.HALF_OPEN
    bench.dispatch()
    assert not bench.allows, "one probe is enough"
    bench.wait(STALL - 1)
    assert not bench.allows
    bench.breakers.progress("w", bench.now, 5)
    assert bench.allows and bench.state is State.CLOSED


def test_silence_opens_it_again_for_twice_as_long_up_to_a_bound() -> None:
    bench = Bench()
    bench.stall()
    for cool in (COOL, 2 * COOL, 4 * COOL, 10_000, 10_000):
        bench.wait(cool - 1)
        assert not bench.allows
        bench.wait(1)
        assert bench.allows
        bench.dispatch()
        bench.wait(STALL)
        assert bench.state is State.OPEN
        bench.breakers.check_integrity()
    bench.wait(10_000)
    bench.dispatch()
    bench.breakers.progress("w", bench.now, 1)
    assert bench.state is State.CLOSED
    bench.breakers.progress("w", bench.now, 1)
    bench.wait(STALL)
    assert not bench.allows
    bench.wait(COOL)
    assert bench.allows, "after it was well the cool-down starts short again"


def test_a_stalled_worker_that_goes_on_by_itself_is_probed_at_once() -> None:
    bench = Bench()
    bench.stall()
    bench.wait(10)
    bench.breakers.progress("w", bench.now, 1)
    assert bench.state is State.HALF_OPEN and bench.allows
    bench.dispatch()
    assert not bench.allows
    bench.breakers.progress("w", bench.now, 1)
    assert bench.allows


def test_a_probe_that_was_taken_back_does_not_block_the_next() -> None:
    bench = Bench()
    bench.stall()
    bench.jobs["w"] = 0  # they were handed to somebody else
    bench.wait(COOL)
    assert bench.allows
    bench.dispatch()
    assert not bench.allows
    bench.jobs["w"] = 0
    assert bench.allows


def test_several_failures_in_a_row_open_it_but_not_one() -> None:
    bench = Bench()
    for _ in range(2):
        bench.breakers.failed("w", bench.now)
    bench.breakers.succeeded("w", bench.now)
    for _ in range(2):
        bench.breakers.failed("w", bench.now)
    assert bench.allows
    bench.breakers.failed("w", bench.now)
    assert not bench.allows
    bench.breakers.progress("w", bench.now, 1)
    assert not bench.allows, "others' tokens do not make up for failures"
    bench.wait(COOL)
    bench.dispatch()
    bench.breakers.failed("w", bench.now)
    assert bench.state is State.OPEN, "the probe failed too"
    bench.wait(2 * COOL)
    bench.dispatch()
    bench.breakers.succeeded("w", bench.now)
    assert bench.state is State.CLOSED
    bench.breakers.forget("w")
    assert bench.allows


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["dispatch", "tokens", "success", "failure", "end", "wait", "look"]),
            st.integers(0, 8_000),
        ),
        max_size=60,
    )
)
def test_an_open_breaker_lets_nobody_through_and_a_half_open_one_a_single_job(
    program: list[tuple[str, int]],
) -> None:
    """Whatever happens, if jobs go only where they are allowed; and nobody is out for good."""
    bench = Bench()
    for action, ms in program:
        match action:
            case "dispatch" if bench.allows:
                before = bench.state
                bench.dispatch()
                assert before is not State.OPEN
                assert before is State.CLOSED or not bench.allows
            case "tokens":
                bench.breakers.progress("w", bench.now, 1)
            case "success":
                bench.breakers.succeeded("w", bench.now)
            case "failure":
                bench.breakers.failed("w", bench.now)
            case "end":
                bench.jobs["w"] = max(0, bench.jobs["w"] - 1)
            case "wait":
                bench.wait(ms)
        bench.breakers.check_integrity()
    for _ in range(4):
        bench.wait(10_000)
        if bench.allows:
            break
    else:
        pytest.fail(f"it is never looked at again: {bench.state}")
