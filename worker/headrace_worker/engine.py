"""The engine: jobs in, tokens out, one step at a time.

Invariant: `step()` = schedule → run → apply, and each job known here has exactly one sequence in
the scheduler or one end waiting to be reported. One thread calls everything but `missing_blocks`.
A step that raises ends the jobs of its plan with an error and no other job; the engine stays
usable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from headrace.clock import Clock
from headrace.errors import CallerError, SettingsError
from headrace.policy.hashing import block_hashes, root_hash
from headrace.types import BLOCK_TOKENS, Delta, Finish, FinishReason, Job, Sampling
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.kv.pool import KvPool
from headrace_worker.loading import LoadedModel, memory
from headrace_worker.policy.blocks import BlockPool, CachedBlock
from headrace_worker.policy.scheduler import Outcome, Plan, Scheduler
from headrace_worker.policy.sequence import Sequence as TokenSequence
from headrace_worker.runner import NonFiniteLogits, Runner, Sampled

OFFERED_BLOCKS_PER_STEP_MAX = 64
"""Blocks of finished sequences copied out in one step; the rest is offered when evicted."""

CHUNKS_RECORDED_MAX = 256
"""Prefill chunks remembered for one job's trace."""

TEMPERATURE_MAX = 100.0
"""Far above what any API allows; beyond, tokens are noise."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Raises SettingsError for a combination that cannot work.

    `kv_tokens`: tokens of KV kept in memory. `max_running`: sequences computed at a time.
    `step_tokens_max`: tokens computed in one step. `offer_blocks`: copy KV blocks out for a cache
    service.
    """

    kv_tokens: int
    max_running: int = 64
    step_tokens_max: int = 512
    offer_blocks: bool = True

    def __post_init__(self) -> None:
        if self.kv_tokens < 2 * BLOCK_TOKENS:
            raise SettingsError(f"kv_tokens = {self.kv_tokens} is below {2 * BLOCK_TOKENS}")
        if not 0 < self.max_running <= self.step_tokens_max:
            raise SettingsError(
                f"max_running = {self.max_running} has to be from 1 to step_tokens_max = "
                f"{self.step_tokens_max}: each running sequence needs a token a step"
            )


@dataclass(frozen=True, slots=True)
class BlockPayload:
    """One KV block as it travels to and from the cache service. `depth` counts from 0."""

    hash: bytes
    parent: bytes
    depth: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class JobStory:
    """What a trace tells of one finished job. Times are wall-clock nanoseconds, 0 = never.

    `chunks`: (tokens, start_ns, end_ns) of each prefill step, recomputation after a preemption
    included. `cached_local`, `cached_imported`: tokens found in the pool at first admission, those
    imported for this job apart. `output_tokens`: tokens made by this attempt.
    """

    job: str
    attempt: int
    reason: FinishReason
    added_ns: int
    scheduled_ns: int
    first_token_ns: int
    finished_ns: int
    chunks: tuple[tuple[int, int, int], ...]
    preemptions: int
    cached_local: int
    cached_imported: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave: at most one delta a job, KV worth caching, stories of ended jobs."""

    deltas: list[Delta]
    blocks: list[BlockPayload]
    stories: list[JobStory]


@dataclass(slots=True)
class _Entry:
    """A job in the engine, with what its story needs."""

    job: Job
    sequence: TokenSequence
    added_ns: int
    imported: frozenset[bytes] = frozenset()
    scheduled_ns: int = 0
    first_token_ns: int = 0
    chunks: list[tuple[int, int, int]] = field(default_factory=list)


class Engine:
    """Continuous batching of one model over one paged KV pool."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, clock: Clock) -> None:
        """Raises ModelError when the KV pool does not fit into memory."""
        blocks = config.kv_tokens // BLOCK_TOKENS
        block_bytes = KvPool.block_bytes(loaded.config, loaded.dtype)
        memory.require(
            (blocks + 1) * block_bytes,
            f"a KV cache of {config.kv_tokens} tokens",
            "lower HEADRACE_KV_TOKENS",
        )
        self._record = loaded.record
        self._config = config
        self._clock = clock
        self._pool = BlockPool(blocks)
        self._kv = KvPool(loaded.config, blocks, loaded.dtype)
        self._runner = Runner(loaded.model, SdpaBackend(self._kv, loaded.config))
        self._scheduler = Scheduler(
            self._pool, running_max=config.max_running, step_tokens_max=config.step_tokens_max
        )
        self._entries: dict[str, _Entry] = {}
        self._arrivals = 0
        self._result = StepResult([], [], [])

    @property
    def limit_tokens(self) -> int:
        """The longest sequence, prompt and output, that can run here."""
        return min(self._record.context_tokens, self._pool.total * BLOCK_TOKENS)

    @property
    def has_work(self) -> bool:
        return bool(self._entries or self._result.deltas)

    def counts(self) -> tuple[int, int, int]:
        """(running, waiting, tokens that fit into free blocks, cached ones included)."""
        free_tokens = self._pool.free_count * BLOCK_TOKENS
        return len(self._scheduler.running), len(self._scheduler.waiting), free_tokens

    def refuse(self, job: Job) -> str | None:
        """Why `job` can never run here; None when it can."""
        if job.model != self._record.name:
            return f"this worker serves {self._record.name!r}, not {job.model!r}"
        if not job.prompt:
            return "the prompt is empty"
        if len(job.prompt) + 1 > self.limit_tokens:
            return (
                f"the prompt has {len(job.prompt)} tokens, this worker takes at most "
                f"{self.limit_tokens - 1} and one of output"
            )
        largest = max(max(job.prompt), max(job.logged, default=0))
        if largest >= self._record.vocab_size:
            return f"token id {largest} is outside the vocabulary of {self._record.vocab_size}"
        return _refuse_sampling(job.sampling)

    def missing_blocks(self, job: Job) -> list[bytes]:
        """Hashes of the job's leading full blocks from the first one that is not in the pool.

        Safe to call from another thread: it only asks a dict what it contains.
        """
        tokens = job.prompt + job.logged
        root = root_hash(self._record.fingerprint, job.salt)
        hashes = block_hashes(root, tokens, (len(tokens) - 1) // BLOCK_TOKENS)
        for index, block_hash in enumerate(hashes):
            if not self._pool.contains(block_hash):
                return hashes[index:]
        return []

    def add(self, job: Job, imported: Iterable[BlockPayload] = ()) -> None:
        """Takes the job in. `imported`: KV from the cache service, of any usefulness.

        Raises CallerError for a job that `refuse` refuses.
        """
        reason = self.refuse(job)
        if reason is not None:
            raise CallerError(reason)
        assert job.id not in self._entries, "a job is added once"
        s = job.sampling
        self._arrivals += 1
        sequence = TokenSequence(
            job.id,
            job.prompt,
            root=root_hash(self._record.fingerprint, job.salt),
            tokens_max=min(len(job.prompt) + s.max_tokens, self.limit_tokens),
            logged=job.logged,
            stop_ids=frozenset(s.stop_token_ids).union(
                () if s.ignore_eos else self._record.eos_token_ids
            ),
            band=job.band,
            arrived_ms=job.arrived_ms,
            added_ms=self._clock.now_ms(),
            order=self._arrivals,
        )
        entry = _Entry(job, sequence, self._clock.wall_ns())
        self._entries[job.id] = entry
        ending = sequence.ending()
        if ending is not None:  # an earlier attempt made the last token, its end got lost
            self._end(entry, ending)
            return
        entry.imported = self._import(sequence, imported)
        self._scheduler.add(sequence)

    def cancel(self, job_id: str) -> bool:
        """Ends a job before the next step, whose result reports it. False when it is not here."""
        entry = self._entries.get(job_id)
        if entry is None:
            return False
        self._scheduler.remove(entry.sequence)
        self._end(entry, FinishReason.CANCELLED)
        return True

    def abort_all(self) -> None:
        """Drops all jobs and all that was to be reported. Cached KV stays."""
        for entry in self._entries.values():
            self._scheduler.remove(entry.sequence)
        self._entries.clear()
        self._result = StepResult([], [], [])

    def step(self) -> StepResult:
        """Computes one step for who is here, and reports what ended since the last one."""
        plan = self._scheduler.schedule(self._clock.now_ms())
        self._offer(plan.evicted)  # before the step overwrites them
        if plan.items:
            start_ns = self._clock.wall_ns()
            sampled = self._run(plan)
            if sampled is not None:
                self._apply(plan, sampled, start_ns, self._clock.wall_ns())
        result, self._result = self._result, StepResult([], [], [])
        return result

    def check_integrity(self) -> None:
        """Blocks are free or owned, once; each sequence has its job and each job its sequence."""
        self._scheduler.check_integrity()
        sequences = {s.id for s in (*self._scheduler.running, *self._scheduler.waiting)}
        assert sequences == self._entries.keys(), "jobs and sequences disagree"
        if not sequences:
            assert self._pool.free_count == self._pool.total, "blocks held without a job"

    def _run(self, plan: Plan) -> list[Sampled] | None:
        """What the runner says; None when it raised, and the plan's jobs have been failed."""
        samplings = {i.sequence.id: self._entries[i.sequence.id].job.sampling for i in plan.items}
        try:
            return self._runner.run(plan.items, samplings)
        except Exception as error:  # whatever it is, it must not end jobs outside the plan
            _log.exception("step failed", jobs=list(samplings))
            for item in plan.items:
                sequence = item.sequence
                suspects = sequence.blocks[sequence.registered :]
                self._fail(sequence, suspects, f"the step failed: {type(error).__name__}: {error}")
            return None

    def _apply(self, plan: Plan, sampled: list[Sampled], start_ns: int, end_ns: int) -> None:
        for item in plan.items:
            self._note_step(self._entries[item.sequence.id], item.count, start_ns, end_ns)
        for item, token in zip(plan.items, sampled, strict=True):
            if isinstance(token, NonFiniteLogits):
                blocks = list(item.sequence.blocks)
                self._fail(item.sequence, blocks, "the model's output is not a finite number")
        tokens = [None if isinstance(token, NonFiniteLogits) else token for token in sampled]
        for outcome in self._scheduler.apply(plan, tokens):
            self._report(outcome, end_ns)

    def _note_step(self, entry: _Entry, count: int, start_ns: int, end_ns: int) -> None:
        if not entry.scheduled_ns:
            entry.scheduled_ns = start_ns
        prefill = count > 1 or not entry.first_token_ns
        if prefill and len(entry.chunks) < CHUNKS_RECORDED_MAX:
            entry.chunks.append((count, start_ns, end_ns))

    def _report(self, outcome: Outcome, now_ns: int) -> None:
        entry = self._entries[outcome.sequence.id]
        if not entry.first_token_ns:
            entry.first_token_ns = now_ns
        if outcome.ending is None:
            first = outcome.sequence.output_tokens - 1
            cached = self._cached_tokens(entry)
            self._result.deltas.append(
                Delta(
                    entry.job.id,
                    entry.job.attempt,
                    first,
                    (outcome.token,),
                    cached_tokens=cached,
                )
            )
            return
        held = [self._pool.cached(block) for block in outcome.blocks]
        fresh = [c for c in held if c is not None and not c.offered]
        self._offer(fresh[: max(0, OFFERED_BLOCKS_PER_STEP_MAX - len(self._result.blocks))])
        self._end(entry, outcome.ending, (outcome.token,))

    def _fail(self, sequence: TokenSequence, suspects: list[int], error: str) -> None:
        """Ends a job in an error; nobody finds or reads what `suspects` hold again."""
        self._pool.forget(suspects)
        self._scheduler.remove(sequence)
        self._kv.zero_blocks(block for block in suspects if self._pool.is_free(block))
        self._end(self._entries[sequence.id], FinishReason.ERROR, error=error)

    def _end(
        self, entry: _Entry, reason: FinishReason, tokens: tuple[int, ...] = (), error: str = ""
    ) -> None:
        """Reports the end of a job whose sequence has left the scheduler."""
        job, sequence = entry.job, entry.sequence
        del self._entries[job.id]
        story = self._story(entry, reason)
        first = sequence.output_tokens - len(tokens)
        finish, cached = Finish(reason, error), self._cached_tokens(entry)
        self._result.deltas.append(
            Delta(job.id, job.attempt, first, tokens, finish, cached_tokens=cached)
        )
        self._result.stories.append(story)

    def _cached_tokens(self, entry: _Entry) -> int:
        """Prompt tokens found in the pool, wherever they had come from."""
        found = len(entry.sequence.cached_blocks or ()) * BLOCK_TOKENS
        return min(found, len(entry.job.prompt))

    def _story(self, entry: _Entry, reason: FinishReason) -> JobStory:
        sequence = entry.sequence
        found = sequence.hashes[: len(sequence.cached_blocks or ())]
        imported = sum(block_hash in entry.imported for block_hash in found)
        return JobStory(
            job=entry.job.id,
            attempt=entry.job.attempt,
            reason=reason,
            added_ns=entry.added_ns,
            scheduled_ns=entry.scheduled_ns,
            first_token_ns=entry.first_token_ns,
            finished_ns=self._clock.wall_ns(),
            chunks=tuple(entry.chunks),
            preemptions=sequence.preemptions,
            cached_local=(len(found) - imported) * BLOCK_TOKENS,
            cached_imported=imported * BLOCK_TOKENS,
            output_tokens=sequence.output_tokens - len(entry.job.logged),
        )

    def _offer(self, cached: Sequence[CachedBlock]) -> None:
        """Copies out those not offered before, while their KV stands."""
        if not self._config.offer_blocks:
            return
        for c in cached:
            if not c.offered:
                c.offered = True
                data = self._kv.export_block(c.block)
                self._result.blocks.append(BlockPayload(c.hash, c.parent, c.depth, data))

    def _import(
        self, sequence: TokenSequence, payloads: Iterable[BlockPayload]
    ) -> frozenset[bytes]:
        """Puts into the pool what continues the resident prefix; the hashes taken.

        What does not fit the sequence's own chain, or is no valid KV, is left out and
        computed: a cache can be wrong, an answer cannot.
        """
        by_hash = {payload.hash: payload for payload in payloads}
        if not by_hash:
            return frozenset()
        hashes = sequence.reusable_hashes()
        chain = self._pool.match_prefix(hashes)
        self._pool.touch(chain)
        taken: set[bytes] = set()
        for index in range(len(chain), len(hashes)):
            block_hash, parent = hashes[index], sequence.parent_hash(index)
            resident = self._pool.match_prefix([block_hash])
            if not resident:
                payload = by_hash.get(block_hash)
                # the chain itself must not give way to its own continuation
                room = self._pool.free_count > self._pool.unreferenced(chain)
                if payload is None or not room or not self._kv.accepts(payload.data):
                    break
                resident = [self._pool.adopt(block_hash, parent, index)]
                self._offer(self._pool.take_evicted())  # before it is overwritten
                self._kv.import_block(resident[0], payload.data)
                taken.add(block_hash)
            chain += resident
        self._pool.touch(chain)
        return frozenset(taken)


def _refuse_sampling(sampling: Sampling) -> str | None:
    # NaN fails every comparison, so each is written to hold for good values
    checks = [
        (sampling.max_tokens >= 1, f"max_tokens = {sampling.max_tokens} is below 1"),
        (
            0 <= sampling.temperature <= TEMPERATURE_MAX,
            f"temperature = {sampling.temperature} is not from 0 to {TEMPERATURE_MAX}",
        ),
        (0 < sampling.top_p <= 1, f"top_p = {sampling.top_p} is not above 0 and at most 1"),
        (sampling.top_k >= 0, f"top_k = {sampling.top_k} is negative"),
    ]
    return next((problem for good, problem in checks if not good), None)
