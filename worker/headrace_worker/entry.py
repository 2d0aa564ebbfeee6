"""A job in the engine: its sequence, how its tokens are chosen, and what has been told of it.

Invariant: `reported` output tokens have been told; each delta tells all of the others, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from headrace.clock import Clock
from headrace.grammars import Matcher
from headrace.policy import priority
from headrace.policy.hashing import root_hash
from headrace.types import (
    BLOCK_TOKENS,
    NO_LOGPROBS,
    NOT_MOVED,
    Delta,
    Finish,
    FinishReason,
    Job,
    JobProgress,
    ModelRecord,
    TokenLogprobs,
)
from headrace_worker.policy.sequence import Sequence
from headrace_worker.policy.speculation import Guesser
from headrace_worker.results import JobStory
from headrace_worker.runner import Ask
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.limits import refuse as refuse_sampling
from headrace_worker.sampling.sampler import Chosen

CHUNKS_RECORDED_MAX = 256
"""Prefill chunks remembered for one job's trace."""


def sequence_of(job: Job, record: ModelRecord, clock: Clock, order: int) -> Sequence:
    """The job as the scheduler sees it, the `order`-th to come."""
    s = job.sampling
    scored = s.prompt_logprobs != NO_LOGPROBS and not job.logged
    now = clock.now_ms()
    ahead_ms = now - clock.wall_ms()  # deadlines come as wall-clock times
    return Sequence(
        job.id,
        job.prompt,
        root=root_hash(record.fingerprint, job.salt),
        tokens_max=min(len(job.prompt) + s.max_tokens, record.context_tokens),
        logged=job.logged,
        stop_ids=frozenset(s.stop_token_ids).union(() if s.ignore_eos else record.eos_token_ids),
        band=job.band,
        tenant=job.tenant,
        virtual=job.virtual,
        due_ms=priority.due_ms(job) + ahead_ms,
        ttft_by_ms=job.ttft_by_ms + ahead_ms if job.ttft_by_ms else None,
        done_by_ms=job.done_by_ms + ahead_ms if job.done_by_ms else None,
        arrived_ms=job.arrived_ms,
        added_ms=now,
        order=order,
        scoring=len(job.prompt) - 1 if scored else 0,
    )


def refusal(job: Job, record: ModelRecord) -> str | None:
    """Why a worker that serves `record` can never run `job`; None when it can."""
    if job.model != record.name:
        return f"this worker serves {record.name!r}, not {job.model!r}"
    if not job.prompt:
        return "the prompt is empty"
    if len(job.prompt) + min(1, job.sampling.max_tokens) > record.context_tokens:
        return (
            f"the prompt has {len(job.prompt)} tokens, this worker takes at most "
            f"{record.context_tokens - 1} and one of output"
        )
    largest = max(max(job.prompt), max(job.logged, default=0))
    if largest >= record.vocab_size:
        return f"token id {largest} is outside the vocabulary of {record.vocab_size}"
    return refuse_sampling(job.sampling, record.vocab_size)


class Entry:
    """One job. `matcher` says what its grammar allows next, None where it has no grammar."""

    def __init__(
        self, job: Job, sequence: Sequence, matcher: Matcher | None, vocab_size: int, added_ns: int
    ) -> None:
        self.job = job
        self.sequence = sequence
        self.matcher = matcher
        self.choosing = Choosing(
            job.sampling,
            sequence.tokens,
            sequence.prompt_tokens,
            sequence.stop_ids,
            vocab_size,
        )
        self.ask = Ask(self.choosing, (), max(0, job.sampling.prompt_logprobs))
        self.guesser = Guesser()
        self.imported: frozenset[bytes] = frozenset()
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.offered = 0
        """Leading blocks of which the cache service has been offered what it shall have."""
        self.looked_at = 0
        """Leading blocks that have been looked at for that while it runs."""
        self.lent = 0
        """Leading blocks that the worker which goes on with the job has been lent."""
        self.scheduled_ns = 0
        self.first_token_ns = 0
        self.guessed = 0
        self.guessed_right = 0
        self.forced = 0
        self.reached = 0
        """Tokens that this attempt has computed or found, those lost by preemption included."""
        self._added_ns = added_ns
        self._chunks: list[tuple[int, int, int]] = []
        self._reported = sequence.output_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.job.sampling.logprobs != NO_LOGPROBS

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the pool, wherever they had come from; where it began, if it has
        moved since."""
        if self.job.found_tokens != NOT_MOVED:
            return self.job.found_tokens
        found = len(self.sequence.cached_blocks or ()) * BLOCK_TOKENS
        return min(found, len(self.job.prompt))

    def progress(self) -> JobProgress:
        """How far it is; a prompt token that was computed again counts once."""
        cached = self.cached_tokens
        computed = max(0, min(self.reached, len(self.job.prompt)) - cached)
        return JobProgress(self.job.id, computed, cached, self.sequence.output_tokens)

    def note_step(self, start: int, count: int, start_ns: int, end_ns: int) -> None:
        """A step computed `count` of its known tokens from `start`."""
        self.reached = max(self.reached, start + count)
        if not self.scheduled_ns:
            self.scheduled_ns = start_ns
        prefill = count > 1 or not self.first_token_ns
        if prefill and len(self._chunks) < CHUNKS_RECORDED_MAX:
            self._chunks.append((count, start_ns, end_ns))

    def note_output(self, said: int, chosen: Iterable[Chosen | None], guessed: int) -> None:
        """`said` tokens of those `chosen` in a step stand, which had `guessed` so many of them."""
        if self.wants_logprobs:
            stood = islice(chosen, said)
            self.logprobs += [each.logprobs for each in stood if each and each.logprobs]
        if guessed:
            right = max(0, said - 1)
            self.guesser.note(guessed, right)
            self.guessed += guessed
            self.guessed_right += right

    def delta(self, finish: Finish | None = None) -> Delta:
        """Everything that has not been told yet."""
        sequence, first = self.sequence, self._reported
        self._reported = sequence.output_tokens
        logprobs, self.logprobs = self.logprobs, []
        prompt_logprobs: list[TokenLogprobs] = []
        if sequence.scored == sequence.scoring:
            prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        return Delta(
            self.job.id,
            self.job.attempt,
            first,
            tuple(sequence.tokens[sequence.prompt_tokens + first :]),
            finish,
            self.cached_tokens,
            tuple(logprobs),
            tuple(prompt_logprobs),
        )

    def story(self, reason: FinishReason | None, finished_ns: int) -> JobStory:
        sequence = self.sequence
        found = sequence.hashes[: len(sequence.cached_blocks or ())]
        imported = sum(block_hash in self.imported for block_hash in found)
        return JobStory(
            job=self.job.id,
            attempt=self.job.attempt,
            reason=reason,
            progress=self.progress(),
            added_ns=self._added_ns,
            scheduled_ns=self.scheduled_ns,
            first_token_ns=self.first_token_ns,
            finished_ns=finished_ns,
            chunks=tuple(self._chunks),
            preemptions=sequence.preemptions,
            cached_local=(len(found) - imported) * BLOCK_TOKENS,
            cached_imported=imported * BLOCK_TOKENS,
            output_tokens=sequence.output_tokens - len(self.job.logged),
            guessed=self.guessed,
            guessed_right=self.guessed_right,
            forced=self.forced,
        )
