"""Ten thousand random programs against the pure scheduler and block pool.

A program is arrivals of all bands (some fork a live sequence, some share a prefix, some want their
prompt scored, some have deadlines), aborts, guesses right and wrong, and forced output, over a pool
and a budget that are far too small and a clock that jumps. `HEADRACE_TEST_PROGRAMS` sets how many,
`HEADRACE_TEST_SEED` where they begin.
"""

from __future__ import annotations

import os
import random

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Band, FinishReason
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.plan import Plan, PlanItem
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import PROMOTE_MS, Sequence, Status, blocks_for
from headrace_worker.policy.turns import HURRIED_STEPS_MAX
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
        self.lower_max = self.random.randint(1, self.budget)
        self.scheduler = Scheduler(
            BlockPool(blocks),
            running_max=min(running_max, self.budget),
            step_tokens_max=self.budget,
            calm_ms=self.random.choice([0, 100, 10**6]),
        )
        self.tick_ms = self.random.choice([1, 30, PROMOTE_MS // 4])
        self.left_out: dict[str, int] = {}
        self.resident: set[bytes] = set()
        self.live: dict[str, Sequence] = {}
        self.arrivals = self.random.randint(1, 6)
        self.came = 0

    def run(self) -> None:
        now, idle, steps = 0, 0, 0
        # every step computes a token that stays or yields output, whatever gives way
        steps_max = 200 * (1 + self.arrivals)
        while self.arrivals or self.live:
            assert steps < steps_max, "starvation"
            if self.arrivals and self.random.random() < 0.3:
                self._arrive(now)
            if self.live and self.random.random() < 0.02:
                self._abort(self.random.choice(list(self.live)))
            progress = self._step(now)
            idle = 0 if progress or not self.live else idle + 1
            assert idle < IDLE_STEPS_MAX, "work is there, so work is done"
            steps += 1
            now += self.random.randint(0, 2 * self.tick_ms)
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
            virtual=self.random.choice([0.0, 1.0, self.random.uniform(0, 50)]),
            due_ms=now + self.random.randint(-50, 50),
            ttft_by_ms=self._deadline(now),
            done_by_ms=self._deadline(now),
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

    def _deadline(self, now: int) -> int | None:
        if self.random.random() < 0.8:
            return None
        return now + self.random.randint(1, 60) * self.tick_ms

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
        for late in self.scheduler.late(now):
            self._abort(late.id)
        streams = [s for s in self.scheduler.running if s.pending == 1]
        plan = self.scheduler.schedule(now, guesses, lower_prefill_tokens=self.lower_max)
        self._check(plan, now)
        self._check_turns(plan, streams)
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
        self._check_news()
        return bool(plan.items or not self.live)

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

    def _check_turns(self, plan: Plan, streams: list[Sequence]) -> None:
        """A stream that keeps its KV is left out for a bounded number of steps in a row."""
        planned = {item.sequence.id for item in plan.items}
        before, self.left_out = self.left_out, {}
        for stream in streams:
            if stream.id not in planned and stream.status is Status.RUNNING:
                assert plan.hurried, "left out for nobody"
                steps = self.left_out[stream.id] = before.get(stream.id, 0) + 1
                assert steps <= HURRIED_STEPS_MAX * stream.band, "a stream stands still"

    def _check_news(self) -> None:
        """What the pool tells of blocks that come and go adds up to what is there."""
        news = self.scheduler.pool.take_news()
        self.resident -= news.keys()
        self.resident |= {key for key, came in news.items() if came}
        there = {block_hash[:BLOCK_KEY_BYTES] for block_hash in self.scheduler.pool._by_hash}
        assert self.resident == there, "the pool told something else than what is there"

    def _check(self, plan: Plan, now: int) -> None:
        assert plan.tokens <= self.budget, "plan beyond the budget"
        best = min((item.sequence.band for item in plan.items), default=Band.BATCH)
        chunks = [i.count for i in plan.items if i.sequence.band > best and _is_prompt(i)]
        assert sum(chunks) <= self.lower_max, "a long step beside a better band"
        assert not any(item.sequence.is_late(now) for item in plan.items), "work for nobody"
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


def _is_prompt(item: PlanItem) -> bool:
    return item.count > 1 and item.start < item.sequence.prompt_tokens


def test_random_programs_end_and_leak_nothing() -> None:
    """No block is leaked or owned twice, nobody starves, no plan exceeds its budget."""
    for seed in range(SEED, SEED + PROGRAMS):
        try:
            Program(seed).run()
        except AssertionError as error:
            raise AssertionError(f"program {seed}: {error}") from error
