"""Sequence and scheduler in known stories; what bands mean to them is in test_turns.py."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import pytest

from headrace.types import Band, FinishReason
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.plan import Outcome, Plan
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import TRANSITIONS, Sequence, Status, blocks_for
from worker.builders import make_sequence


def make_scheduler(blocks: int, *, running_max: int = 8, step_tokens_max: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks), running_max=running_max, step_tokens_max=step_tokens_max)


def step(scheduler: Scheduler, now: int = 0) -> tuple[Plan, list[Outcome]]:
    """One step with made-up tokens; the plan is checked."""
    plan = scheduler.schedule(now)
    check_plan(plan)
    drawn = [
        [(item.sequence.known * 7 + item.sequence.order) % 50] if item.samples else []
        for item in plan.items
    ]
    outcomes = scheduler.apply(plan, drawn)
    scheduler.check_integrity()
    return plan, outcomes


def check_plan(plan: Plan) -> None:
    assert len({item.sequence.id for item in plan.items}) == len(plan.items)
    for item in plan.items:
        sequence = item.sequence
        assert sequence.status is Status.RUNNING
        assert item.count > 0 and item.start == sequence.computed
        assert len(sequence.blocks) >= blocks_for(item.start + item.count)
        finished = sequence.known == sequence.tokens_max
        assert item.samples == (item.start + item.count == sequence.known and not finished)


def finish(scheduler: Scheduler, steps_max: int = 5000) -> list[str]:
    """Steps until nothing is left; ids in the order in which they ended."""
    ended = []
    for _ in range(steps_max):
        if not (scheduler.waiting or scheduler.running):
            return ended
        _, outcomes = step(scheduler)
        ended += [outcome.sequence.id for outcome in outcomes if outcome.ending]
    raise AssertionError(f"still here after {steps_max} steps: {scheduler.running}")


def test_transitions_are_those_of_the_table() -> None:
    """A finished sequence stays finished, a waiting one cannot be preempted."""
    assert TRANSITIONS.keys() == set(Status)
    sequence = make_sequence("a", [1])
    with pytest.raises(AssertionError, match="cannot become"):
        sequence.become(Status.PREEMPTED)
    sequence.become(Status.FINISHED)
    for status in Status:
        with pytest.raises(AssertionError, match="cannot become"):
            sequence.become(status)


def test_endings() -> None:
    """A stop id ends what it is output of, not a prompt that happens to end in it."""
    stop = frozenset({9})
    assert make_sequence("a", [9], stop_ids=stop).ending() is None
    assert make_sequence("a", [1], logged=[9], stop_ids=stop).ending() is FinishReason.STOP
    assert make_sequence("a", [1], logged=[2] * 4).ending() is FinishReason.LENGTH


def ids(sequences: Sequences[Sequence]) -> list[str]:
    return [sequence.id for sequence in sequences]


def test_one_rank_orders_the_batch() -> None:
    """Band, virtual counter, due time, arrival, number: whatever order they came in here."""
    scheduler = make_scheduler(40, step_tokens_max=100)
    for order, (id, band, virtual, due, arrived) in enumerate(
        [
            ("late", Band.STANDARD, 7.0, 50, 5),
            ("bulk", Band.BATCH, 0.0, 0, 0),
            ("early", Band.STANDARD, 7.0, 50, 3),
            ("twin", Band.STANDARD, 7.0, 50, 3),
            ("urgent", Band.STANDARD, 7.0, 40, 6),
            ("poor", Band.STANDARD, 6.5, 90, 8),
            ("vip", Band.INTERACTIVE, 99.0, 99, 9),
        ]
    ):
        facts = {"band": band, "virtual": virtual, "due_ms": due, "arrived_ms": arrived}
        scheduler.add(make_sequence(id, [1] * 5, order=order, **facts))
    admitted = [id for _ in range(3) for id in ids(step(scheduler)[0].admitted)]
    assert admitted == ["vip", "poor", "urgent", "early", "twin", "late", "bulk"]


def test_decodes_come_before_prefill_and_prompts_are_chunked() -> None:
    """A long prompt takes what its band's streams leave of the budget, chunk after chunk."""
    scheduler = make_scheduler(40, step_tokens_max=20)
    scheduler.add(make_sequence("stream", [1], output=30))
    step(scheduler)
    scheduler.add(make_sequence("prompt", [2] * 50))
    chunks = []
    for _ in range(3):
        plan, _ = step(scheduler)
        assert plan.items[0].sequence.id == "stream" and plan.items[0].count == 1
        chunks.append((plan.items[1].start, plan.items[1].count, plan.items[1].samples))
    assert chunks == [(0, 19, False), (19, 19, False), (38, 12, True)]


def test_a_shared_prefix_is_computed_once() -> None:
    """The second sequence starts after the blocks that the first one left."""
    scheduler = make_scheduler(10)
    scheduler.add(make_sequence("a", [3] * 40, output=1))
    finish(scheduler)
    second = make_sequence("b", [3] * 40, output=1)
    scheduler.add(second)
    plan, _ = step(scheduler)
    assert (plan.items[0].start, plan.items[0].count) == (32, 8)
    assert len(second.cached_blocks or ()) == 2


def test_choices_of_one_prompt_compute_it_once() -> None:
    """They wait for the first of them, block by block; a stranger behind them does not."""
    scheduler = make_scheduler(60, step_tokens_max=32)
    for order in range(4):
        scheduler.add(make_sequence(f"c{order}", [3] * 70, output=2, order=order))
    scheduler.add(make_sequence("other", [4] * 10, output=2, order=9))
    computed = 0
    while scheduler.waiting or scheduler.running:
        plan, _ = step(scheduler)
        computed += sum(item.count for item in plan.items if item.sequence.id != "other")
        if computed == 32:
            assert ids(plan.admitted) == ["c0"]
        if 32 < computed <= 64:
            assert ids(plan.admitted) == [], "their first blocks are there, the next are coming"
    assert computed == 70 + 3 * (70 - 64) + 4


def test_nobody_waits_for_the_prefix_of_a_lower_band() -> None:
    """Batch work that is pushed back again and again holds up no interactive twin of its prompt."""
    scheduler = make_scheduler(60, step_tokens_max=32)
    scheduler.add(make_sequence("bulk", [3] * 100, output=2, band=Band.BATCH))
    step(scheduler)
    scheduler.add(make_sequence("vip", [3] * 100, output=2, band=Band.INTERACTIVE, order=1))
    plan, _ = step(scheduler)
    assert ids(plan.admitted) == ["vip"]
    assert plan.items[0].sequence.id == "vip" and plan.items[0].start == 32


def test_a_higher_band_takes_the_room_of_a_lower_one() -> None:
    """Interactive work does not wait for batch work to end: it takes its blocks at once."""
    scheduler = make_scheduler(6, running_max=4)
    scheduler.add(make_sequence("bulk", [1] * 80, output=10, band=Band.BATCH))
    for _ in range(3):
        step(scheduler)
    scheduler.add(make_sequence("vip", [2] * 40, output=4, band=Band.INTERACTIVE))
    plan, _ = step(scheduler)
    assert ids(plan.preempted) == ["bulk"] and ids(plan.admitted) == ["vip"]
    assert finish(scheduler) == ["vip", "bulk"]


def test_an_equal_band_waits() -> None:
    """Nobody is thrown out for a peer; the first in rank is not overtaken by one that would fit."""
    scheduler = make_scheduler(6, step_tokens_max=100)
    scheduler.add(make_sequence("a", [1] * 60, output=8, order=1))
    step(scheduler)
    scheduler.add(make_sequence("b", [2] * 60, output=4, order=2))
    scheduler.add(make_sequence("c", [3] * 4, output=4, order=3))
    plan, _ = step(scheduler)
    assert not plan.preempted and not plan.admitted
    assert finish(scheduler)[0] == "a"


def test_what_can_never_fit_is_refused() -> None:
    """The refusal names both numbers."""
    scheduler = make_scheduler(4)
    assert scheduler.refuse(64) is None
    assert scheduler.refuse(65) == "65 tokens do not fit into this worker's KV cache of 64 tokens"


def test_a_guess_stands_as_far_as_it_is_drawn() -> None:
    """Rows after the first wrong guess do not count, and their KV is written over."""
    scheduler = make_scheduler(10)
    sequence = make_sequence("a", [1] * 14, output=20)
    scheduler.add(sequence)
    step(scheduler)
    plan = scheduler.schedule(0, {"a": (5, 6, 7, 8)})
    [item] = plan.items
    assert (item.count, item.guess, item.rows, plan.tokens) == (1, (5, 6, 7, 8), 5, 5)
    [outcome] = scheduler.apply(plan, [[5, 6, 9, 8, 1]])
    assert outcome.tokens == (5, 6, 9) and sequence.tokens[-3:] == [5, 6, 9]
    assert (sequence.pending, sequence.computed) == (1, 17)
    assert sequence.registered == 1, "the block that right guesses filled can be found"
    scheduler.check_integrity()


def test_a_guess_ends_with_its_sequence() -> None:
    """A stop token or the limit among right guesses ends the output there."""
    scheduler = make_scheduler(10)
    scheduler.add(make_sequence("stops", [1] * 4, output=20, stop_ids=frozenset({6})))
    scheduler.add(make_sequence("long", [2] * 4, output=4, order=1))
    step(scheduler)
    plan = scheduler.schedule(0, {"stops": (5, 6, 7), "long": (5, 6, 7, 8)})
    assert [item.guess for item in plan.items] == [(5, 6, 7), (5, 6)], "no row past the limit"
    stops, long = scheduler.apply(plan, [[5, 6, 7, 8], [5, 6, 7]])
    assert (stops.tokens, stops.ending) == ((5, 6), FinishReason.STOP)
    assert (long.tokens, long.ending) == ((5, 6, 7), FinishReason.LENGTH)
    assert not scheduler.running and scheduler.pool.free_count == 10


def test_guesses_take_only_what_is_left() -> None:
    """Neither a prompt's chunk nor the blocks set aside for others shrink for a guess."""
    scheduler = make_scheduler(5, step_tokens_max=20)
    stream = make_sequence("stream", [1] * 15, output=40)
    scheduler.add(stream)
    step(scheduler)
    scheduler.add(make_sequence("prompt", [2] * 40, output=2, order=1))
    plan = scheduler.schedule(0, {"stream": (3, 4, 5)})
    assert [(i.count, i.guess) for i in plan.items] == [(1, ()), (19, ())]
    scheduler.apply(plan, [[9], []])
    plan = scheduler.schedule(0, {"stream": tuple(range(30))})
    assert [(i.count, len(i.guess)) for i in plan.items] == [(1, 0), (19, 0)]
    scheduler.apply(plan, [[9], []])
    plan = scheduler.schedule(0, {"stream": tuple(range(30))})
    assert [(i.count, len(i.guess)) for i in plan.items] == [(1, 14), (2, 0)], "to the block's end"
    scheduler.apply(plan, [[9] * 15, [8]])
    scheduler.check_integrity()


def test_forced_output_is_computed_before_prompts() -> None:
    """Tokens that a grammar forced are caught up with in one chunk, ahead of everybody's prompt."""
    scheduler = make_scheduler(20, step_tokens_max=20)
    sequence = make_sequence("json", [1] * 4, output=20)
    scheduler.add(sequence)
    step(scheduler)
    assert [scheduler.extend(sequence, 7) for _ in range(3)] == [None] * 3
    scheduler.add(make_sequence("prompt", [2] * 60, output=2, order=1))
    plan, _ = step(scheduler)
    assert [(i.sequence.id, i.count, i.samples) for i in plan.items] == [
        ("json", 4, True),
        ("prompt", 16, False),
    ]
    left = sequence.tokens_max - sequence.known
    endings = [scheduler.extend(sequence, 8) for _ in range(left)]
    assert endings == [None] * (left - 1) + [FinishReason.LENGTH]


def test_scored_rows_are_computed_whatever_is_cached() -> None:
    """A prompt whose probabilities are wanted passes by the prefix cache until they are known."""
    scheduler = make_scheduler(20, step_tokens_max=24)
    scheduler.add(make_sequence("a", [3] * 40, output=1))
    finish(scheduler)
    scored = make_sequence("b", [3] * 40, output=0, scoring=39)
    scheduler.add(scored)
    plan = scheduler.schedule(0)
    [item] = plan.items
    assert (item.start, item.count, item.scored_rows) == (0, 24, range(24))
    assert scheduler.apply(plan, [[]]) == []
    plan = scheduler.schedule(0)
    [item] = plan.items
    assert (item.count, item.samples, item.scored_rows) == (16, False, range(24, 39))
    [outcome] = scheduler.apply(plan, [[]])
    assert (outcome.tokens, outcome.ending) == ((), FinishReason.LENGTH)
