"""Several plans at a time: what is under way keeps its blocks, and everything still ends."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import BLOCK_TOKENS, Band, Finish, FinishReason
from headrace_worker.flights import Flights
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.plan import Plan
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import Sequence, Status
from worker.builders import make_sequence

STEPS_MAX = 3_000


class Pipeline:
    """A scheduler whose plans land late, in order, with made-up tokens."""

    def __init__(self, *, plans: int, blocks: int = 24, budget: int = 24, running: int = 6) -> None:
        self.scheduler = Scheduler(BlockPool(blocks), running_max=running, step_tokens_max=budget)
        self.flights = Flights()
        self.plans = plans
        self.held: list[dict[str, list[int]]] = []
        self.ended: dict[str, FinishReason | None] = {}
        self.sizes: list[int] = []
        self.now = 0

    def step(self) -> Plan:
        """Begins a plan, and lands one when that is due, as the engine does."""
        self.now += 1
        plan = self.scheduler.schedule(
            self.now,
            under_way=self.flights.under_way(),
            leaving=self.flights.leaving,
            plans=self.plans,
        )
        if plan.items:
            self.flights.begin(plan, self.now)
            self.held.append({i.sequence.id: list(i.sequence.blocks) for i in plan.items})
            self.sizes.append(len(plan.items))
        if len(self.flights) and (not plan.items or len(self.flights) == self.plans):
            self.land()
        self.check()
        return plan

    def land(self) -> None:
        plan, held = self.flights.land().plan, self.held.pop(0)
        for item in plan.items:
            assert item.sequence.blocks[: len(held[item.sequence.id])] == held[item.sequence.id]
        for job, finish in self.flights.take_ending(plan).items():
            sequence = next(i.sequence for i in plan.items if i.sequence.id == job)
            self.scheduler.remove(sequence)
            self.ended[job] = finish.reason
        drawn = [[7] if i.samples else [] for i in plan.items]
        for outcome in self.scheduler.apply(plan, drawn):
            if outcome.ending is not None:
                self.ended[outcome.sequence.id] = outcome.ending

    def cancel(self, sequence: Sequence) -> None:
        if sequence.id in self.flights.under_way():
            self.flights.end_later(sequence.id, Finish(FinishReason.CANCELLED))
        elif sequence.status is not Status.FINISHED:
            self.scheduler.remove(sequence)
            self.ended[sequence.id] = FinishReason.CANCELLED

    def check(self) -> None:
        self.scheduler.check_integrity()
        here = {s.id for s in (*self.scheduler.running, *self.scheduler.waiting)}
        self.flights.check_integrity(here)

    def run(self) -> None:
        for _ in range(STEPS_MAX):
            if not (self.scheduler.running or self.scheduler.waiting):
                return
            self.step()
        raise AssertionError("it does not come to an end")


@given(seed=st.integers(0, 10_000), plans=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_random_programs_end_and_keep_their_blocks(seed: int, plans: int) -> None:
    """In a pool that is too small, with cancels at any time."""
    dice = random.Random(seed)
    pipeline = Pipeline(plans=plans)
    sequences = [
        make_sequence(
            f"s{i}",
            [dice.randrange(9) for _ in range(dice.randrange(1, 200))],
            output=dice.randrange(1, 40),
            band=dice.choice(list(Band)),
            order=i,
        )
        for i in range(dice.randrange(1, 10))
    ]
    left = list(sequences)
    while left:
        pipeline.scheduler.add(left.pop())
        for _ in range(dice.randrange(4)):
            pipeline.step()
        if dice.random() < 0.2:
            pipeline.cancel(dice.choice(sequences[len(left) :]))
    pipeline.run()
    assert pipeline.ended.keys() == {s.id for s in sequences}
    assert pipeline.scheduler.pool.free_count == pipeline.scheduler.pool.total


def test_streams_are_dealt_evenly() -> None:
    """Six streams over three plans are two each, and none is computed twice as often."""
    pipeline = Pipeline(plans=3)
    sequences = [make_sequence(f"s{i}", [i], output=30, order=i) for i in range(6)]
    for sequence in sequences:
        pipeline.scheduler.add(sequence)
    for _ in range(30):
        pipeline.step()
    assert set(pipeline.sizes) == {2}
    outputs = [sequence.output_tokens for sequence in sequences]
    assert max(outputs) - min(outputs) <= 1


def test_chunks_of_one_prompt_follow_each_other() -> None:
    """The next begins where the last one ends, before that has landed; blocks become findable only
    when their KV is there."""
    pipeline = Pipeline(plans=3)
    sequence = make_sequence("p", range(70), output=2)
    pipeline.scheduler.add(sequence)
    starts = [pipeline.step().items[0].start for _ in range(2)]
    assert starts == [0, 24] and len(pipeline.flights) == 2
    assert sequence.computed == 48 and sequence.registered == 0
    third = pipeline.step().items[0]
    assert (third.start, third.count, third.samples) == (48, 22, True)
    assert sequence.registered == 24 // BLOCK_TOKENS, "the first chunk has landed"
    assert not pipeline.step().items, "its token is not known before the last chunk lands"
    pipeline.run()
    assert pipeline.ended == {"p": FinishReason.LENGTH}


def test_rows_that_are_scored_wait_for_each_other() -> None:
    """What they say may end the sequence, whose blocks must not be written to any more then."""
    pipeline = Pipeline(plans=3)
    pipeline.scheduler.add(make_sequence("p", range(70), output=2, scoring=69))
    assert len(pipeline.step().items) == 1
    assert not pipeline.step().items
    pipeline.run()
