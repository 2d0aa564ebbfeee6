"""Admission: who is refused first, what is told, and that the wait that is told is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.errors import DependencyError, OverloadError
from headrace.types import Band, Board, Job, Sampling, pack_tokens
from headrace_gateway.policy.admission import (
    RETRY_MS_MAX,
    RETRY_MS_MIN,
    Admission,
    AdmissionFacts,
    AdmissionLimits,
    Ask,
    ask_of,
    decide,
)

NOW_MS = 1_700_000_000_000
LIMITS = AdmissionLimits(
    queue_jobs_max=10,
    queue_work_max=5_000,
    live_jobs_max=100,
    wait_ms_max=(10_000, 60_000, 600_000),
)
WIDE = AdmissionLimits(queue_jobs_max=10**6, queue_work_max=10**12, live_jobs_max=10**6)


def a_board(**facts: object) -> Board:
    values: dict[str, object] = {
        "leader": "g",
        "published_ms": 0,
        "queued": (0, 0, 0),
        "queued_work": (0, 0, 0),
        "waits_ms": (0, 0, 0),
        "capacity_tokens": 1_000,
        "reserved_tokens": 0,
        "workers": 1,
        "work_per_s": 100.0,
        "prefill_per_s": 1_000.0,
    }
    return Board(**(values | facts))  # type: ignore[arg-type]  # a builder over all fields


def ask(band: Band = Band.STANDARD, **facts: int) -> Ask:
    return Ask(band, NOW_MS, **facts)


def verdict(band: Band, board: Board, limits: AdmissionLimits = LIMITS) -> Admission:
    return decide(ask(band), AdmissionFacts(board), limits)


@pytest.mark.parametrize("board", [None, a_board(workers=0)])
def test_without_a_worker_nobody_is_kept_waiting(board: Board | None) -> None:
    decision = decide(ask(), AdmissionFacts(board), LIMITS)
    assert (decision.status, decision.code) == (503, "no_worker")
    assert decision.retry_after_ms > 0
    assert isinstance(decision.refusal(), DependencyError)


def test_lower_bands_are_refused_first() -> None:
    """As a queue fills up: batch at 60 %, standard at 80 %, interactive when nothing is left."""
    for jobs, admitted in [
        (5, [Band.INTERACTIVE, Band.STANDARD, Band.BATCH]),
        (6, [Band.INTERACTIVE, Band.STANDARD]),
        (8, [Band.INTERACTIVE]),
        (9, [Band.INTERACTIVE]),
        (10, []),
    ]:
        by_jobs = a_board(queued=(0, jobs, 0))
        by_work = a_board(queued=(0, 1, 0), queued_work=(0, 500 * jobs, 0))
        for board in (by_jobs, by_work):
            assert [band for band in Band if verdict(band, board).admitted] == admitted, board
        refused = [
            decide(ask(b), AdmissionFacts(a_board(), live_jobs=10 * jobs), LIMITS) for b in Band
        ]
        assert [band for band in Band if refused[band].admitted] == admitted


def test_a_band_is_refused_where_its_wait_would_be_too_long() -> None:
    wide = replace(LIMITS, queue_work_max=10**9)
    board = a_board(queued_work=(0, 6_500, 0), waits_ms=(0, 65_000, 65_000))
    facts = AdmissionFacts(board)
    assert decide(ask(Band.INTERACTIVE), facts, wide).admitted
    assert decide(ask(Band.BATCH), facts, wide).admitted
    refused = decide(ask(Band.STANDARD), facts, wide)
    assert (refused.status, refused.code, refused.retry_after_ms) == (429, "queue_full", 7_500)
    assert "65000 ms" in refused.reason
    assert "standard" in refused.reason
    error = refused.refusal()
    assert isinstance(error, OverloadError)
    assert (error.status, error.code, error.retry_after_ms) == (429, "queue_full", 7_500)


def test_nobody_is_told_to_come_before_anything_can_have_changed() -> None:
    """The wait is too long by a trifle, and the next job of the band leaves in two seconds: three,
    since others come too."""
    board = a_board(
        queued=(0, 5, 0),
        queued_work=(0, 1_000, 0),
        waits_ms=(0, 60_010, 60_010),
        band_work_per_s=(0.0, 100.0, 0.0),
    )
    assert verdict(Band.STANDARD, board).retry_after_ms == 3_000


def test_a_wait_gets_shorter_job_by_job() -> None:
    """Three seconds too long, and a job leaves every ten: after one of them, half as long again."""
    wide = replace(LIMITS, queue_work_max=10**9)
    board = a_board(queued=(0, 7, 0), queued_work=(0, 7_000, 0), waits_ms=(0, 63_000, 63_000))
    assert decide(ask(), AdmissionFacts(board), wide).retry_after_ms == 15_000


def test_a_wait_that_others_make_long_ends_with_what_they_have_left() -> None:
    """Batch moves at its share while others come; if they stop, it has the whole fleet."""
    wide = replace(LIMITS, queue_work_max=10**9)
    board = a_board(queued=(0, 9, 1), queued_work=(0, 3_000, 500), waits_ms=(0, 30_000, 900_000))
    refused = decide(ask(Band.BATCH), AdmissionFacts(board), wide)
    assert (refused.status, refused.retry_after_ms) == (429, 45_000)


def test_a_burst_between_two_boards_counts() -> None:
    """What came since adds its jobs, its work and its wait, to its own band and those below."""
    busy = a_board(queued=(0, 1, 0), queued_work=(0, 100, 0), waits_ms=(0, 1_000, 1_000))
    facts = AdmissionFacts(busy, (0, 8, 0), (0, 800, 0))
    assert decide(ask(Band.INTERACTIVE), facts, LIMITS).admitted
    assert decide(ask(Band.STANDARD), facts, LIMITS).status == 429
    facts = AdmissionFacts(busy, (0, 1, 0), (0, 5_901, 0))
    wide = replace(LIMITS, queue_work_max=10**9)
    assert "wait would be about 60010 ms" in decide(ask(), facts, wide).reason
    assert decide(ask(Band.INTERACTIVE), facts, wide).admitted


def test_a_burst_that_fits_into_free_room_does_not_wait() -> None:
    """Room is tokens and slots: what lacks either counts as waiting."""
    idle = a_board(capacity_tokens=100_000, reserved_tokens=50_000, free_jobs=20)
    assert decide(ask(), AdmissionFacts(idle, (0, 20, 0), (0, 50_000, 0)), LIMITS).admitted
    assert decide(ask(), AdmissionFacts(idle, (0, 7, 0), (0, 54_001, 0)), LIMITS).status == 429
    assert decide(ask(), AdmissionFacts(idle, (0, 27, 0), (0, 270, 0)), LIMITS).admitted
    assert decide(ask(), AdmissionFacts(idle, (0, 28, 0), (0, 280, 0)), LIMITS).status == 429
    assert decide(ask(), AdmissionFacts(idle, (10, 20, 0), (90, 180, 0)), LIMITS).status == 429
    waiting = replace(idle, queued=(0, 1, 0))
    assert decide(ask(), AdmissionFacts(waiting, (0, 2, 0), (0, 5_000, 0)), LIMITS).status == 429


def test_a_large_job_is_not_held_back_by_small_ones() -> None:
    """Its own size does not count against a ceiling, so the early answer is the final one."""
    board = a_board(queued=(0, 3, 0), queued_work=(0, 3_999, 0))
    assert decide(ask(uncached_tokens=10**6), AdmissionFacts(board), LIMITS).admitted


def test_a_deadline_that_the_queue_alone_breaks_is_refused_for_as_long() -> None:
    board = a_board(waits_ms=(0, 3_000, 5_000))
    facts = AdmissionFacts(board, token_ms=20)
    for by in ({"ttft_by_ms": NOW_MS + 2_000}, {"done_by_ms": NOW_MS + 2_000}):
        refused = decide(ask(**by), facts, LIMITS)
        assert (refused.status, refused.code) == (429, "deadline_unreachable")
        assert refused.retry_after_ms == 1_000
        assert decide(ask(Band.INTERACTIVE, **by), facts, LIMITS).admitted


def test_prefill_and_output_count_against_their_deadlines() -> None:
    """1,000 prompt tokens a second and 20 ms a token: 500 + 100 tokens take 2.5 s."""
    facts = AdmissionFacts(a_board(), token_ms=20)
    job = {"uncached_tokens": 500, "output_tokens": 100}
    assert decide(ask(ttft_by_ms=NOW_MS + 500, **job), facts, LIMITS).admitted
    assert not decide(ask(ttft_by_ms=NOW_MS + 499, **job), facts, LIMITS).admitted
    assert decide(ask(done_by_ms=NOW_MS + 2_500, **job), facts, LIMITS).admitted
    never = decide(ask(done_by_ms=NOW_MS + 2_499, **job), facts, LIMITS)
    assert never.code == "deadline_unreachable"
    assert never.retry_after_ms == 0, "an empty queue would not help"
    assert never.refusal().retry_after_ms is None


def test_what_was_never_measured_refuses_nobody() -> None:
    board = a_board(work_per_s=0.0, prefill_per_s=0.0)
    request = ask(ttft_by_ms=NOW_MS + 1, done_by_ms=NOW_MS + 1, uncached_tokens=9, output_tokens=9)
    assert decide(request, AdmissionFacts(board, (0, 1, 0), (0, 2_000, 0)), LIMITS).admitted
    full = decide(ask(), AdmissionFacts(replace(board, queued=(0, 9, 0))), LIMITS)
    assert full.retry_after_ms == 1_500


def test_of_several_obstacles_the_one_that_lasts_longest_is_told() -> None:
    board = a_board(queued=(0, 9, 0), queued_work=(0, 4_500, 0), waits_ms=(0, 75_000, 75_000))
    refused = decide(ask(ttft_by_ms=NOW_MS + 5_000), AdmissionFacts(board), LIMITS)
    assert (refused.code, refused.retry_after_ms) == ("deadline_unreachable", 70_000)


def test_a_job_asks_for_what_it_has_to_compute() -> None:
    job = Job(
        id="j", model="m", tenant="t", band=Band.BATCH, arrived_ms=1, gateway="g",
        prompt=pack_tokens(range(100)), sampling=Sampling(max_tokens=50), cached_tokens=64,
        expected_tokens=30, ttft_by_ms=5, done_by_ms=9,
    )  # fmt: skip
    assert ask_of(job, 3) == Ask(Band.BATCH, 3, 36, 30, 5, 9)


PER_BAND = st.tuples(*[st.integers(0, 2_000)] * 3)


@st.composite
def queues(draw: st.DrawFn) -> Board:
    """A queue that its work explains: what waits for a band is what is served before it."""
    queued = draw(PER_BAND)
    work = tuple(count * draw(st.integers(1, 2_000)) for count in queued)
    rate = draw(st.floats(50, 50_000))
    return drained(a_board(queued=queued, queued_work=work, work_per_s=rate), 0)


def drained(board: Board, for_ms: float) -> Board:
    """`board` after `for_ms` in which nothing came: the better band first, whole jobs leave."""
    served = board.work_per_s * for_ms / 1000
    queued, work = [], []
    for jobs, waiting in zip(board.queued, board.queued_work, strict=True):
        # a moment's rounding is not to keep a job that has had its time
        left = int(jobs * min(served, waiting) / waiting + 1e-6) if waiting else 0
        served = 0.0 if left < jobs else served - waiting
        queued.append(jobs - left)
        work.append(waiting * (jobs - left) / jobs if jobs else 0)
    waits = [round(1000 * sum(work[: band + 1]) / board.work_per_s) for band in Band]
    return replace(
        board,
        queued=tuple(queued),
        queued_work=tuple(round(each) for each in work),
        waits_ms=tuple(waits),
    )


@given(queues(), st.sampled_from(Band), st.integers(1, 100_000))
def test_the_wait_that_is_told_is_right(board: Board, band: Band, ttft_ms: int) -> None:
    """In a queue that only drains: admitted at the told time, not yet at half of it."""
    limits = AdmissionLimits(queue_jobs_max=1_000, queue_work_max=1_000_000)

    def at(moment_ms: float) -> Admission:
        request = Ask(band, NOW_MS, ttft_by_ms=NOW_MS + ttft_ms)
        return decide(request, AdmissionFacts(drained(board, moment_ms)), limits)

    refused = at(0)
    assume(not refused.admitted)
    told = refused.retry_after_ms
    assert RETRY_MS_MIN <= told <= RETRY_MS_MAX
    assume(told < RETRY_MS_MAX)
    each = zip(board.queued_work, board.queued, strict=True)
    sizes = [work / jobs for work, jobs in each if jobs]
    job_ms = 1_000 * (max(sizes, default=0) + 1) / board.work_per_s + 2  # and what is rounded
    assert at(told + job_ms).admitted, "a job more or less"
    if told > 2 * RETRY_MS_MIN:
        assert not at(told / 2).admitted


@given(queues(), PER_BAND, PER_BAND, st.integers(0, 20_000), st.integers(0, 10**6))
def test_a_better_band_is_never_refused_where_a_lower_one_enters(
    board: Board,
    recent_jobs: tuple[int, int, int],
    recent_work: tuple[int, int, int],
    live: int,
    uncached: int,
) -> None:
    """Without deadlines, which are their owner's choice; with equal limits on the wait."""
    limits = AdmissionLimits(wait_ms_max=(60_000, 60_000, 60_000))
    facts = AdmissionFacts(board, recent_jobs, recent_work, live)
    admitted = [decide(Ask(b, NOW_MS, uncached), facts, limits).admitted for b in Band]
    assert admitted == sorted(admitted, reverse=True)


@given(queues(), st.sampled_from(Band), st.integers(0, 10**6), st.integers(0, 10**4))
def test_the_early_answer_is_the_final_one(
    board: Board, band: Band, uncached: int, output: int
) -> None:
    """Before the prompt is read nothing is known of the cost, and it does not matter."""
    facts = AdmissionFacts(board)
    early = decide(Ask(band, NOW_MS), facts, AdmissionLimits())
    assert early == decide(Ask(band, NOW_MS, uncached, output), facts, AdmissionLimits())
    assert decide(Ask(band, NOW_MS), facts, WIDE).admitted or board.waits_ms[band] > 0


per_band = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


@given(
    recent=per_band,
    work=per_band,
    free_jobs=st.integers(0, 6),
    reserved=st.integers(990, 1_002),
    waits=st.sampled_from([(0, 0, 0), (10_000, 60_000, 600_000), (10_001, 60_001, 600_001)]),
    live=st.integers(58, 101),
    band=st.sampled_from(Band),
    queued=st.booleans(),
)
def test_a_look_at_a_calm_fleet_says_what_a_whole_look_says(
    recent: tuple[int, int, int],
    work: tuple[int, int, int],
    free_jobs: int,
    reserved: int,
    waits: tuple[int, int, int],
    live: int,
    band: Band,
    queued: bool,
) -> None:
    """The short way changes nothing: a deadline far away sends the same request the long one."""
    board = a_board(
        queued=(0, int(queued), 0),
        queued_work=(0, 5 * queued, 0),
        free_jobs=free_jobs,
        reserved_tokens=reserved,
        waits_ms=waits,
    )
    facts = AdmissionFacts(board, recent, work, live)
    assert decide(ask(band), facts, LIMITS) == decide(ask(band, done_by_ms=10**15), facts, LIMITS)
