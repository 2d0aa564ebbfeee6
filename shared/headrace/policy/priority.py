"""Effective priority: one order for admission, queue, batch, preemption and cache eviction.

Invariant: a smaller Rank goes first, everywhere. It compares the band (improved by age, so that
nothing waits for ever), then the tenant's virtual counter (who has had less for its weight), then
the due time, then the arrival. The caller's own integer `priority` moves the due time by
LEVEL_MS a level, so it orders a tenant's jobs among themselves, never against somebody else's, and
a low level only delays: time catches up with it. Rejected: one weighted sum of all four, whose
weights nobody can explain to a tenant that lost to it.
Sources: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024) for virtual counters.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.types import Band, Job

LEVEL_MS = 1_000
LEVELS_MAX = 600
"""`priority` counts between -LEVELS_MAX and LEVELS_MAX."""
TARGET_MS = (500, 5_000, 60_000)
"""When a job without a deadline is due after its arrival, by Band."""

_FIRST = Band.INTERACTIVE


class Rank(NamedTuple):
    """Smaller goes first."""

    band: int
    virtual: float
    due_ms: int
    arrived_ms: int


def due_ms(job: Job) -> int:
    """The wall-clock instant by which `job` should have its first token."""
    due = job.arrived_ms + TARGET_MS[job.band]
    if job.priority:
        due += LEVEL_MS * max(-LEVELS_MAX, min(LEVELS_MAX, job.priority))
    if 0 < job.ttft_by_ms < due:
        due = job.ttft_by_ms
    if 0 < job.done_by_ms < due:
        due = job.done_by_ms
    return due


def aged_band(band: int, age_ms: int, promote_ms: int) -> int:
    """`band`, one better for each `promote_ms` of age."""
    return max(int(Band.INTERACTIVE), band - age_ms // promote_ms)


def is_pressing(job: Job, now_ms: int) -> bool:
    """Whether work of lower bands shall give way to `job` at wall-clock `now_ms`: to interactive
    jobs always, to others when half of the time until they are due is over."""
    if job.band is _FIRST:
        return True
    return 2 * now_ms >= job.arrived_ms + due_ms(job)


def effective(job: Job, age_ms: int, promote_ms: int) -> Rank:
    """The Rank of `job` after `age_ms` in the place that asks."""
    band = aged_band(job.band, age_ms, promote_ms)
    return Rank(band, job.virtual, due_ms(job), job.arrived_ms)


def is_late(job: Job, now_ms: int, output_tokens: int = 0) -> bool:
    """Whether a deadline of `job`, which has `output_tokens`, has passed at wall-clock `now_ms`."""
    if job.done_by_ms and now_ms >= job.done_by_ms:
        return True
    return bool(job.ttft_by_ms and not output_tokens and now_ms >= job.ttft_by_ms)
