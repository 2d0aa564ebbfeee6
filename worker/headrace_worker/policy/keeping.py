"""Which of a job's full blocks the cache service is offered, and when.

A prompt's blocks are offered as they are computed: others may ask for the same prompt while this
one is still at work on its output, and another worker takes the job over from there if this one
dies. Those of the output are offered at the job's end, when they are what the next turn of a
conversation begins with; if they are evicted before, they are offered then.

Invariant: a job in explicit mode has nothing offered that it did not name.
Rejected: a prompt's blocks at the end, with the others: nobody finds them while the job runs, and
its usage cannot say that they were written.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from headrace.types import BLOCK_TOKENS, CacheMode, Job


class When(Enum):
    NOW = "now"
    LATER = "at the end of the job, or when it gives way"
    NEVER = "the job does not want it kept"


@dataclass(frozen=True, slots=True)
class Keeping:
    """What becomes of one block. `pin_ms`: how long the service shall keep it at least."""

    when: When
    pin_ms: int = 0


def keeping(job: Job, index: int, *, ended: bool) -> Keeping:
    """What becomes of the full block number `index` of `job`, which may have `ended`."""
    end_tokens = (index + 1) * BLOCK_TOKENS
    if end_tokens <= min(job.cache_until_tokens, len(job.prompt)):
        return Keeping(When.NOW, job.cache_ttl_ms)
    if job.cache_mode is CacheMode.EXPLICIT:
        return Keeping(When.NEVER)
    if ended or end_tokens <= len(job.prompt):
        return Keeping(When.NOW)
    return Keeping(When.LATER)
