"""Whether a request may enter: a bounded queue and a bounded sum of waiting tokens.

Invariant: what is refused is refused at once, with the status a client acts on and a wait that is
computed from how fast room is being released. 429 means full, 503 means nobody could serve it.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.types import Board

RETRY_MS_MIN = 250
RETRY_MS_MAX = 60_000
RETRY_MS_UNKNOWN = 1_000


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Named limits of one model's queue, and of the streams that one gateway keeps."""

    queue_jobs_max: int = 1_024
    queue_tokens_max: int = 4_000_000
    live_jobs_max: int = 4_096


@dataclass(frozen=True, slots=True)
class AdmissionFacts:
    """What is known when a request arrives.

    `recent_jobs` and `recent_tokens` were accepted here since `board` was published, so that a
    burst between two boards is counted. `live_jobs` are this gateway's unfinished jobs.
    """

    board: Board | None
    recent_jobs: int
    recent_tokens: int
    live_jobs: int


@dataclass(frozen=True, slots=True)
class Admission:
    """The decision. `status` is 200, 429 or 503."""

    status: int
    code: str
    reason: str
    retry_after_ms: int = 0

    @property
    def admitted(self) -> bool:
        return self.status == 200


def decide(cost_tokens: int, facts: AdmissionFacts, limits: AdmissionLimits) -> Admission:
    """Whether a job of `cost_tokens` may enter now."""
    board = facts.board
    if board is None or board.workers == 0:
        return Admission(
            503, "no_worker", "no worker serves this model at the moment", RETRY_MS_UNKNOWN
        )
    free = max(0, board.capacity_tokens - board.reserved_tokens)
    jobs = sum(board.queued) + facts.recent_jobs
    waiting = max(0, board.queued_tokens + facts.recent_tokens + cost_tokens - free)
    if facts.live_jobs >= limits.live_jobs_max:
        return _full(f"this gateway already streams {facts.live_jobs} jobs", board, cost_tokens)
    if jobs >= limits.queue_jobs_max:
        return _full(
            f"the queue is full: {jobs} jobs wait, {limits.queue_jobs_max} may", board, cost_tokens
        )
    if waiting > limits.queue_tokens_max:
        return _full(
            f"the queue is full: {waiting} tokens would wait, {limits.queue_tokens_max} may",
            board,
            waiting - limits.queue_tokens_max,
        )
    return Admission(200, "admitted", f"{jobs} jobs wait, {free} tokens free")


def _full(reason: str, board: Board, tokens_to_release: int) -> Admission:
    if board.tokens_per_s <= 0:
        wait_ms = RETRY_MS_UNKNOWN
    else:
        wait_ms = int(1000 * tokens_to_release / board.tokens_per_s)
    return Admission(429, "queue_full", reason, max(RETRY_MS_MIN, min(RETRY_MS_MAX, wait_ms)))
