"""A simulated gateway: what it knows of lengths and load, whom it lets in, what jobs it makes.

Invariant: it does to a request what the service's gateway does (channel.py, api/accounts.py), with
the same policy objects: expected output and cache hits from Lengths, admission by `decide` against
the last board it saw and what it accepted since. Prompts are lengths without tokens.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from headrace.policy.hashing import HASH_BYTES
from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Band, Board, Job, Sampling
from headrace_gateway.policy.admission import (
    Admission,
    AdmissionFacts,
    AdmissionLimits,
    ask_of,
    decide,
)
from headrace_gateway.policy.lengths import Lengths
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.workload import SimRequest

EPOCH_MS = 1_000_000
"""Wall-clock time at the simulation's 0, since 0 means no deadline."""
AFFINITY_BLOCKS = 16
"""The service hashes so many blocks of a prompt that belongs to no session."""
KNOWN_BLOCKS_MAX = 200_000
PACE_TOKENS_MIN = 8
_NOTHING_LOGGED = array("I")
_NO_TRACE: dict[str, str] = {}
_NUMBER = re.compile(r"\d+")


def unwritten(tokens: int) -> array[int]:
    """A prompt that has a length and no memory; policies ask for nothing else."""
    return cast("array[int]", range(tokens))


class BlockNames:
    """The service's keys of prefix blocks: some bytes that depend on the block's id alone."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def __call__(self, blocks: Iterable[PrefixBlock]) -> bytes:
        """Keys of the service's blocks in these prefix blocks."""
        get, found = self._known.get, []
        for block, tokens in blocks:
            size = tokens // BLOCK_TOKENS * BLOCK_KEY_BYTES
            keys = get(block)
            if keys is None or len(keys) < size:
                keys = self._learn(block, size)
            found.append(keys if len(keys) == size else keys[:size])
        return b"".join(found)

    def _learn(self, block: int, size: int) -> bytes:
        if len(self._known) >= KNOWN_BLOCKS_MAX:
            self._known.clear()
        name = block.to_bytes(16, "big", signed=True)
        keys = self._known[block] = hashlib.shake_128(name).digest(size)
        return keys


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`sessions`: clients say which conversation a request belongs to. `refuses`: admission.

    `deadlines`: they are passed on.
    """

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    sessions: bool = False
    refuses: bool = True
    deadlines: bool = True


class SimGateway:
    """One gateway."""

    def __init__(self, name: str, config: GatewayConfig, names: BlockNames) -> None:
        self.name = name
        self.lengths = Lengths()
        self.live = 0
        self._config = config
        self._names = names
        self._board: Board | None = None
        self._last_sampling = Sampling(max_tokens=1)
        self._recent_jobs = [0] * len(Band)
        self._recent_work = [0] * len(Band)
        self.refusals: Counter[str] = Counter()
        """How often it refused for which reason, numbers left out."""

    def see(self, board: Board) -> None:
        """A new board was read."""
        self._board = board
        self._recent_jobs, self._recent_work = [0] * len(Band), [0] * len(Band)

    def job(self, request: SimRequest) -> Job:
        """The job that `request` becomes."""
        now = EPOCH_MS + int(request.at_ms)
        ttft_ms, total_ms = request.ttft_ms, request.total_ms
        if not self._config.deadlines:
            ttft_ms = total_ms = 0
        tokens = request.input_tokens
        blocks = self._names(request.blocks) if request.blocks else b""
        likely = int(self.lengths.hit_ratio(request.tenant) * tokens)
        return Job(
            id=request.id,
            model="simulated",
            tenant=request.tenant,
            band=request.band,
            arrived_ms=now,
            gateway=self.name,
            prompt=unwritten(tokens),
            sampling=self._sampling(request.max_tokens),
            affinity=self._affinity(request, blocks),
            weight=request.weight,
            ttft_by_ms=now + ttft_ms if ttft_ms else 0,
            done_by_ms=now + total_ms if total_ms else 0,
            expected_tokens=self.lengths.expect(request.tenant, request.max_tokens),
            cached_tokens=min(likely, tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS,
            blocks=blocks,
            logged=_NOTHING_LOGGED,
            trace=_NO_TRACE,
        )

    def _sampling(self, max_tokens: int) -> Sampling:
        """Most requests ask for the same."""
        if self._last_sampling.max_tokens != max_tokens:
            self._last_sampling = Sampling(max_tokens=max_tokens)
        return self._last_sampling

    def _affinity(self, request: SimRequest, blocks: bytes) -> bytes:
        if self._config.sessions or not blocks:
            return hashlib.sha256(request.session).digest()
        count = min(AFFINITY_BLOCKS, len(blocks) // BLOCK_KEY_BYTES)
        return blocks[(count - 1) * BLOCK_KEY_BYTES : count * BLOCK_KEY_BYTES].ljust(HASH_BYTES)

    def admit(self, job: Job) -> Admission:
        """Whether `job` may enter; if so it counts from now on."""
        ask = ask_of(job, job.arrived_ms)
        facts = AdmissionFacts(
            self._board,
            (self._recent_jobs[0], self._recent_jobs[1], self._recent_jobs[2]),
            (self._recent_work[0], self._recent_work[1], self._recent_work[2]),
            self.live,
            # nothing else asks for it, and it is a median
            self.lengths.token_ms if job.done_by_ms else 0.0,
        )
        if self._config.refuses:
            admission = decide(ask, facts, self._config.limits)
        else:
            admission = Admission(200, "admitted", "everybody is let in")
        if admission.admitted:
            self.live += 1
            self._recent_jobs[job.band] += 1
            self._recent_work[job.band] += ask.work_tokens
        else:
            self.refusals[_NUMBER.sub("N", admission.reason)] += 1
        return admission

    def ended(self, job: Job, output_tokens: int, cached_tokens: int, decode_ms: float) -> None:
        """A job came to its own end, `decode_ms` after its first token."""
        self.lengths.note(job.tenant, output_tokens, len(job.prompt), cached_tokens)
        if output_tokens > PACE_TOKENS_MIN:
            self.lengths.note_pace(decode_ms / (output_tokens - 1))
