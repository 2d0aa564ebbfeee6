"""A simulated worker: its scheduler's steps in time, a handful of events per request.

Invariant: between two changes of the batch nothing can be decided, so all those decode steps are
one Segment, and what comes out is the same as stepping one by one (tests/simulation holds it
against doing that, and against the real scheduler). A job that arrives in the middle cuts the
segment at the end of the step under way, as the real engine looks at arrivals between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from headrace.policy.cost_model import CONTEXT_UNIT_TOKENS, CostModel, attended
from headrace.types import JobProgress, Progress
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.lane import Lane
from headrace_sim.metrics import Served
from headrace_sim.plan import Chunk
from headrace_sim.scheduler import Rules, SimScheduler
from headrace_sim.segment import Segment
from headrace_sim.sequence import SimSequence
from headrace_worker.policy.pace import STREAM_STEPS

OnGaps = Callable[[Sequence[int], float, int], None]
"""Told of (rows per Band, gap between two tokens of each in ms, how many steps alike)."""
OnServed = Callable[[float, list[Served]], None]
"""Told, at now in ms, of what was served, as reports tell of it."""
BlockKeys = Callable[[Iterable[PrefixBlock]], bytes]
"""The service's names for prefix blocks."""
_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


def _unheard(*_: object) -> None:
    """Nobody asked."""


class StreamTimes(dict[int, tuple[float, float]]):
    """By rows, as the cost model says it: what a step of streams alone takes without their context,
    and by how much longer each is than the one before. Workers of one model share it."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def __missing__(self, rows: int) -> tuple[float, float]:
        duration_ms = self._cost.step_duration_ms
        growth_ms = duration_ms(0, 0, rows, 0) - duration_ms(0, 0, 0, 0)
        found = self[rows] = duration_ms(0, rows, 0, 0), growth_ms
        return found


class Advance(NamedTuple):
    """What a stretch of steps brought: complete outputs, those dropped, and those that move on."""

    finished: list[SimSequence]
    dropped: list[SimSequence]
    handed: list[SimSequence]


class SimWorker:
    """One worker. Times are milliseconds of the simulation.

    `multi_step` False makes every step an event: slow, for comparison.
    """

    __slots__ = (
        "_leaving",
        "_multi_step",
        "_on_gaps",
        "_on_served",
        "_orders",
        "_report_sequence",
        "_reported",
        "_segment",
        "_times",
        "busy_ms",
        "cost",
        "is_reporting",
        "name",
        "next_ms",
        "output_tokens",
        "prefill_tokens",
        "scheduler",
        "steps",
    )

    def __init__(
        self,
        name: str,
        cost: CostModel,
        rules: Rules | None = None,
        *,
        on_gaps: OnGaps = _unheard,
        on_served: OnServed = _unheard,
        times: StreamTimes | None = None,
        reports: bool = True,
        multi_step: bool = True,
    ) -> None:
        self.name = name
        self.cost = cost
        self.scheduler = SimScheduler(cost, rules or Rules(), reports=reports)
        self.next_ms = math.inf
        """When `advance` is due; infinite while it is idle."""
        self.steps = 0
        self.busy_ms = 0.0
        self.prefill_tokens = 0
        self.output_tokens = 0
        self.is_reporting = False
        """For who asks for its reports."""
        self._on_gaps = on_gaps
        self._on_served = on_served
        self._multi_step = multi_step
        self._segment: Segment | None = None
        self._leaving: list[SimSequence] = []
        self._orders = 0
        self._report_sequence = 0
        self._reported = (0.0, 0, 0)
        self._times = times or StreamTimes(cost)

    def add(self, sequence: SimSequence, now_ms: float) -> None:
        """A job arrived; the next step takes it into account."""
        self._orders += 1
        sequence.order = self._orders
        self.scheduler.add(sequence, now_ms)
        if self._segment is None:
            self._plan(now_ms)
        else:
            self._cut(now_ms)

    def drop(self, sequence: SimSequence, now_ms: float) -> bool:
        """Ends `sequence`; True if that was at once, else `advance` tells when."""
        if sequence in self.scheduler.waiting:
            self.scheduler.remove(sequence, now_ms)
            return True
        self._leaving.append(sequence)
        self._cut(now_ms)
        return False

    def advance(self, now_ms: float) -> Advance:
        """The steps under way are done: take in what they brought and plan what follows."""
        segment = self._segment
        assert segment is not None, "only a busy worker advances"
        self._segment = None
        took_ms = segment.elapsed_ms(segment.steps)
        self.steps += segment.steps
        self.busy_ms += took_ms
        result = _tuple(Advance, ([], [], []))
        if segment.rows:
            self._take_in_rows(segment, took_ms, now_ms, result)
        if segment.chunks:
            self._take_in_chunks(segment, took_ms, now_ms, result)
        if self._leaving:
            for sequence in self._leaving:
                if sequence not in result.finished and sequence not in result.handed:
                    self.scheduler.remove(sequence, now_ms)
                    result.dropped.append(sequence)
            self._leaving.clear()
        self._plan(now_ms)
        return result

    def _take_in_rows(
        self, segment: Segment, took_ms: float, now_ms: float, result: Advance
    ) -> None:
        """A token for each row and step."""
        scheduler, steps, lanes = self.scheduler, segment.steps, segment.lanes
        if not segment.chunks:
            scheduler.pace.note_streams(segment.rows, segment.last_ms(STREAM_STEPS))
        began_ms = segment.start_ms + segment.elapsed_ms(steps - 1)
        ran_ms, complete = scheduler.ran_ms, False
        first = second = third = 0
        for lane in lanes:
            one, two, three = lane.rows
            first, second, third = first + one, second + two, third + three
            lane.steps = count = lane.steps + steps
            lane.context += steps * len(lane.members)
            complete = complete or lane.ends[0][0] <= count
        rows = (first, second, third)
        for band, some in enumerate(rows):
            if some:
                ran_ms[band] = began_ms
        self._on_gaps(rows, took_ms / steps, steps)
        tokens = segment.rows * steps
        self.output_tokens += tokens
        scheduler.cache.reserve(tokens)
        if complete:
            for lane in lanes:
                for sequence in lane.complete():
                    scheduler.finish(sequence, lane, now_ms)
                    result.finished.append(sequence)

    def _take_in_chunks(
        self, segment: Segment, took_ms: float, now_ms: float, result: Advance
    ) -> None:
        """A step with chunks is alone in its segment."""
        prompts = singles = 0
        for chunk in segment.chunks:
            self.scheduler.ran_ms[chunk.sequence.job.band] = segment.start_ms
            # as the worker does, which takes a chunk of one token for a row
            if chunk.count > 1:
                prompts += chunk.count
            else:
                singles += 1
        self.scheduler.pace.note(prompts, segment.rows + singles, took_ms)
        for chunk in segment.chunks:
            self._take_in_chunk(chunk, now_ms, result)

    def _take_in_chunk(self, chunk: Chunk, now_ms: float, result: Advance) -> None:
        sequence = chunk.sequence
        assert chunk.stay == sequence.stay, "nobody leaves in the middle of a step"
        sequence.computed += chunk.count
        self.prefill_tokens += chunk.count
        self.scheduler.register(sequence)
        if sequence.computed < sequence.known:
            return
        self.scheduler.start_decoding(sequence, now_ms)
        self.output_tokens += 1
        if sequence.first_ms < 0:
            sequence.first_ms = now_ms
        if sequence.output >= sequence.output_tokens:
            self.scheduler.remove(sequence, now_ms)
            result.finished.append(sequence)
        elif sequence.moves:
            self.scheduler.remove(sequence, now_ms)
            result.handed.append(sequence)

    def _cut(self, now_ms: float) -> None:
        """Something changed: the steps under way end with the one that `now_ms` is in."""
        segment = self._segment
        if segment is None or segment.steps == 1:
            return
        steps = segment.steps_until(now_ms)
        if steps < segment.steps:
            segment.steps = steps
            self.next_ms = segment.end_ms

    def _plan(self, now_ms: float) -> None:
        """Decide on the next step, and on how many more will be like it."""
        lanes, chunks, again = self.scheduler.plan(now_ms)
        rows = context = 0
        for lane in lanes:
            rows += len(lane.members)
            context += lane.context
        if chunks:
            tokens, pairs = 0, 0.0
            for chunk in chunks:
                tokens += chunk.count
                pairs += attended(chunk.sequence.computed, chunk.count)
            first_ms, growth_ms = self.cost.step_duration_ms(tokens, rows, context, pairs), 0.0
        elif rows:
            base_ms, growth_ms = self._times[rows]
            first_ms = base_ms + self.cost.decode_context_ms * context / CONTEXT_UNIT_TOKENS
        else:
            assert not self.scheduler.waiting, "an idle worker takes whoever waits"
            self.next_ms = math.inf
            return
        segment = Segment(now_ms, 1, first_ms, growth_ms, rows, lanes, chunks)
        if not again and self._multi_step:
            segment.steps = self._steps_alike(segment)
        self._segment = segment
        self.next_ms = segment.end_ms

    def _steps_alike(self, segment: Segment) -> int:
        """How many steps can pass before anything has to be decided."""
        scheduler = self.scheduler
        steps = scheduler.cache.available // segment.rows
        for lane in segment.lanes:
            left = lane.steps_to_end()
            if left < steps:
                steps = left
        if scheduler.waiting and scheduler.promote_ms < math.inf:
            steps = min(steps, segment.steps_until(scheduler.promote_ms))
        return max(1, steps)

    def last_progress(self, sequence: SimSequence, now_ms: float) -> JobProgress:
        """How far `sequence` was when it left."""
        computed, output, cached = sequence.prompt_progress, sequence.output, sequence.cached
        news = _news(sequence, computed, output)
        if news is not None:
            self._on_served(now_ms, [news])
        facts = (sequence.job.id, computed, cached if cached > 0 else 0, output)
        return _tuple(JobProgress, facts)

    def report(self, now_ms: float, keys: BlockKeys) -> Progress | None:
        """What it tells the dispatcher at `now_ms`; None when there is nothing to tell."""
        segment, scheduler = self._segment, self.scheduler
        busy, prefill, output = self.busy_ms, self.prefill_tokens, self.output_tokens
        done = 0
        if segment is not None and not segment.chunks:
            done = segment.steps_ended(now_ms)
            busy, output = busy + segment.elapsed_ms(done), output + segment.rows * done
        jobs: list[JobProgress] = []
        served: list[Served] = []
        for sequence in scheduler.prefilling.values():
            computed, made = sequence.prompt_progress, sequence.output
            news = _news(sequence, computed, made)
            if news is not None:
                served.append(news)
                cached = max(0, sequence.cached)
                jobs.append(JobProgress(sequence.job.id, computed, cached, made))
        for lane in scheduler.lanes:
            if lane.members:
                takes_part = segment is not None and lane in segment.lanes
                _report_lane(lane, done if takes_part else 0, jobs, served)
        if served:
            self._on_served(now_ms, served)
        gained, lost = scheduler.cache.take_news()
        before, self._reported = self._reported, (busy, prefill, output)
        if not jobs and not gained and not lost and busy == before[0]:
            return None
        self._report_sequence += 1
        return Progress(
            self.name,
            self._report_sequence,
            tuple(jobs),
            stored=keys(gained) if gained else b"",
            removed=keys(lost) if lost else b"",
            busy_ms=int(busy) - int(before[0]),
            prefill_tokens=prefill - before[1],
            output_tokens=output - before[2],
        )

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        busy = self.scheduler.running or self.scheduler.waiting
        assert self._segment or not busy, "whoever has work works"
        end_ms = self._segment.end_ms if self._segment else math.inf
        assert self.next_ms == end_ms, "it comes back when its steps end"


def _report_lane(
    lane: Lane, further_steps: int, jobs: list[JobProgress], served: list[Served]
) -> None:
    """Those in `lane` that have moved, with that many steps of the segment under way."""
    steps = lane.steps + further_steps
    for id, sequence in lane.members.items():
        output = sequence.output + steps - sequence.joined_steps
        computed = sequence.prompt_computed
        # as `_news` has it, for each of thousands of streams four times a second
        before_computed, before_output = sequence.reported
        if computed != before_computed or output != before_output:
            sequence.reported = (computed, output)
            served.append((sequence.tenant, computed - before_computed, output - before_output))
            cached = sequence.cached
            facts = (id, computed, cached if cached > 0 else 0, output)
            jobs.append(_tuple(JobProgress, facts))


def _news(sequence: SimSequence, computed: int, output: int) -> Served | None:
    """What there is to tell of `sequence`, which counts as told; None where it has not moved."""
    before_computed, before_output = sequence.reported
    if computed == before_computed and output == before_output:
        return None
    sequence.reported = (computed, output)
    return sequence.tenant, computed - before_computed, output - before_output
