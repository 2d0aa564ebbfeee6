"""The simulated worker: the same as stepping one by one, and as the real scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.scheduler import Rules
from headrace_sim.segment import Segment
from headrace_sim.worker import SimWorker
from simulation.builders import ROOMY, SMALL, arrivals, sequence, serve
from simulation.real_worker import serve_really

TIGHT = replace(SMALL, kv_tokens=2_048)
ONE_BAND = (Band.STANDARD,)


@pytest.mark.parametrize("bands", [tuple(Band), ONE_BAND], ids=["bands", "one"])
@pytest.mark.parametrize("cost", [ROOMY, SMALL, TIGHT], ids=lambda c: str(c.kv_tokens))
def test_many_steps_in_one_event_are_the_same_as_one_by_one(cost, bands) -> None:
    """Preemption, prefixes, chunks and arrivals in the middle of a segment change nothing."""
    for seed in range(4):
        load = arrivals(seed, bands=bands)
        quick = serve(SimWorker("quick", cost), load)
        slow = serve(SimWorker("slow", cost, multi_step=False), load)
        assert quick.keys() == slow.keys() == {arrival.id for arrival in load}
        for id, end in slow.items():
            assert quick[id].at_ms == pytest.approx(end.at_ms, abs=1e-6), (seed, id)
            assert quick[id][1:] == end[1:], (seed, id)


def test_arrival_order_and_the_newest_victim_are_bulked_as_well() -> None:
    load = arrivals(5, bands=ONE_BAND)
    quick = serve(SimWorker("quick", TIGHT, Rules(fcfs=True)), load)
    slow = serve(SimWorker("slow", TIGHT, Rules(fcfs=True), multi_step=False), load)
    assert sum(end.preemptions for end in slow.values()) > 0, "the story needs preemptions"
    for id, end in slow.items():
        assert quick[id].at_ms == pytest.approx(end.at_ms, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_with_enough_kv_it_does_step_by_step_what_the_real_scheduler_does(seed: int) -> None:
    """Same finish times to a nanosecond: order, chunks, prefixes that are waited for."""
    load = arrivals(seed, bands=ONE_BAND)
    ours, real = serve(SimWorker("w", ROOMY), load), serve_really(ROOMY, load)
    assert sum(end.cached for end in real.values()) > 1_000, "the story needs shared prefixes"
    for id, end in real.items():
        assert ours[id].at_ms == pytest.approx(end.at_ms, abs=1e-6), id
        assert ours[id].cached == end.cached


@pytest.mark.parametrize("cost", [ROOMY, SMALL, TIGHT], ids=lambda c: str(c.kv_tokens))
def test_with_bands_and_little_kv_it_stays_close_to_the_real_scheduler(cost) -> None:
    """What differs is how blocks of 16 tokens round, and which part of a prompt is found again."""
    bands = ONE_BAND if cost is TIGHT else tuple(Band)
    for seed in (0, 1, 2, 3, 4, 6):
        load = arrivals(seed, bands=bands)
        ours, real = serve(SimWorker("w", cost), load), serve_really(cost, load)
        assert sum(end.preemptions for end in real.values()) > 1, "the story needs preemptions"
        means = [sum(end.at_ms for end in ends.values()) / len(load) for ends in (ours, real)]
        assert means[0] == pytest.approx(means[1], rel=0.06), seed
        spans = [max(end.at_ms for end in ends.values()) for ends in (ours, real)]
        assert spans[0] == pytest.approx(spans[1], rel=0.06), seed


def test_when_all_is_done_nothing_is_held() -> None:
    worker = SimWorker("w", TIGHT)
    serve(worker, arrivals(3))
    scheduler = worker.scheduler
    assert (scheduler.running, len(scheduler.waiting)) == (0, 0)
    assert (scheduler.cache.private, scheduler.cache.shared) == (0, 0)
    assert scheduler.cache.available == TIGHT.kv_tokens


def test_a_lone_job_takes_exactly_the_time_of_its_steps() -> None:
    """300 tokens in chunks of 256, then one step for each token after the first."""
    worker = SimWorker("w", SMALL)
    worker.add(sequence("j", 300, 4), 10.0)
    ends = []
    while worker.next_ms < float("inf"):
        now = worker.next_ms
        ends += [now for _ in worker.advance(now).finished]
    expected = 10.0
    expected += SMALL.step_duration_ms(256, 0, 0, 256 * 257 / 2)
    expected += SMALL.step_duration_ms(44, 0, 0, 44 * 256 + 44 * 45 / 2)
    expected += sum(SMALL.step_duration_ms(0, 1, 300 + made, 0) for made in (1, 2, 3))
    assert ends == [pytest.approx(expected)]
    assert worker.busy_ms == pytest.approx(expected - 10.0)
    assert (worker.prefill_tokens, worker.output_tokens) == (300, 4)


def test_a_better_band_takes_the_place_of_a_worse_one() -> None:
    """Eight batch jobs hold all places; an interactive one starts with the next step."""
    worker = SimWorker("w", ROOMY)
    for n in range(ROOMY.max_jobs):
        worker.add(sequence(f"b{n}", 16, 1_000, band=Band.BATCH), 0.0)
    for _ in range(2):
        worker.advance(worker.next_ms)
    urgent = sequence("i", 16, 2, band=Band.INTERACTIVE, arrived_ms=400)
    worker.add(urgent, 400.0)
    for _ in range(2):
        worker.advance(worker.next_ms)
    assert 400 < urgent.first_ms < 430
    assert worker.scheduler.preemptions == 1
    worker.check_integrity()


def test_a_dropped_job_leaves_nothing_behind() -> None:
    """Wherever it stands: waiting, at its prompt, decoding."""
    worker = SimWorker("w", SMALL)
    jobs = [sequence(f"j{n}", 700, 500) for n in range(9)]
    for each in jobs:
        worker.add(each, 0.0)
    assert worker.drop(jobs[8], 1.0), "it waited"
    assert not worker.drop(jobs[0], 1.0), "it ends with the step under way"
    assert worker.advance(worker.next_ms).dropped == [jobs[0]]
    for _ in range(12):
        worker.advance(worker.next_ms)
    assert not worker.drop(jobs[1], worker.next_ms - 1e-3)
    assert worker.advance(worker.next_ms).dropped == [jobs[1]]
    worker.check_integrity()
    left = []
    while worker.next_ms < float("inf"):
        left += worker.advance(worker.next_ms).finished
    assert {each.job.id for each in left} == {f"j{n}" for n in range(2, 8)}
    assert worker.scheduler.cache.private == 0


def test_reports_say_how_far_everybody_is_in_the_middle_of_a_segment() -> None:
    worker = SimWorker("w", ROOMY)
    prompt = sequence("j", 80, 100, ((1, 64),))
    worker.add(prompt, 0.0)
    worker.advance(worker.next_ms)

    def keys(blocks: Iterable[PrefixBlock]) -> bytes:
        return bytes(sum(tokens for _, tokens in blocks) // 2)

    report = worker.report(worker.next_ms - 1.0, keys)
    assert report is not None
    [told] = report.jobs
    assert (told.computed, told.cached) == (80, 0)
    assert 90 < told.output < 100
    assert (report.sequence, report.prefill_tokens) == (1, 80)
    assert report.output_tokens == told.output
    assert len(report.stored) == 32
    assert worker.report(worker.next_ms - 1.0, keys) is None


@given(
    start=st.floats(0, 1e6),
    first=st.floats(0.1, 100),
    growth=st.floats(0, 0.5),
    steps=st.integers(1, 2_000),
    part=st.floats(0, 1.2),
)
def test_a_segments_steps_are_counted_as_if_one_by_one(start, first, growth, steps, part) -> None:
    segment = Segment(start, steps, first, growth, 1, [])
    now = start + part * segment.elapsed_ms(steps)
    ended = segment.steps_ended(now)
    assert ended == steps or start + segment.elapsed_ms(ended + 1) > now
    assert ended == 0 or start + segment.elapsed_ms(ended) <= now
    needed = segment.steps_until(now)
    assert start + segment.elapsed_ms(needed) >= now
    assert needed == 1 or start + segment.elapsed_ms(needed - 1) < now
