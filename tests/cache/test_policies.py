"""What the policies do that others are compared with, each by its own rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.test_eviction import SIZE, admit_chain, facts, leave
from headrace_cache.policy.cells import NO_CELL, Cells
from headrace_cache.policy.classic import (
    FirstInFirstOut,
    GreedyDualSizeFrequency,
    LeastFrequentlyUsed,
)
from headrace_cache.policy.heap import NOWHERE, Ranks, SlotHeap
from headrace_cache.policy.ranked import Ranked
from headrace_cache.policy.s3_fifo import S3Fifo
from headrace_cache.policy.sieve import Sieve


def test_fifo_takes_no_note_of_use() -> None:
    policy = FirstInFirstOut()
    for slot in range(3):
        policy.admit(slot, facts(), 0)
    policy.touch(0, 1)
    assert leave(policy, 3) == [0, 1, 2]


def test_lfu_counts_and_then_looks_at_the_last_use() -> None:
    policy = LeastFrequentlyUsed()
    for slot in range(3):
        policy.admit(slot, facts(), 0)
    for slot in (0, 0, 2, 1):
        policy.touch(slot, 1)
    assert leave(policy, 3) == [2, 1, 0]


def test_gdsf_weighs_use_and_cost_against_size_and_age() -> None:
    policy = GreedyDualSizeFrequency()
    policy.admit(0, facts(cost_us=30_000), 0)
    policy.admit(1, facts(size_bytes=SIZE * 4, cost_us=30_000), 0)
    policy.admit(2, facts(cost_us=10_000), 0)
    policy.touch(2, 1)
    assert leave(policy, 1) == [1]
    policy.admit(3, facts(cost_us=10_000), 0)
    assert leave(policy, 3) == [3, 2, 0]


def test_gdsf_ages_what_is_not_used() -> None:
    policy = GreedyDualSizeFrequency()
    policy.admit(0, facts(cost_us=30_000), 0)
    turns = 0
    policy.admit(1, facts(cost_us=10_000), 0)
    while leave(policy, 1) != [0]:
        turns += 1
        policy.admit(1, facts(cost_us=10_000), 0)
    assert turns == 2, "worth three times as much, it outlives two others and ties with a third"


@pytest.mark.parametrize("policy", [GreedyDualSizeFrequency()])
def test_a_tenants_churn_ages_its_own_entries_and_nobody_elses(policy: Ranked) -> None:
    """Who turns over its quota a hundred times does not outrank the others by that."""
    policy.admit(0, facts(tenant=1), 0)
    for _ in range(100):
        policy.admit(1, facts(tenant=2), 0)
        assert leave(policy, 1, spare={2: SIZE}) == [1]
    policy.admit(1, facts(tenant=2), 0)
    policy.admit(2, facts(tenant=1), 0)
    assert leave(policy, 3) == [0, 1, 2]


def test_sieve_gives_what_was_used_a_second_round() -> None:
    policy = Sieve()
    for slot in range(4):
        policy.admit(slot, facts(), 0)
    policy.touch(0, 1)
    policy.touch(2, 1)
    assert leave(policy, 1) == [1]
    policy.admit(4, facts(), 2)
    policy.touch(4, 2)
    assert leave(policy, 4) == [3, 0, 2, 4], "the hand goes on from where it was"


def test_s3_fifo_lets_what_is_used_once_pass_through_the_small_queue() -> None:
    policy = S3Fifo()
    for slot in range(10):
        policy.admit(slot, facts(name=slot), 0)
    for slot in (0, 0, 1):
        policy.touch(slot, 1)
    assert leave(policy, 8) == [1, 2, 3, 4, 5, 6, 7, 8], "one use is not enough, two are"


def test_s3_fifo_knows_again_what_it_lost_lately() -> None:
    policy = S3Fifo()
    for slot in range(10):
        policy.admit(slot, facts(name=slot), 0)
    assert leave(policy, 2) == [0, 1]
    policy.admit(1, facts(name=1), 1)
    assert leave(policy, 8) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert leave(policy, 1) == [1]


def test_a_chain_whose_tail_was_used_stays_whole() -> None:
    """Its ancestors stand before it in the queues, and may not leave."""
    policy = S3Fifo()
    admit_chain(policy, 0, 3)
    admit_chain(policy, 10, 3)
    for _ in range(2):
        policy.touch(2, 1)
    assert leave(policy, 3) == [12, 11, 10]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=120))
def test_a_heap_of_slots_sorts_like_a_list(steps: list[tuple[int, int]]) -> None:
    """Each step brings a slot, moves it, or, with score 0, takes it out."""
    ranks = Ranks()
    ranks.grow(31)
    heap = SlotHeap(ranks)
    for slot, score in steps:
        here = ranks.place[slot] != NOWHERE
        if here and score == 0:
            heap.remove(slot)
        elif here:
            ranks.score[slot] = score
            heap.moved(slot)
        else:
            ranks.score[slot], ranks.sequence[slot] = score, slot
            heap.push(slot)
        heap.check_integrity()
    expected = sorted(heap, key=lambda slot: (ranks.score[slot], slot))
    popped = []
    while heap:
        popped.append(heap.first())
        heap.remove(heap.first())
    assert popped == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=80))
def test_cells_are_queues(steps: list[tuple[int, int]]) -> None:
    """Against lists: a slot goes to the end of a cell, from wherever it stood."""
    cells = Cells()
    cells.grow(10)
    expected: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for slot, cell in steps:
        if cells.cell_of(slot) != NO_CELL:
            expected[cells.cell_of(slot)].remove(slot)
            cells.remove(slot)
        if slot % 3 or cell:
            cells.add(slot, cell)
            expected[cell].append(slot)
        cells.check_integrity()
        standing = {cell: list(cells.standing(cell)) for cell in cells}
        assert standing == {cell: slots for cell, slots in expected.items() if slots}
