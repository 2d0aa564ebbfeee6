"""What is on the workers: the peak of their KV, room by band, charges, speeds, what was given."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import (
    BLOCK_TOKENS,
    Band,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    Progress,
    Sampling,
    pack_tokens,
)
from headrace_gateway.policy.bookings import ALL, NO_TURN, SHARED_BLOCKS
from headrace_gateway.policy.given import Given
from headrace_gateway.policy.peak import PeakProfile, peak_tokens
from headrace_gateway.policy.speeds import Speeds, slowness
from headrace_gateway.policy.workload import Demand, Room, WorkerFacts, Workload

NOW = 1_700_000_000_000
PRESSING = NOW + 2_500
"""Half of the time of a standard job that came at NOW is over."""


def twice(tenant: str, *, max_tokens: int, longer_than: int) -> int:
    """An output is expected to get twice as long as it is."""
    return min(max_tokens, 2 * longer_than + 1)


def a_job(
    name: str,
    *,
    band: Band = Band.STANDARD,
    prompt: int = 100,
    output: int = 50,
    logged: int = 0,
    attempt: int = 1,
    blocks: bytes = b"",
) -> Job:
    return Job(
        id=name,
        model="m",
        tenant="t",
        band=band,
        arrived_ms=NOW,
        gateway="g",
        prompt=pack_tokens([0] * prompt),
        sampling=Sampling(max_tokens=1_000),
        expected_tokens=output,
        logged=pack_tokens([0] * logged),
        attempt=attempt,
        blocks=blocks,
    )


def fleet(count: int = 1, kv_tokens: int = 1_000, max_jobs: int = 4) -> Workload:
    workload = Workload(twice)
    workload.set_workers([WorkerFacts(f"w{i}", kv_tokens, max_jobs) for i in range(count)])
    return workload


def report(worker: str, *jobs: JobProgress, busy_ms: int = 0) -> Progress:
    return Progress(worker, 1, jobs, busy_ms=busy_ms)


def done(worker: str, progress: JobProgress) -> JobDone:
    return JobDone(worker, progress, FinishReason.STOP)


def grown_peak(jobs: list[tuple[int, int]]) -> int:
    """The peak by letting every job grow a token a step until it ends."""
    peak = 0
    for step in range(1 + max((remaining for _, remaining in jobs), default=0)):
        peak = max(peak, sum(held + step for held, remaining in jobs if remaining >= step))
    return peak


jobs_sizes = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), max_size=12)


@given(jobs_sizes)
def test_the_peak_is_that_of_outputs_that_grow(jobs: list[tuple[int, int]]) -> None:
    assert peak_tokens(jobs) == grown_peak(jobs)


@given(jobs_sizes, st.integers(0, 60), st.integers(1, 40))
def test_a_profile_knows_the_peak_with_one_more(
    jobs: list[tuple[int, int]], held: int, remaining: int
) -> None:
    profile = PeakProfile(sorted(jobs, key=lambda job: -job[1]))
    assert profile.peak == peak_tokens(jobs)
    assert profile.peak_with(held, remaining) == peak_tokens([*jobs, (held, remaining)])


def test_jobs_that_end_at_different_times_need_less_than_the_sum() -> None:
    """Past-Future's point: 3 jobs of 300 + 100 fit into 1,000 when they do not end together."""
    jobs = [(300, 100), (300, 10), (300, 1)]
    assert peak_tokens(jobs) < 950 < sum(held + remaining for held, remaining in jobs)
    workload = fleet(kv_tokens=1_000)
    for index, (held, remaining) in enumerate(jobs):
        job = a_job(f"j{index}", prompt=held, output=remaining)
        assert workload.room("w0", job, NOW).room is Room.FREE
        workload.book("w0", job, held, NOW)
    assert (
        workload.room("w0", a_job("j3", prompt=60, output=10), NOW).reason
        == "its KV would overflow"
    )


def test_an_idle_worker_takes_a_job_larger_than_its_share() -> None:
    workload = fleet(kv_tokens=100)
    huge = a_job("huge", prompt=5_000)
    assert workload.room("w0", huge, NOW).room is Room.FREE
    workload.book("w0", huge, 5_000, NOW)
    assert workload.room("w0", a_job("tiny", prompt=1, output=1), NOW).room is Room.NONE
    # to a better band it is as good as idle
    urgent = a_job("urgent", band=Band.INTERACTIVE, prompt=5_000)
    assert workload.room("w0", urgent, NOW).room is Room.PREEMPTING


def test_lower_bands_give_way_but_only_to_better_ones() -> None:
    workload = fleet(max_jobs=2)
    for name in ("b0", "b1"):
        workload.book("w0", a_job(name, band=Band.BATCH), 100, NOW)
    assert workload.room("w0", a_job("b2", band=Band.BATCH), NOW).room is Room.NONE
    for name in ("s0", "s1"):
        assert workload.room("w0", a_job(name), NOW).room is Room.NONE, "it can wait"
        verdict = workload.room("w0", a_job(name), PRESSING)
        assert (verdict.room, verdict.reason) == (Room.PREEMPTING, "lower bands give way")
        workload.book("w0", a_job(name), 100, NOW)
    assert workload.room("w0", a_job("s2"), NOW).reason == "has as many jobs as it takes"
    # the interactive band would find room, but twice as many jobs as run are enough
    urgent = a_job("i0", band=Band.INTERACTIVE)
    assert workload.room("w0", urgent, NOW).room is Room.NONE
    workload.cancel("w0", "b1")
    assert workload.room("w0", urgent, NOW).room is Room.PREEMPTING


def test_a_prefix_that_running_jobs_share_counts_once() -> None:
    prefix = b"".join(bytes([i]) * 8 for i in range(SHARED_BLOCKS))
    tokens = SHARED_BLOCKS * BLOCK_TOKENS
    shared, alone = fleet(kv_tokens=4 * tokens), fleet(kv_tokens=4 * tokens)
    for index in range(3):
        shared.book("w0", a_job(f"j{index}", prompt=tokens, blocks=prefix), 1, NOW)
        alone.book("w0", a_job(f"j{index}", prompt=tokens), 1, NOW)
    more = a_job("more", prompt=tokens)
    assert alone.room("w0", more, NOW).room is Room.NONE
    assert shared.room("w0", more, NOW).room is Room.FREE
    shared.cancel("w0", "j0")
    shared.check_integrity()


def test_a_job_that_outruns_its_prediction_is_predicted_anew() -> None:
    workload = fleet(kv_tokens=1_000)
    workload.book("w0", a_job("long", prompt=100, output=50), 100, NOW)
    assert workload.reserved_tokens("w0") == 150
    workload.progress(report("w0", JobProgress("long", 100, 0, 50)))
    assert workload.reserved_tokens("w0") == 100 + 101
    workload.progress(report("w0", JobProgress("long", 100, 0, 999)))
    assert workload.reserved_tokens("w0") == 100 + 1_000
    workload.check_integrity()


def test_tenants_pay_for_output_as_it_comes_and_for_input_as_it_was() -> None:
    """A better hit than assumed gives back; who leaves before the prefill pays nothing."""
    workload = fleet(kv_tokens=10_000)
    workload.book("w0", a_job("hit"), 100, NOW)
    workload.book("w0", a_job("left"), 100, NOW)
    workload.book("w0", a_job("half"), 100, NOW)
    (charge,) = workload.progress(report("w0", JobProgress("hit", 20, 80, 3)))
    assert (charge.job, charge.input_tokens, charge.output_tokens) == ("hit", -80, 3)
    (charge,) = workload.progress(report("w0", JobProgress("hit", 20, 80, 10)))
    assert (charge.input_tokens, charge.output_tokens) == (0, 7)
    last = workload.done(done("w0", JobProgress("hit", 20, 80, 12)))
    assert last is not None and (last.input_tokens, last.output_tokens) == (0, 2)
    last = workload.done(done("w0", JobProgress("left", 0, 0, 0)))
    assert last is not None and last.input_tokens == -100
    assert workload.progress(report("w0", JobProgress("half", 40, 0, 0))) == []
    last = workload.done(done("w0", JobProgress("half", 40, 0, 0)))
    assert last is not None and last.input_tokens == -60
    assert workload.done(done("w0", JobProgress("half", 40, 0, 0))) is None
    assert workload.load("w0") == 0


def test_what_an_earlier_leader_or_attempt_charged_is_not_charged_again() -> None:
    workload = fleet(kv_tokens=10_000)
    workload.book("w0", a_job("found"), 100, NOW, found=True)
    assert workload.progress(report("w0", JobProgress("found", 100, 0, 30))) == []
    (charge,) = workload.progress(report("w0", JobProgress("found", 100, 0, 31)))
    assert (charge.input_tokens, charge.output_tokens) == (0, 1)
    workload.book("w0", a_job("again", logged=20, attempt=2), 120, NOW)
    (charge,) = workload.progress(report("w0", JobProgress("again", 40, 80, 21)))
    assert (charge.input_tokens, charge.output_tokens) == (0, 1)


def test_prefill_that_is_done_is_no_load_any_more() -> None:
    workload = fleet(2, kv_tokens=100_000)
    workload.book("w0", a_job("j", prompt=1_000), 800, NOW)
    assert workload.load("w0") == 800 + 50
    assert workload.least_loaded(1) == ["w1"]
    workload.progress(report("w0", JobProgress("j", 300, 200, 0)))
    assert workload.load("w0") == 500 + 50
    workload.progress(report("w0", JobProgress("j", 800, 200, 1)))
    assert workload.load("w0") == 50
    workload.book("w0", a_job("k", prompt=1_000), 1_000, NOW)
    urgent, other = map(workload.bookings["w0"].standing, (Band.INTERACTIVE, Band.BATCH))
    assert urgent[1:] == other[1:] == (2, 0.0), "its jobs, and a speed that is not known yet"
    assert other[0] - urgent[0] == 1_000, "others' prefill waits for it"


def test_a_worker_that_drains_keeps_its_jobs_until_the_last_is_done() -> None:
    workload = fleet(2)
    workload.book("w0", a_job("j"), 100, NOW)
    workload.set_workers([WorkerFacts("w1", 1_000, 4)])
    assert workload.open_workers == ("w1",)
    assert workload.room("w0", a_job("k"), NOW).reason == "takes no jobs"
    workload.check_integrity()
    assert workload.done(done("w0", JobProgress("j", 100, 0, 5))) is not None
    assert list(workload.workers) == ["w1"]
    workload.forget("w1")
    workload.check_integrity()
    assert workload.open_workers == ()


program = st.lists(
    st.tuples(
        st.sampled_from(["book", "progress", "done", "cancel", "forget", "set", "ask"]),
        st.integers(0, 3),
        st.integers(0, 20),
        st.sampled_from(Band),
        st.integers(1, 300),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(program)
def test_sums_hold_and_room_is_found_whatever_happens(
    steps: list[tuple[str, int, int, Band, int]],
) -> None:
    """After every step all sums add up, and `find` finds a worker exactly if one has room."""
    facts = [WorkerFacts(f"w{i}", 400 + 200 * i, 2 + i) for i in range(4)]
    workload = Workload(twice)
    workload.set_workers(facts)
    for action, at, number, band, size in steps:
        worker, name = f"w{at}", f"j{number}"
        told = JobProgress(name, size // 2, size // 3, size)
        match action:
            case "book":
                workload.book(worker, a_job(name, band=band, prompt=size, output=number), size, NOW)
            case "progress":
                workload.progress(report(worker, told, busy_ms=size))
            case "done":
                workload.done(done(worker, told))
            case "cancel":
                workload.cancel(worker, name)
            case "forget":
                workload.forget(worker)
            case "set":
                workload.set_workers(facts[: at + 1])
        workload.check_integrity()
        new = a_job("new", band=band, prompt=size, output=number + 1)
        asked = workload.demand(new, NOW + 1_000 * at)
        rooms = [workload.room_for(each, asked).room for each in workload.open_workers]
        free = workload.find(asked, ALL, lambda _: True)
        some = workload.find(asked, asked.level, lambda _: True)
        assert (free is not None) == (Room.FREE in rooms)
        assert (some is not None) == any(room is not Room.NONE for room in rooms)
        if workload.is_hopeless(asked):
            assert some is None
        workload.check_integrity()
        allowed = {w for w in workload.open_workers if w != worker}
        fitting = {w for w in allowed if workload.room_for(w, asked).room is Room.FREE}
        known = workload.free_ones(asked, allowed.__contains__)
        assert known is None or set(known) == fitting, "all of them, where they are known"
        found = workload.find(asked, ALL, allowed.__contains__)
        assert found in fitting or (found is None and not fitting)
        workload.check_integrity()


def test_who_may_not_be_asked_is_asked_again_later() -> None:
    workload = fleet(2)
    demand = Demand(Band.STANDARD, 10, 10, 1)
    assert workload.find(demand, ALL, lambda _: False) is None
    assert not workload.is_hopeless(demand)
    assert workload.find(demand, ALL, lambda worker: worker == "w1") == "w1"


def test_a_full_fleet_is_asked_only_where_something_has_changed() -> None:
    """A size that was refused everywhere, and what is as large, is asked of those that changed;
    where slots are what is missing, that holds for every size."""
    workload = fleet(20, kv_tokens=1_000, max_jobs=2)
    for number in range(20):
        workload.book(f"w{number}", a_job(f"j{number}", prompt=500), 500, NOW)
    large, long = Demand(ALL, 700, 10, ALL), Demand(ALL, 10, 945, ALL)
    asked: list[str] = []

    def asking(worker: str) -> bool:
        asked.append(worker)
        return True

    assert workload.free_ones(large, asking) is None, "nothing is known yet"
    assert workload.find(large, ALL, asking) is workload.find(long, ALL, asking) is None
    assert workload.free_ones(large, asking) == workload.free_ones(long, asking) == []
    assert workload.free_ones(Demand(ALL, 10, 10, ALL), asking) is None, "it is smaller"
    workload.cancel("w7", "j7")
    workload.cancel("w3", "j3")
    assert set(workload.free_ones(large, asking) or ()) == {"w3", "w7"} == set(asked)
    for number in range(40):
        workload.book(f"w{number % 20}", a_job(f"k{number}", prompt=1), 1, NOW)
    assert workload.find(Demand(ALL, 10, 10, ALL), ALL, asking) is None
    assert workload.is_hopeless(Demand(ALL, 1, 1, ALL)), "there is no slot for anything"
    workload.check_integrity()


def test_a_report_of_output_alone_is_taken_in_as_any_other() -> None:
    """Jobs that only decode are followed in one loop: sums and charges are those of the others."""
    workload = fleet(kv_tokens=100_000, max_jobs=8)
    workload.book("w0", a_job("j", prompt=100, output=20), 100, NOW)
    workload.progress(report("w0", JobProgress("j", 100, 0, 1)))
    for output, made in ((5, 4), (5, 0), (19, 14), (20, 1), (30, 10), (29, 0)):
        charges = workload.progress(report("w0", JobProgress("j", 100, 0, output)))
        assert sum(charge.output_tokens for charge in charges) == made
        assert all(charge.input_tokens == 0 for charge in charges)
        workload.check_integrity()
    (charge,) = workload.progress(report("w0", JobProgress("j", 60, 40, 31)))
    assert charge.input_tokens == -40, "it had been cached after all"
    assert workload.done(done("w0", JobProgress("j", 60, 40, 32))) is not None
    workload.check_integrity()


def test_speeds_of_prompts_and_outputs_are_told_apart() -> None:
    """Steps of 2 ms a prompt token and 20 ms an output token, mixed: 500 prompt tokens a second."""
    rnd, speeds = random.Random(7), Speeds()
    assert speeds.prefill_per_s == 0
    for _ in range(100):
        prefill, output = rnd.randrange(200), rnd.randrange(20)
        speeds.note(2 * prefill + 20 * output, prefill, output)
    assert speeds.prefill_per_s == pytest.approx(500, rel=0.01)
    assert slowness(speeds.prefill_per_s, 550) == 1.0, "as good as equal"
    assert slowness(speeds.prefill_per_s, 1_000) == pytest.approx(2, rel=0.01)
    only = Speeds()
    for _ in range(10):
        only.note(100, 50, 0)
    assert only.prefill_per_s == pytest.approx(500)


def test_what_was_given_fades_but_its_order_does_not() -> None:
    given_lately = Given(half_life_ms=1_000)
    given_lately.set_workers(["a", "b", "c"])
    given_lately.add("a", 100, 0)
    given_lately.add("b", 60, 1_000)
    unit = given_lately.unit(1_000)
    assert given_lately.sums["a"] / unit == pytest.approx(50)
    assert given_lately.total / unit == pytest.approx(110)
    assert given_lately.least() == "c"
    given_lately.add("c", 1, 200_000)
    assert given_lately.least() == "a", "both are next to nothing, and still in order"
    given_lately.check_integrity()
    given_lately.set_workers(["b", "c", "d"])
    assert given_lately.least() == "d"
    given_lately.add("gone", 5, 200_000)
    given_lately.check_integrity()


def test_prompts_wait_in_the_queue_and_not_on_a_worker() -> None:
    """Two seconds of computing are enough for a worker; better bands do not count lower ones."""
    workload = fleet(kv_tokens=1_000_000, max_jobs=64)
    for number in range(1, 4):
        workload.progress(Progress("w0", number, busy_ms=1_000, prefill_tokens=500))
    batch = a_job("b", prompt=900, band=Band.BATCH)
    workload.book("w0", batch, 900, NOW)
    second = a_job("c", prompt=200, band=Band.BATCH)
    assert workload.room("w0", second, NOW).room is Room.FREE
    workload.book("w0", second, 200, NOW)
    third = a_job("d", prompt=1, band=Band.BATCH)
    assert workload.room("w0", third, NOW) == NO_TURN
    assert (
        workload.room("w0", a_job("i", prompt=1, band=Band.INTERACTIVE), NOW).room
        is Room.PREEMPTING
    )
    news = (JobProgress("b", 600, 0, 0),)
    workload.progress(Progress("w0", 4, news, busy_ms=1_000, prefill_tokens=600))
    assert workload.room("w0", third, NOW).room is Room.FREE
    workload.check_integrity()
