"""Output lengths and cache hits, learned per tenant: what is predicted, and from whom."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import EXPECTED_OUTPUT_TOKENS
from headrace_gateway.policy.lengths import SAMPLES_MIN, TENANT_WINDOW, Lengths


def learned(*outputs: int, tenant: str = "t") -> Lengths:
    lengths = Lengths()
    for output in outputs:
        lengths.note(tenant, output, 100, 0)
    return lengths


def test_nothing_is_known_at_first() -> None:
    lengths = Lengths()
    assert lengths.expect("t", 10_000) == EXPECTED_OUTPUT_TOKENS
    assert lengths.expect("t", 40) == 40
    assert lengths.hit_ratio("t") == 0
    assert lengths.token_ms == 0


def test_asking_for_more_than_is_used_changes_nothing() -> None:
    """An adversary with the largest max_tokens and early stops is seen for what it is."""
    lengths = learned(*range(1, 101))
    assert lengths.expect("t", 100_000) == lengths.expect("t", 500) == 80


def test_a_tenant_is_judged_by_its_own_once_there_is_enough_of_it() -> None:
    lengths = learned(*[1_000] * 50, tenant="long")
    for _ in range(SAMPLES_MIN - 1):
        lengths.note("short", 10, 100, 0)
    assert lengths.expect("short", 5_000) == 1_000, "what everybody does, for now"
    lengths.note("short", 10, 100, 0)
    assert lengths.expect("short", 5_000) == 10
    assert lengths.expect("nobody yet", 5_000) == 1_000


def test_what_runs_longer_is_compared_with_what_ran_longer() -> None:
    lengths = learned(*[10] * 100, *[900, 950, 1_000, 1_000, 1_000, 1_000, 1_000, 1_000])
    assert lengths.expect("t", 5_000) == 10
    assert lengths.expect("t", 5_000, longer_than=10) == 1_000
    assert lengths.expect("t", 5_000, longer_than=1_000) == 2_000, "beyond everything seen"
    assert lengths.expect("t", 1_200, longer_than=1_000) == 1_200


def test_old_lengths_are_forgotten() -> None:
    lengths = learned(*[1_000] * TENANT_WINDOW, *[10] * TENANT_WINDOW)
    assert lengths.expect("t", 5_000, longer_than=5) == 10


def test_the_hit_ratio_is_of_tokens_and_of_late() -> None:
    lengths = Lengths()
    lengths.note("t", 1, 900, 0)
    lengths.note("t", 1, 100, 100)
    assert lengths.hit_ratio("t") == 0.1
    for _ in range(TENANT_WINDOW):
        lengths.note("t", 1, 100, 50)
    assert lengths.hit_ratio("t") == 0.5
    assert lengths.hit_ratio("other") == 0


def test_the_pace_is_a_median() -> None:
    lengths = Lengths()
    for pace in (20, 21, 5_000):
        lengths.note_pace(pace)
    assert lengths.token_ms == 21


def test_only_so_many_tenants_are_remembered() -> None:
    lengths = Lengths(tenants_max=2)
    for _ in range(SAMPLES_MIN):
        lengths.note("a", 10, 100, 100)
    lengths.note("b", 1_000, 100, 0)
    lengths.note("a", 10, 100, 100)
    lengths.note("c", 1_000, 100, 0)
    assert lengths.hit_ratio("a") == 1, "b was not heard of for longest"
    lengths.check_integrity()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.integers(0, 99)), max_size=400
    ),
    st.sampled_from("abcd"),
    st.integers(1, 500),
)
@settings(max_examples=100)
def test_a_prediction_is_within_what_is_possible(
    notes: list[tuple[str, int, int]], tenant: str, max_tokens: int
) -> None:
    """More than there is, at most what may be; and the windows stay consistent."""
    lengths = Lengths(tenants_max=2)
    for name, output, cached in notes:
        lengths.note(name, output, 50, cached)
        lengths.check_integrity()
    for longer_than in range(0, max_tokens, 7):
        assert longer_than < lengths.expect(tenant, max_tokens, longer_than) <= max_tokens
    assert 0 <= lengths.hit_ratio(tenant) <= 1


def test_what_the_cache_services_hold_of_a_prompt_need_not_be_computed() -> None:
    """This very prompt's blocks count, or the tenant's history where it promises more."""
    lengths = Lengths()
    assert lengths.expect_cached("t", 1_000) == 0
    assert lengths.expect_cached("t", 1_000, 331) == 320, "whole blocks"
    assert lengths.expect_cached("t", 320, 320) == 304, "never all: the last token is computed"
    assert lengths.expect_cached("t", 0, 0) == lengths.expect_cached("t", 1, 16) == 0
    lengths.note("t", 1, 100, 50)
    assert lengths.expect_cached("t", 1_000, 331) == 496
    assert lengths.expect_cached("t", 1_000, 600) == 592
    assert lengths.expect_cached("other", 1_000) == 0
