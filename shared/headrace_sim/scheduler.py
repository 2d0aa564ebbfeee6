"""What a simulated worker computes in its next step: the real scheduler's rules over counts.

Invariant: it decides as headrace_worker/policy/scheduler.py and turns.py do: each effective band's
streams and then its prompts in chunks, the best band first; a better band's prompt makes a hurried
step without the lower bands, at most HURRIED_STEPS_MAX for each band until a step has everybody;
lower bands' prompts are limited while a better band is about, everybody's beside streams; admission
is strict and sets aside KV for all known tokens; who would compute a prefix that somebody is
computing waits for it; the lowest band gives way when KV runs out. Rejected: driving the real
scheduler, which lists every token of every sequence and looks at each sequence in each step.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass
from typing import Any

from headrace.policy.cost_model import CostModel
from headrace.types import BLOCK_TOKENS, Band
from headrace_sim.kv_cache import KvCache, PrefixBlock, round_up
from headrace_sim.lane import Lane
from headrace_sim.plan import Chunk, SimPlan
from headrace_sim.sequence import SimSequence
from headrace_worker.policy.pace import STRETCH, TOKENS_UNLIMITED, Pace
from headrace_worker.policy.scheduler import CALM_MS
from headrace_worker.policy.turns import HURRIED_STEPS_MAX

LOWER_PREFILL_MS = 100
"""The worker's default."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`fcfs`: by arrival alone, everybody in every step, the newest gives way; as engines without
    bands do. The others are the worker's own settings: how long prompts of lower bands may take in
    a step beside a better band, for how long that band is remembered, and how much longer prompts
    may make a step of streams."""

    fcfs: bool = False
    lower_prefill_ms: int = LOWER_PREFILL_MS
    calm_ms: float = CALM_MS
    step_stretch: float = STRETCH


class SimScheduler:
    """Sequences that wait, compute their prompts, and decode in lanes, over one KV cache."""

    __slots__ = (
        "_here",
        "_hurried_steps",
        "_lower",
        "_rests",
        "cache",
        "cost",
        "lanes",
        "pace",
        "preemptions",
        "prefilling",
        "promote_ms",
        "ran_ms",
        "rules",
        "waiting",
    )

    def __init__(self, cost: CostModel, rules: Rules, *, reports: bool) -> None:
        self.cost = cost
        self.rules = rules
        self.cache = KvCache(cost.kv_tokens, plain=rules.fcfs, reports=reports)
        self.waiting: list[SimSequence] = []
        self.prefilling: dict[str, SimSequence] = {}
        self.lanes = tuple(Lane(band) for band in Band)
        self._lower = self.lanes[1:]
        self.preemptions = 0
        self._rests = 0
        self.promote_ms = math.inf
        """When the order of who waits may change next."""
        self.ran_ms = [-math.inf] * len(Band)
        """By their own band, when the last step began that computed any of them."""
        self.pace = Pace(0.0 if rules.fcfs else rules.step_stretch)
        self._hurried_steps: dict[int, int] = {}
        self._here = [0] * len(Band)
        """Sequences by their own band, whatever they do."""

    @property
    def running(self) -> int:
        return len(self.prefilling) + self._streaming

    @property
    def _streaming(self) -> int:
        first, second, third = self.lanes
        return len(first.members) + len(second.members) + len(third.members)

    def lane_of(self, sequence: SimSequence) -> Lane | None:
        lane = self.lanes[sequence.seen_band]
        return lane if sequence.job.id in lane.members else None

    def add(self, sequence: SimSequence, now_ms: float) -> None:
        """`sequence` is here from now on, and waits."""
        self._here[sequence.job.band] += 1
        self._wait(sequence, now_ms)

    def _wait(self, sequence: SimSequence, now_ms: float) -> None:
        sequence.note_step(False, now_ms)
        self._settle(sequence, now_ms)
        if self.waiting:
            insort(self.waiting, sequence, key=self.key)
        else:
            self.waiting.append(sequence)

    def finish(self, sequence: SimSequence, lane: Lane, now_ms: float) -> None:
        """A member of `lane` has all its output."""
        self._here[sequence.job.band] -= 1
        self._give_up(sequence, lane.leave(sequence, now_ms))

    def remove(self, sequence: SimSequence, now_ms: float) -> None:
        """`sequence` ends, whatever it is doing."""
        self._here[sequence.job.band] -= 1
        if sequence.job.id in self.prefilling or self.lane_of(sequence) is not None:
            self._leave(sequence, now_ms)
        else:
            self.waiting.remove(sequence)

    def start_decoding(self, sequence: SimSequence, now_ms: float) -> None:
        """Its prompt is computed and gave a token."""
        del self.prefilling[sequence.job.id]
        sequence.prompt_computed = sequence.prompt_progress
        sequence.output += 1
        self.lanes[sequence.seen_band].join(sequence, now_ms)

    def register(self, sequence: SimSequence) -> None:
        """Prefix blocks that have been computed whole can be found from now on."""
        blocks, held, computed = sequence.blocks, sequence.held, sequence.computed
        while held < sequence.shareable:
            block = blocks[held]
            # all blocks but the last have one size
            if held * blocks[0][1] + block[1] > computed:
                break
            self.cache.computed(block)
            sequence.own_tokens -= block[1]
            sequence.held_tokens += block[1]
            held += 1
        sequence.held = held

    def plan(self, now_ms: float) -> SimPlan:
        """The next step."""
        self._promote(now_ms)
        if not (self.waiting or self.prefilling) and self.cache.available >= self._streaming:
            return self._streams(now_ms)
        draft = _Draft(self, now_ms, self._guarded(now_ms))
        groups = self._groups()
        hurried_for = None
        for place, bands in enumerate(groups, 1):
            lanes = [self.lanes[band] for band in bands if self.lanes[band].members]
            draft.stream(lanes, bands)
            if (draft.fill(bands[-1]) or draft.full) and place < len(groups):
                hurried_for = bands[0]
                break
        if hurried_for is None:
            self._hurried_steps.clear()
        else:
            self._hurried_steps[hurried_for] = self._hurried_steps.get(hurried_for, 0) + 1
        lanes = [lane for lane in draft.lanes if lane.members]
        for lane in self.lanes:
            if lane.members and lane not in lanes:
                lane.note_step(False, now_ms)
            elif lane.idle_since_ms is not None:
                lane.note_step(True, now_ms)
        for sequence in self.prefilling.values():
            sequence.note_step(sequence.job.id in draft.chunks, now_ms)
            if sequence.idle_since_ms is not None and sequence.seen_band:
                self.promote_ms = min(self.promote_ms, sequence.promoted_ms())
        chunks = list(draft.chunks.values())
        return SimPlan(lanes, chunks, bool(chunks) or draft.preempted_any)

    def _streams(self, now_ms: float) -> SimPlan:
        """All decode, nobody else is here, and there is KV for it."""
        self._hurried_steps.clear()
        for lane in self.lanes:
            if lane.idle_since_ms is not None:
                lane.note_step(True, now_ms)
        return SimPlan([lane for lane in self.lanes if lane.members], [], False)

    def _groups(self) -> list[list[int]]:
        """Effective bands planned together, best first; only those with anybody in them."""
        if self.rules.fcfs:
            return [[0]]
        present = {s.seen_band for s in self.waiting}
        for sequence in self.prefilling.values():
            present.add(sequence.seen_band)
        for lane in self.lanes:
            if lane.members:
                present.add(lane.band)
        if not self._hurried_steps:
            return [[band] for band in sorted(present)]
        together: list[list[int]] = []
        spent = False
        for band in sorted(present):
            if spent:
                together[-1].append(band)
            else:
                together.append([band])
            # one that has used up its allowance goes together with all behind it
            spent = spent or self._hurried_steps.get(band, 0) >= HURRIED_STEPS_MAX
        return together

    def _guarded(self, now_ms: float) -> int:
        """The best band about of late: prompts of worse ones are limited."""
        if self.rules.fcfs:
            return int(Band.BATCH)
        for band, ran_ms in enumerate(self.ran_ms):
            if self._here[band] or now_ms - ran_ms < self.rules.calm_ms:
                return band
        return int(Band.BATCH)

    def _settle(self, sequence: SimSequence, now_ms: float) -> None:
        if self.rules.fcfs:
            sequence.seen_band = 0
        elif sequence.settle_band(now_ms) > 0:
            self.promote_ms = min(self.promote_ms, sequence.promoted_ms())

    def _promote(self, now_ms: float) -> None:
        """Some bands have improved by age: find everybody's place again."""
        if now_ms >= self.promote_ms:
            self.promote_ms = math.inf
            for sequence in self.waiting:
                self._settle(sequence, now_ms)
            self.waiting.sort(key=self.key)
            for sequence in self.prefilling.values():
                sequence.settle_band(now_ms)
        for lane in self._lower:
            since_ms = lane.idle_since_ms
            idle_ms = lane.idle_ms if since_ms is None else lane.idle_ms + (now_ms - since_ms)
            if idle_ms < lane.promote_idle_ms or not lane.members:
                continue
            for sequence in lane.promoted(now_ms):
                sequence.own_tokens += lane.leave(sequence, now_ms)
                sequence.settle_band(now_ms)
                self.lanes[sequence.seen_band].join(sequence, now_ms)

    def before(self, one: SimSequence, other: SimSequence) -> bool:
        """Whether `one` goes before `other`."""
        return self.key(one) < self.key(other)

    def key(self, sequence: SimSequence) -> tuple[Any, ...]:
        """Smaller goes first."""
        if self.rules.fcfs:
            return (sequence.job.arrived_ms, sequence.order)
        return sequence.rank

    def all_running(self) -> list[SimSequence]:
        found = list(self.prefilling.values())
        for lane in self.lanes:
            found.extend(lane.members.values())
        return found

    def grown(self, sequence: SimSequence) -> int:
        """KV tokens that decoding added."""
        lane = self.lane_of(sequence)
        return 0 if lane is None else lane.grown(sequence)

    def gain(self, sequence: SimSequence) -> int:
        """KV tokens that come free if `sequence` is preempted."""
        alone = self.cache.held_alone(sequence.blocks[: sequence.held])
        return sequence.own_tokens + self.grown(sequence) + alone

    def expendable(self, sequence: SimSequence) -> tuple[Any, ...]:
        """The victim score of the real scheduler: the highest goes first."""
        if self.rules.fcfs:
            return self.key(sequence)
        alone = self.cache.held_alone(sequence.blocks[: sequence.held])
        lost = max(0, sequence.computed + self.grown(sequence) - sequence.held_tokens + alone)
        return (sequence.seen_band, -sequence.preemptions, -lost, sequence.rank)

    def preempt(self, sequence: SimSequence, now_ms: float) -> None:
        self._leave(sequence, now_ms)
        sequence.preemptions += 1
        self.preemptions += 1
        self._wait(sequence, now_ms)

    def _leave(self, sequence: SimSequence, now_ms: float) -> None:
        """Out of the batch; its output so far stays known."""
        lane = self.lane_of(sequence)
        if lane is not None:
            self._give_up(sequence, lane.leave(sequence, now_ms))
        else:
            del self.prefilling[sequence.job.id]
            sequence.stay += 1
            self._give_up(sequence, 0)

    def _give_up(self, sequence: SimSequence, grown: int) -> None:
        """What `sequence` holds, `grown` tokens of it from decoding, stays only in the cache."""
        own, computed = sequence.own_tokens + grown, sequence.computed + grown
        held = sequence.blocks[: sequence.held]
        rest = (computed - sequence.held_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if held:
            self.cache.release(held, sequence.job.band)
        if rest > 0:
            # beyond the shared prefix it can be found by itself alone, but takes up room
            self._rests -= 1
            self.cache.keep(self._rests, rest, sequence.job.band)
            if sequence.held >= sequence.shareable:
                sequence.blocks = (*held, (self._rests, rest))
        self.cache.give_back(own - max(0, rest))
        sequence.prompt_computed = sequence.prompt_progress
        sequence.own_tokens = sequence.held = sequence.held_tokens = sequence.computed = 0

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        running = self.all_running()
        own = sum(s.own_tokens + self.grown(s) for s in running)
        assert own == self.cache.private, "private KV belongs to who runs"
        assert len(running) <= self.cost.max_jobs, "no more jobs than allowed"
        assert all(not s.held and not s.computed for s in self.waiting), "who waits holds nothing"
        for sequence in running:
            held = sum(size for _, size in sequence.blocks[: sequence.held])
            assert sequence.held_tokens == held, "held tokens add up"
        assert self.waiting == sorted(self.waiting, key=self.key), "who waits stands in order"
        for lane in self.lanes:
            lane.check_integrity()
        here = [0] * len(Band)
        for sequence in (*running, *self.waiting):
            here[sequence.job.band] += 1
        assert here == self._here, "everybody is counted"


class _Draft:
    """The plan in the making. Of prompts of bands worse than `guarded`, `lower_left` tokens fit."""

    def __init__(self, scheduler: SimScheduler, now_ms: float, guarded: int) -> None:
        self._s = scheduler
        self._now_ms = now_ms
        self._guarded = guarded
        self._budget = scheduler.cost.step_tokens
        self._lower_left = scheduler.pace.tokens_within(scheduler.rules.lower_prefill_ms)
        self._beside_left = TOKENS_UNLIMITED
        self._blocked = False
        self._preempted: dict[str, SimSequence] = {}
        self.lanes: list[Lane] = []
        self.chunks: dict[str, Chunk] = {}

    @property
    def full(self) -> bool:
        return self._budget <= 0

    @property
    def preempted_any(self) -> bool:
        return bool(self._preempted)

    @property
    def _rows(self) -> int:
        rows = 0
        for lane in self.lanes:
            rows += len(lane.members)
        return rows

    def stream(self, lanes: list[Lane], bands: list[int]) -> None:
        """A token for each member of `lanes`, and whoever of these bands lacks hardly more.

        The most expendable give way while KV is short.
        """
        self.lanes.extend(lanes)
        scheduler = self._s
        while scheduler.cache.available < self._rows:
            victim = max(scheduler.all_running(), key=scheduler.expendable)
            self._drop(victim)
        for lane in lanes:
            self._budget -= len(lane.members)
        if not scheduler.prefilling:
            return
        started = [s for s in scheduler.prefilling.values() if s.seen_band in bands]
        short = [s for s in started if not s.lacks_prompt and s.job.id not in self.chunks]
        for sequence in sorted(short, key=lambda s: (s.pending > 1, scheduler.key(s))):
            if self._budget > 0:
                self._compute(sequence)

    def fill(self, worst_band: int) -> bool:
        """Chunks of the prompts of bands up to `worst_band` that have none; whether any."""
        scheduler, planned = self._s, len(self.chunks)
        first = scheduler.waiting[0] if scheduler.waiting and not self._blocked else None
        if not scheduler.prefilling and (first is None or first.seen_band > worst_band):
            return False
        here = min(scheduler.cost.max_jobs, scheduler.running + len(scheduler.waiting))
        self._beside_left = scheduler.pace.tokens_beside(self._rows + planned, here)
        started = [s for s in scheduler.prefilling.values() if s.seen_band <= worst_band]
        started = [s for s in started if s.job.id not in self.chunks]
        started.sort(key=scheduler.key, reverse=True)
        place = 0
        while self._budget > 0:
            first = None
            if not self._blocked and place < len(scheduler.waiting):
                first = scheduler.waiting[place]
                if first.seen_band > worst_band:
                    first = None
            if started and (first is None or scheduler.before(started[-1], first)):
                sequence = started.pop()
                if sequence.job.id in scheduler.prefilling and self._room(sequence):
                    self._compute(sequence)
            elif first is None:
                break
            elif not self._room(first) or self._awaits_prefix(first):
                place += 1
            else:
                # one preempted a moment ago waits for the next step
                self._blocked = first.job.id in self._preempted or not self._admit(first, place)
        return len(self.chunks) > planned

    def _room(self, sequence: SimSequence) -> int:
        """How many of its tokens this step may compute."""
        if not sequence.lacks_prompt:
            return self._budget
        room = min(self._budget, self._beside_left)
        return min(room, self._lower_left) if sequence.job.band > self._guarded else room

    def _compute(self, sequence: SimSequence) -> None:
        lacks_prompt = sequence.lacks_prompt
        limited = lacks_prompt and sequence.job.band > self._guarded
        count = room = self._budget
        if lacks_prompt:
            count = min(room, self._beside_left, self._lower_left if limited else room)
        count = min(sequence.pending, count)
        self.chunks[sequence.job.id] = Chunk(sequence, count, sequence.stay)
        self._budget -= count
        if lacks_prompt:
            self._beside_left -= count
        if limited:
            self._lower_left -= count

    def _awaits_prefix(self, sequence: SimSequence) -> bool:
        """Whether somebody of no lower band computes what `sequence` would compute first."""
        scheduler = self._s
        if not scheduler.prefilling or not sequence.blocks or scheduler.rules.fcfs:
            return False
        index, _, _ = scheduler.cache.match(sequence.blocks)
        if index >= len(sequence.blocks):
            return False
        block = sequence.blocks[index]
        return any(
            s.seen_band <= sequence.seen_band
            and s.held <= index < len(s.blocks)
            and s.blocks[index] == block
            for s in scheduler.prefilling.values()
        )

    def _admit(self, sequence: SimSequence, place: int) -> bool:
        """Starts a waiting sequence if it fits, at the cost of lower bands where that helps."""
        scheduler = self._s
        count, tokens, idle = scheduler.cache.match(sequence.blocks)
        found = sequence.blocks[:count]
        lacking = self._lacking(sequence, tokens, idle)
        if not self._make_room(sequence, found, tokens, lacking):
            return False
        del scheduler.waiting[place]
        scheduler.cache.hold(found)
        sequence.held, sequence.held_tokens = count, tokens
        # the last token is computed in any case: its row gives the next one
        most = (sequence.known - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        sequence.computed = min(max(tokens, sequence.brought), most)
        sequence.brought = 0
        sequence.own_tokens = max(0, round_up(sequence.known) - tokens)
        scheduler.cache.reserve(sequence.own_tokens)
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        scheduler.prefilling[sequence.job.id] = sequence
        self._compute(sequence)
        return True

    def _lacking(self, sequence: SimSequence, tokens: int, idle: int) -> int:
        """KV tokens that `sequence` lacks which finds `tokens` in the cache, `idle` of them so."""
        # decoding rows of this step have their token of KV as good as taken
        spare = self._s.cache.available - idle - self._rows
        return round_up(sequence.known) - tokens - spare

    def _make_room(
        self, sequence: SimSequence, found: tuple[PrefixBlock, ...], tokens: int, lacking: int
    ) -> bool:
        """Whether `sequence` fits, after preempting lower bands if they must."""
        scheduler = self._s
        if lacking <= 0 and scheduler.running < scheduler.cost.max_jobs:
            return True
        if scheduler.rules.fcfs:
            return False
        lower = [s for s in scheduler.all_running() if s.seen_band > sequence.seen_band]
        if not lower or sum(map(scheduler.gain, lower)) < lacking:
            return False
        for victim in sorted(lower, key=scheduler.expendable, reverse=True):
            self._drop(victim)
            if self._lacking(sequence, tokens, scheduler.cache.match(found)[2]) <= 0:
                return True
        return False

    def _drop(self, victim: SimSequence) -> None:
        chunk = self.chunks.pop(victim.job.id, None)
        lane = self._s.lane_of(victim)
        if chunk:
            self._budget += chunk.count
        elif lane in self.lanes:
            self._budget += 1
        self._s.preempt(victim, self._now_ms)
        self._preempted[victim.job.id] = victim
