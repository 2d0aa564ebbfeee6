"""Which worker gets a job: rendezvous hashing with bounded load.

Invariant: a prompt's affinity names the same worker on every gateway, unless that worker already
holds more than LOAD_BOUND times its share of the jobs, or has no room; then the next in the key's
own order takes it, so a hot prefix spills to the same neighbour every time.
Sources: Thaler and Ravishankar 1996 (rendezvous); Mirrokni, Thorup and Zadimoghaddam 2016
(consistent hashing with bounded loads). Rejected: a hash ring, which needs a table and moves more
keys when workers come and go at this fleet size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.policy.hashing import rendezvous_weight

LOAD_BOUND = 1.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as routing sees it."""

    worker: str
    reserved_tokens: int
    reserved_jobs: int
    tokens_max: int
    jobs_max: int

    def has_room(self, cost: int) -> bool:
        """Whether `cost` KV tokens fit; an idle worker takes any job that it was not refused."""
        if self.reserved_jobs == 0:
            return True
        return self.reserved_tokens + cost <= self.tokens_max and self.reserved_jobs < self.jobs_max


@dataclass(frozen=True, slots=True)
class Score:
    """Why a candidate was or was not taken. `rank` is its place in the key's own order."""

    worker: str
    rank: int
    reserved_jobs: int
    reserved_tokens: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Route:
    """The decision: a worker or '' when the job has to wait, the reason, and every score."""

    worker: str
    reason: str
    scores: tuple[Score, ...]


def choose(affinity: bytes, cost: int, candidates: Sequence[Candidate]) -> Route:
    """The worker for a job of `cost` KV tokens whose prompt hashes to `affinity`."""
    if not candidates:
        return Route("", "no worker is ready", ())
    total = sum(c.reserved_jobs for c in candidates)
    bound = -int(-(LOAD_BOUND * (total + 1)) // len(candidates))
    ordered = sorted(candidates, key=lambda c: (-rendezvous_weight(affinity, c.worker), c.worker))
    chosen, spill = "", ""
    scores = []
    for rank, c in enumerate(ordered):
        if not c.has_room(cost):
            verdict = "no room"
        elif c.reserved_jobs + 1 > bound:
            verdict = f"over its share ({bound} jobs)"
            spill = spill or c.worker
        else:
            verdict = "fits"
            chosen = chosen or c.worker
        scores.append(Score(c.worker, rank, c.reserved_jobs, c.reserved_tokens, verdict))
    first = ordered[0].worker
    if chosen:
        reason = "affinity" if chosen == first else "spill-over"
    elif spill:
        # everyone with room is over its share: the others are full, so the bound cannot hold
        least = min(
            (c for c in candidates if c.has_room(cost)),
            key=lambda c: (c.reserved_jobs, c.reserved_tokens, c.worker),
        )
        chosen, reason = least.worker, "least loaded"
    else:
        reason = "no worker has room"
    return Route(chosen, reason, tuple(scores))
