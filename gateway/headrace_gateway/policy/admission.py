"""Whether a request may enter: ceilings that lower bands reach first, and deadlines.

Invariant: what is refused is refused at once, with the status a client acts on and the time after
which it may be admitted: what its place takes if nobody else came, and where the queue is full half
as long again, since others do. 429 means no room or no time, 503 that nobody could
serve it. A band's ceilings are never above those of a better one, so that overload is refused to
batch first, then to standard, to interactive last.

A ceiling holds what stands there already, without the asking job's own work. So a job of unknown
cost gets the same answer before its prompt was even read, one job at most goes over, and at the
ceiling small jobs have no better chance than large ones. Rejected: one ceiling a band on that
band's own queue, which leaves the total to whoever comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.errors import DependencyError, OverloadError
from headrace.types import EXPECTED_OUTPUT_TOKENS, Band, Board, Job

RETRY_MS_MIN = 250
"""About how old a board gets: sooner, nobody here would know better."""
RETRY_MS_MAX = 3_600_000
RETRY_MS_UNKNOWN = 1_000
RETRY_STRETCH = 1.5
"""How much longer a full queue stays full while others come. Under tenfold overload what was told
without it was 0.35 to 0.77 of what it took, for either band that is refused."""

PerBand = tuple[int, int, int]
"""A value for each Band (index = band)."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Named limits of one model's queue, and of the streams that one gateway keeps.

    `wait_ms_max`: the longest predicted wait for a worker in which a band still takes jobs.
    `shares`: percent of the other limits that a band may fill, all bands counted together.
    """

    queue_jobs_max: int = 1_024
    queue_work_max: int = 4_000_000
    live_jobs_max: int = 4_096
    wait_ms_max: PerBand = (10_000, 60_000, 600_000)
    shares: PerBand = (100, 80, 60)

    def ceiling(self, limit: int, band: Band) -> int:
        """What `band` may fill of `limit`; at least 1, so that no band is shut out by rounding."""
        return max(1, limit * self.shares[band] // 100)


@dataclass(frozen=True, slots=True)
class AdmissionFacts:
    """What is known when a request arrives.

    `recent_jobs` and `recent_work` were accepted here since `board` was published, so that a burst
    between two boards is counted. `live_jobs` are this gateway's unfinished jobs. `token_ms` lie
    between two tokens of one stream, 0 while unknown.
    """

    board: Board | None
    recent_jobs: PerBand = (0, 0, 0)
    recent_work: PerBand = (0, 0, 0)
    live_jobs: int = 0
    token_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What wants to enter at wall-clock `now_ms`; the tokens are 0 while they are not known.

    Deadlines are wall-clock ms, 0 for none.
    """

    band: Band
    now_ms: int = 0
    uncached_tokens: int = 0
    output_tokens: int = 0
    ttft_by_ms: int = 0
    done_by_ms: int = 0

    @property
    def work_tokens(self) -> int:
        return self.uncached_tokens + self.output_tokens


def ask_of(job: Job, now_ms: int) -> Ask:
    """The Ask of a whole job."""
    uncached = max(0, len(job.prompt) - job.cached_tokens)
    return Ask(job.band, now_ms, uncached, job.expected_output, job.ttft_by_ms, job.done_by_ms)


@dataclass(frozen=True, slots=True)
class Admission:
    """The decision. `status` is 200, 429 or 503; `retry_after_ms` 0 means that no wait helps."""

    status: int
    code: str
    reason: str
    retry_after_ms: int = 0

    @property
    def admitted(self) -> bool:
        return self.status == 200

    def refusal(self) -> OverloadError | DependencyError:
        """The error that tells a client of it."""
        assert not self.admitted, "only a refusal is an error"
        kind = OverloadError if self.status == 429 else DependencyError
        return kind(
            self.reason,
            status=self.status,
            code=self.code,
            retry_after_ms=self.retry_after_ms or None,
        )


def decide(ask: Ask, facts: AdmissionFacts, limits: AdmissionLimits) -> Admission:
    """Whether `ask` may enter now; of several obstacles the one that lasts longest is told."""
    board = facts.board
    if board is None or board.workers == 0:
        return Admission(
            503, "no_worker", "no worker serves this model at the moment", RETRY_MS_UNKNOWN
        )
    if _is_calm(ask, board, facts, limits):
        return Admission(200, "admitted", f"0 jobs wait, about {board.waits_ms[ask.band]} ms")
    queue = _Queue(board, facts)
    obstacles = [
        *_ceilings(ask.band, queue, limits),
        *_live(ask.band, queue, facts.live_jobs, limits),
        *_deadlines(ask, queue, board, facts.token_ms),
    ]
    if not obstacles:
        return Admission(
            200, "admitted", f"{queue.jobs} jobs wait, about {queue.wait_ms(ask.band)} ms"
        )
    worst = max(obstacles, key=lambda obstacle: (obstacle.for_ever, obstacle.lasts_ms))
    lasts_ms = worst.lasts_ms * (RETRY_STRETCH if worst.code == "queue_full" else 1)
    wait_ms = max(RETRY_MS_MIN, min(RETRY_MS_MAX, round(lasts_ms)))
    return Admission(429, worst.code, worst.reason, 0 if worst.for_ever else wait_ms)


def _is_calm(ask: Ask, board: Board, facts: AdmissionFacts, limits: AdmissionLimits) -> bool:
    """Whether nothing can stand in the way, without a look at each: nobody waits, all that came
    since fits beside what runs, and there is no deadline. Most requests find it so."""
    free_tokens = board.capacity_tokens - board.reserved_tokens
    return (
        not (ask.ttft_by_ms or ask.done_by_ms)
        and board.queued == board.queued_work == (0, 0, 0)
        and sum(facts.recent_jobs) <= board.free_jobs
        and sum(facts.recent_work) <= free_tokens
        and board.waits_ms[ask.band] <= limits.wait_ms_max[ask.band]
        and facts.live_jobs < limits.ceiling(limits.live_jobs_max, ask.band)
    )


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """Why not, and how long that lasts when the queue only drains."""

    code: str
    reason: str
    lasts_ms: float
    for_ever: bool = False


class _Queue:
    """The queue as the board and what came since make it; work that fits at once does not wait."""

    __slots__ = ("_board", "queued", "work")

    def __init__(self, board: Board, facts: AdmissionFacts) -> None:
        self._board = board
        self.queued, self.work = list(board.queued), list(board.queued_work)
        # late binding: where somebody waits, what is free is free for nobody who would come behind
        waiting = any(board.queued)
        tokens = 0 if waiting else max(0, board.capacity_tokens - board.reserved_tokens)
        slots = 0 if waiting else board.free_jobs
        for band, (jobs, work) in enumerate(zip(facts.recent_jobs, facts.recent_work, strict=True)):
            late = max(0, jobs - slots)
            # room for tokens may lack a slot for the job
            self.work[band] += max(0, work - tokens, work * late // jobs if jobs else 0)
            self.queued[band] += late
            tokens, slots = max(0, tokens - work), max(0, slots - jobs)

    @property
    def jobs(self) -> int:
        return sum(self.queued)

    def drain_ms(self, work: float) -> float:
        """How long the fleet takes for `work` tokens."""
        rate = self._board.work_per_s
        return 1000 * work / rate if rate > 0 else RETRY_MS_UNKNOWN

    def leave_ms(self, count: int) -> float:
        """Until `count` jobs have left, the better bands first."""
        work = 0.0
        for queued, queued_work in zip(self.queued, self.work, strict=True):
            leaving = min(count, queued)
            work += leaving * queued_work / queued if queued else 0
            count -= leaving
        return self.drain_ms(work + count * EXPECTED_OUTPUT_TOKENS)

    def shrinks_ms(self, band: Band, wait_ms_max: int) -> float:
        """Until `band` waits less than `wait_ms_max`, if nobody else comes.

        A wait that is long because better bands keep coming ends with what they have left here.
        """
        wait_ms = self.wait_ms(band)
        alone_ms = self.drain_ms(sum(self.work[: band + 1]))
        better_ms = self.drain_ms(sum(self.work[:band]))
        alone_ms = max(self._whole_ms(alone_ms - wait_ms_max, band), better_ms)
        return max(min(self._whole_ms(wait_ms - wait_ms_max, band), alone_ms), self.next_ms(band))

    def _whole_ms(self, lasts_ms: float, band: Band) -> float:
        """`lasts_ms` until the job that makes the difference has left: jobs leave whole."""
        jobs, work = sum(self.queued[: band + 1]), sum(self.work[: band + 1])
        each_ms = self.drain_ms(work / jobs) if jobs and work else 0
        return each_ms * math.ceil(lasts_ms / each_ms) if each_ms else lasts_ms

    def next_ms(self, band: Band) -> float:
        """Until the next job of `band` leaves, before which nothing gets shorter."""
        queued, rate = self.queued[band], self._board.band_work_per_s[band]
        return 1000 * self.work[band] / queued / rate if queued and rate > 0 else 0.0

    def wait_ms(self, band: Band) -> int:
        """The predicted wait of a job that comes now."""
        rate = self._board.work_per_s
        came = sum(self.work[: band + 1]) - sum(self._board.queued_work[: band + 1])
        return self._board.waits_ms[band] + (round(1000 * came / rate) if rate > 0 else 0)


def _ceilings(band: Band, queue: _Queue, limits: AdmissionLimits) -> list[_Obstacle]:
    found = []
    jobs_max = limits.ceiling(limits.queue_jobs_max, band)
    if queue.jobs >= jobs_max:
        reason = f"the queue is full for {band.label}: {queue.jobs} jobs wait, {jobs_max} may"
        found.append(_Obstacle("queue_full", reason, queue.leave_ms(queue.jobs - jobs_max + 1)))
    work, work_max = sum(queue.work), limits.ceiling(limits.queue_work_max, band)
    if work >= work_max:
        reason = f"the queue is full for {band.label}: {work} tokens wait, {work_max} may"
        found.append(_Obstacle("queue_full", reason, queue.drain_ms(work - work_max + 1)))
    wait_ms, wait_ms_max = queue.wait_ms(band), limits.wait_ms_max[band]
    if wait_ms > wait_ms_max:
        reason = (
            f"the queue is too long for {band.label}: the wait would be about {wait_ms} ms, "
            f"{wait_ms_max} may be"
        )
        found.append(_Obstacle("queue_full", reason, queue.shrinks_ms(band, wait_ms_max)))
    return found


def _live(band: Band, queue: _Queue, live: int, limits: AdmissionLimits) -> list[_Obstacle]:
    live_max = limits.ceiling(limits.live_jobs_max, band)
    if live < live_max:
        return []
    reason = f"this gateway already has {live} jobs, {live_max} may be for {band.label}"
    return [_Obstacle("queue_full", reason, queue.leave_ms(live - live_max + 1))]


def _deadlines(ask: Ask, queue: _Queue, board: Board, token_ms: float) -> list[_Obstacle]:
    """What would come too late even if all goes as predicted."""
    if not ask.ttft_by_ms and not ask.done_by_ms:
        return []
    rate = board.prefill_per_s
    prefill_ms = 1000 * ask.uncached_tokens / rate if rate > 0 else 0
    wait_ms = queue.wait_ms(ask.band)
    found = []
    for name, by_ms, work_ms in (
        ("first token", ask.ttft_by_ms, prefill_ms),
        ("end", ask.done_by_ms, prefill_ms + ask.output_tokens * token_ms),
    ):
        late_ms = ask.now_ms + wait_ms + work_ms - by_ms
        if by_ms and late_ms > 0:
            reason = (
                f"the deadline cannot be met: the {name} is due in {by_ms - ask.now_ms} ms and "
                f"would take about {round(wait_ms + work_ms)} ms, {wait_ms} of them in the queue"
            )
            # the next try has as much time as this one, so only a shorter queue helps
            found.append(_Obstacle("deadline_unreachable", reason, late_ms, late_ms > wait_ms))
    return found
