"""What leaves the engine: new tokens, KV worth caching, and what a trace tells of ended jobs.

Invariant: it crosses from the engine's thread into the event loop, so all of it is frozen or, as
exports are, for both to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.frames import Buffer
from headrace.types import Band, Delta, FinishReason, JobProgress
from headrace_worker.kv.export import Export
from headrace_worker.policy.plan import NO_SHAPE, StepShape


@dataclass(frozen=True, slots=True)
class BlockPayload:
    """One KV block as it comes from the cache service. `depth` counts from 0."""

    hash: bytes
    parent: bytes
    depth: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class MissingRun:
    """The full blocks of a job from the first one that is not in the pool.

    That is block number `first` of its chain; `parent` is the hash before it.
    """

    hashes: list[bytes]
    parent: bytes
    first: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """How long prompts take here: a token's milliseconds (0: not measured), and what waits.

    `ahead_tokens`: of prompts that are here and not computed, by band.
    """

    token_ms: float = 0.0
    ahead_tokens: tuple[int, ...] = (0,) * len(Band)

    def wait_ms(self, band: Band) -> float:
        """How long a prompt of `band` that comes now waits for those before it."""
        return self.token_ms * sum(self.ahead_tokens[: band + 1])


@dataclass(frozen=True, slots=True)
class JobStory:
    """What a trace tells of one finished job. Times are wall-clock nanoseconds, 0 = never.

    `reason`: None where it has not ended, but goes on at another worker.

    `chunks`: (tokens, start_ns, end_ns) of each prefill step, recomputation after a preemption
    included. `progress` is its last. `cached_local`, `cached_imported`: tokens found in the pool at
    first admission, those imported for this job apart. `output_tokens`: tokens made by this
    attempt, of which `guessed_right` out of `guessed` by speculation and `forced` by the grammar.
    """

    job: str
    attempt: int
    reason: FinishReason | None
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
    `shape`: what a cost model makes of it.
    """

    moved: tuple[JobProgress, ...] = ()
    news: Mapping[bytes, bool] = field(default_factory=dict)
    busy_ns: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    shape: StepShape = NO_SHAPE


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave: at most one delta a job, KV worth caching, stories of ended jobs.

    `lent`: KV of jobs that will move. `handed`: those that are to move now; they left the engine.
    """

    deltas: list[Delta]
    blocks: list[Export]
    stories: list[JobStory]
    work: StepWork = StepWork()
    lent: list[Export] = field(default_factory=list)
    handed: list[JobStory] = field(default_factory=list)
