"""Ten thousand random programs against the pure scheduler and block pool.

A program is arrivals (some fork a live sequence, some share a prefix, some want their prompt
scored), aborts, guesses right and wrong, and forced output, over a pool and a budget that are far
too small. `HEADRACE_TEST_PROGRAMS` sets how many, `HEADRACE_TEST_SEED` where they begin.
"""

from __future__ import annotations

import os
import random

from headrace.types import BLOCK_TOKENS, Band, FinishReason
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.scheduler import Plan, PlanItem, Scheduler
from headrace_worker.policy.sequence import Sequence, Status, blocks_for
from worker.builders import make_sequence, random_tokens

PROGRAMS = int(os.environ.get("HEADRACE_TEST_PROGRAMS", "10000"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "0"))
VOCAB = 5
IDLE_STEPS_MAX = 2


class Program:
    """One random life of a scheduler, checked after every step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        blocks = self.random.randint(2, 14)
        self.budget = self.random.randint(4, 48)
        running_max = self.random.randint(1, 4)
        self.capacity = blocks * BLOCK_TOKENS
        self.scheduler = Scheduler(
            BlockPool(blocks), running_max=running_max, step_tokens_max=self.budget
        )
        self.live: dict[str, Sequence] = {}
        self.arrivals = self.random.randint(1, 6)
        self.came = 0

    def run(self) -> None:
        now, idle = 0, 0
        # every step computes a token that stays or yields output, whatever gives way
        steps_max = 200 * (1 + self.arrivals)
        while self.arrivals or self.live:
            assert now < steps_max, "starvation"
            if self.arrivals and self.random.random() < 0.3:
                self._arrive(now)
            if self.live and self.random.random() < 0.02:
                self._abort(self.random.choice(list(self.live)))
            progress = self._step(now)
            idle = 0 if progress or not self.live else idle + 1
            assert idle < IDLE_STEPS_MAX, "work is there, so work is done"
            now += 1
        self.scheduler.pool.check_integrity([])
        assert self.scheduler.pool.free_count == self.scheduler.pool.total

    def _arrive(self, now: int) -> None:
        self.arrivals -= 1
        self.came += 1
        prompt = self._prompt()[: self.capacity - 1]
        room = self.capacity - len(prompt)
        scoring = self.random.random() < 0.15
        sequence = make_sequence(
            f"s{self.came}",
            prompt,
            output=0 if scoring and self.random.random() < 0.5 else self.random.randint(1, room),
            band=self.random.choice(list(Band)),
            arrived_ms=now,
            added_ms=now,
            order=self.came,
            scoring=len(prompt) - 1 if scoring else 0,
            stop_ids=frozenset({4}) if self.random.random() < 0.5 else frozenset(),
        )
        if sequence.ending() is not None and not sequence.scoring:
            return
        self.scheduler.add(sequence)
        self.live[sequence.id] = sequence

    def _prompt(self) -> list[int]:
        kind = self.random.random()
        if self.live and kind < 0.3:
            parent = self.random.choice(list(self.live.values()))
            return parent.tokens[: self.random.randint(1, parent.known)]
        shared = random_tokens(BLOCK_TOKENS * self.random.randint(0, 3), 7, VOCAB)
        return shared + random_tokens(self.random.randint(1, 40), self.came, VOCAB)

    def _abort(self, id: str) -> None:
        self.scheduler.remove(self.live.pop(id))
        self.scheduler.check_integrity()

    def _step(self, now: int) -> bool:
        guesses = {
            id: tuple(self.random.choices(range(VOCAB), k=self.random.randint(1, 9)))
            for id in self.live
            if self.random.random() < 0.5
        }
        plan = self.scheduler.schedule(now, guesses)
        self._check(plan)
        outcomes = self.scheduler.apply(plan, [self._draw(item) for item in plan.items])
        self.scheduler.check_integrity()
        for outcome in outcomes:
            sequence = outcome.sequence
            ending = outcome.ending
            if ending is None and self.random.random() < 0.1:
                ending = self._force(sequence)
            if ending is not None:
                assert sequence.status is Status.FINISHED and sequence.ending() is ending
                assert sequence.scored == sequence.scoring
                del self.live[sequence.id]
        self.scheduler.check_integrity()
        return bool(plan.items)

    def _force(self, sequence: Sequence) -> FinishReason | None:
        for _ in range(self.random.randint(1, 40)):
            ending = self.scheduler.extend(sequence, 1)
            if ending is not None:
                self.scheduler.remove(sequence)
                return ending
        return None

    def _draw(self, item: PlanItem) -> list[int]:
        """The tokens of an item's rows: guesses come true half of the time."""
        if not item.samples:
            return []
        wanted = [*item.guess, self.random.randrange(VOCAB)]
        return [t if self.random.random() < 0.5 else self.random.randrange(VOCAB) for t in wanted]

    def _check(self, plan: Plan) -> None:
        assert plan.tokens <= self.budget, "plan beyond the budget"
        assert len({item.sequence.id for item in plan.items}) == len(plan.items)
        owners: dict[int, str] = {}
        for item in plan.items:
            sequence, last = item.sequence, item.start + item.rows
            assert item.count > 0 and item.start == sequence.computed
            assert len(sequence.blocks) >= blocks_for(last), "a row without a place for its KV"
            assert sequence.known + len(item.guess) < sequence.tokens_max or not item.guess
            assert not item.guess or item.samples
            for index in range(item.start // BLOCK_TOKENS, blocks_for(last)):
                owner = owners.setdefault(sequence.blocks[index], sequence.id)
                assert owner == sequence.id, "two sequences write to one block"


def test_random_programs_end_and_leak_nothing() -> None:
    """No block is leaked or owned twice, nobody starves, no plan exceeds its budget."""
    for seed in range(SEED, SEED + PROGRAMS):
        try:
            Program(seed).run()
        except AssertionError as error:
            raise AssertionError(f"program {seed}: {error}") from error
