"""What blocks in the cache services spare: fetching instead of computing, by measured speeds."""

from __future__ import annotations

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, BlockNews
from headrace_gateway.policy.fetching import NOTHING, PART_DEFAULT, Fetching, Spared


def keys_of(*numbers: int) -> bytes:
    return b"".join((16 * number).to_bytes(BLOCK_KEY_BYTES, "little") for number in numbers)


def holding(*blocks: int) -> Fetching:
    fetching = Fetching()
    fetching.index.note(BlockNews("a", "1", 1, keys_of(*blocks)))
    return fetching


def test_what_nobody_measured_is_taken_to_cost_a_tenth() -> None:
    """Ten blocks held behind the two that a worker has."""
    fetching = holding(*range(2, 12))
    spared = fetching.spares(keys_of(*range(20)), 2, 0.0)
    assert spared == Spared(10, int(10 * BLOCK_TOKENS * (1 - PART_DEFAULT)))
    assert fetching.spares(keys_of(*range(20)), 12, 0.0) == NOTHING


def test_measured_speeds_decide_and_recent_ones_weigh_more() -> None:
    """1,000 tokens a second computed, 4,000 fetched: a quarter is left; slow fetching spares 0."""
    fetching = holding(*range(8))
    fetching.note(4_000, 1_000)
    assert fetching.part(1_000) == 0.25
    assert fetching.spares(keys_of(*range(8)), 0, 1_000) == Spared(8, 96)
    for _ in range(40):
        fetching.note(10_000, 100_000)
    assert fetching.part(1_000) == 1.0
    assert fetching.spares(keys_of(*range(8)), 0, 1_000) == Spared(8, 0)
    assert fetching.part(0.0) == PART_DEFAULT, "who knows no speed of workers"


def test_a_few_tokens_measure_nothing() -> None:
    fetching = Fetching()
    fetching.note(16, 1)
    fetching.note(0, 500)
    assert fetching.fetched_per_s == 0
