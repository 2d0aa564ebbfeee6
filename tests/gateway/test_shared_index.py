"""What the dispatcher knows of the cache services' blocks: news, gaps, snapshots, bounds."""

from __future__ import annotations

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.types import BLOCK_KEY_BYTES, BlockNews
from headrace_gateway.policy import shared_index
from headrace_gateway.policy.shared_index import SharedIndex


def keys_of(*numbers: int) -> bytes:
    """A key for each number; equal numbers, equal keys."""
    return b"".join((number << 8).to_bytes(BLOCK_KEY_BYTES, "little") for number in numbers)


def news(
    sequence: int, *stored: int, removed: tuple[int, ...] = (), node: str = "a", boot: str = "1"
) -> BlockNews:
    return BlockNews(node, boot, sequence, keys_of(*stored), keys_of(*removed))


def test_a_prompts_run_is_found_where_it_goes_on() -> None:
    """From the block on that workers lack, up to the first that nobody keeps."""
    index = SharedIndex()
    assert index.run_after(keys_of(1, 2), 0) == 0
    assert index.note(news(1, *range(10, 20)))
    prompt = keys_of(*range(5, 30))
    assert index.run_after(prompt, 0) == 0
    assert index.run_after(prompt, 5) == 10
    assert index.run_after(prompt, 14) == 1
    assert index.run_after(prompt, 15) == 0 == index.run_after(prompt, 99)


def test_a_run_may_go_on_at_another_service() -> None:
    """Groups lie on different ones; together they are one run."""
    index = SharedIndex()
    index.note(news(1, *range(64)))
    index.note(news(1, *range(64, 100), node="b"))
    assert index.run_after(keys_of(*range(200)), 0) == 100
    index.keep_only(["b"])
    assert index.run_after(keys_of(*range(200)), 0) == 0
    assert index.run_after(keys_of(*range(200)), 64) == 36


def test_only_sixty_bits_of_a_key_count() -> None:
    """Services keep no more of what lies on disk alone."""
    index = SharedIndex()
    index.note(BlockNews("a", "1", 1, bytes((0x10,)) + b"1234567"))
    assert index.run_after(bytes((0x1F,)) + b"1234567", 0) == 1
    assert index.run_after(bytes((0x2F,)) + b"1234567", 0) == 0


def test_a_gap_asks_for_the_snapshot_and_what_came_after_it_stays() -> None:
    """News 3 was lost; the snapshot is of news 3, news 4 is applied again on top of it."""
    index = SharedIndex()
    assert index.note(news(1, 1, 2))
    assert index.note(news(2, 3))
    assert not index.note(news(4, 5, removed=(1,)))
    assert index.note(news(4, 6)), "what was had already is skipped"
    assert index.run_after(keys_of(6), 0) == 0
    assert index.snapshot(news(3, 1, 2, 4))
    assert [index.run_after(keys_of(number), 0) for number in range(7)] == [0, 0, 1, 0, 1, 1, 0]
    assert index.note(news(5, 6)), "numbers go on"


def test_another_incarnation_begins_with_nothing() -> None:
    """What a restarted service held is unknown until it says; an old snapshot says nothing."""
    index = SharedIndex()
    index.note(news(7, 1))
    assert index.note(news(1, 2, boot="2"))
    assert index.run_after(keys_of(1), 0) == 0 < index.run_after(keys_of(2), 0)
    assert not index.snapshot(news(9, 1))
    assert index.run_after(keys_of(1), 0) == 0
    assert not SharedIndex().note(news(4, 1)), "who comes late has missed the first"


def test_services_and_blocks_are_bounded() -> None:
    index = SharedIndex(total_max=1_000)
    for node in range(5):
        index.note(news(1, *range(1_000 * node, 1_000 * node + 900), node=f"n{node}"))
        index.check_integrity()
    assert len(index) > 500
    for node in range(shared_index.NODES_MAX + 3):
        assert index.note(news(1, 1, node=f"m{node}"))
    assert index.snapshot(news(1, 1, node="one too many"))
    index.check_integrity()


@settings(max_examples=60)
@example(0, 10, shared_index.STRIDE + 1)
@example(5, 30, shared_index.STRIDE + 6)
@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 400))
def test_the_walk_finds_the_end_that_a_plain_one_does(first: int, held: int, length: int) -> None:
    """In steps and halves, for any place, as long as there is one end."""
    index = SharedIndex()
    index.note(news(1, *range(held)))
    assert index.run_after(keys_of(*range(length)), first) == max(0, min(held, length) - first)


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_whatever_is_lost_a_snapshot_repairs(seed: int) -> None:
    """A service's blocks come and go at random, a third of its news are lost: then a snapshot."""
    rng = random.Random(seed)
    index, truth, snapshot = SharedIndex(), set[int](), news(0)
    for sequence in range(1, 40):
        came = set(rng.sample(range(50), 5)) - truth
        went = set(rng.sample(sorted(truth), min(3, len(truth))))
        truth = truth - went | came
        each = news(sequence, *sorted(came), removed=tuple(sorted(went - came)))
        if sequence == 25:
            snapshot = news(sequence, *sorted(truth))
        if sequence > 25 or rng.random() < 0.66:
            index.note(each)
    index.snapshot(snapshot)
    index.check_integrity()
    found = {number for number in range(50) if index.run_after(keys_of(number), 0)}
    assert found == truth
