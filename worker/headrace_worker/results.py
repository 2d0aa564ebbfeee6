"""What leaves the engine: new tokens, KV worth caching, and what a trace tells of ended jobs.

Invariant: all of it is frozen; it crosses from the engine's thread into the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.types import Band, Delta, FinishReason, JobProgress


@dataclass(frozen=True, slots=True)
class BlockPayload:
    """One KV block as it travels to and from the cache service. `depth` counts from 0.

    `band` and `tenant` are the owner's, for what the service keeps; it does not tell them back.
    """

    hash: bytes
    parent: bytes
    depth: int
    data: bytes | memoryview
    band: Band = Band.STANDARD
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class JobStory:
    """What a trace tells of one finished job. Times are wall-clock nanoseconds, 0 = never.

    `chunks`: (tokens, start_ns, end_ns) of each prefill step, recomputation after a preemption
    included. `progress` is its last. `cached_local`, `cached_imported`: tokens found in the pool at
    first admission, those imported for this job apart. `output_tokens`: tokens made by this
    attempt, of which `guessed_right` out of `guessed` by speculation and `forced` by the grammar.
    """

    job: str
    attempt: int
    reason: FinishReason
    progress: JobProgress
    added_ns: int
    scheduled_ns: int
    first_token_ns: int
    finished_ns: int
    chunks: tuple[tuple[int, int, int], ...]
    preemptions: int
    cached_local: int
    cached_imported: int
    output_tokens: int
    guessed: int = 0
    guessed_right: int = 0
    forced: int = 0


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step did, for the dispatcher's eyes.

    `moved`: jobs it computed something of that go on. `news`: keys of blocks that came into the
    pool (True) or went (False) since the last step, the newest last. `prefill_tokens`: computed
    ones, again after a preemption included.
    """

    moved: tuple[JobProgress, ...] = ()
    news: Mapping[bytes, bool] = field(default_factory=dict)
    busy_ns: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave: at most one delta a job, KV worth caching, stories of ended jobs."""

    deltas: list[Delta]
    blocks: list[BlockPayload]
    stories: list[JobStory]
    work: StepWork = StepWork()
