"""The nouns that travel between services (docs/structures.md has the glossary).

Invariant: everything here is a frozen value without behaviour that touches the outside
world, so that policies, services and tests can all build it. Rejected: passing dicts, whose
typos surface three processes later.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

BLOCK_TOKENS = 16
"""Tokens of KV in one Block: the unit of allocation, of prefix caching and of the cache service."""


class Band(IntEnum):
    """Priority class; a lower value is served first."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class FinishReason(StrEnum):
    """Why a job ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class CacheMode(StrEnum):
    """Which of a job's blocks are worth writing into the cache service.

    IMPLICIT: whatever its worker thinks worth it. EXPLICIT: those of `Job.cache_until_tokens`, no
    other.
    """

    IMPLICIT = "implicit"
    EXPLICIT = "explicit"


class WorkerRole(StrEnum):
    """What a worker does of a job: all of it, its prompt and first token, or what follows them."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


def pack_tokens(tokens: Iterable[int]) -> array[int]:
    """Token ids as a compact array of unsigned 32-bit integers."""
    return array("I", tokens)


NOT_MOVED = -1
NO_LOGPROBS = -1
LOGPROBS_MAX = 20
"""Most probable tokens that can be reported at one position, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Randomness depends on (seed, output position) alone.

    `temperature` 0 means greedy; `top_k` 0, `min_p` 0, `top_p` 1 and `typical_p` 1 mean no limit.
    Presence and frequency penalties look at the output, the repetition penalty at prompt and
    output. `logit_bias`: (token id, added to its logit). No end before `min_tokens`. `bad_words`
    are token sequences that never come out whole. `logprobs` and `prompt_logprobs`: how many most
    probable tokens to report beside the one at each position, NO_LOGPROBS for nothing at all;
    `max_tokens` may be 0 only with `prompt_logprobs`. `grammar` is what the output has to match, in
    llguidance's serialized form; '' for anything.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int = NO_LOGPROBS
    prompt_logprobs: int = NO_LOGPROBS
    grammar: str = ""

    def of_job(self, max_tokens: int, seed: int) -> Sampling:
        """This, with what is one job's own; `replace` looks each field up, for every request."""
        return Sampling(
            max_tokens, self.temperature, self.top_p, self.top_k, seed, self.stop_token_ids,
            self.ignore_eos, self.min_p, self.typical_p, self.presence_penalty,
            self.frequency_penalty, self.repetition_penalty, self.logit_bias, self.min_tokens,
            self.bad_words, self.logprobs, self.prompt_logprobs, self.grammar,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One generation handed to a worker; a request with n choices makes n jobs.

    `id` is unique for ever and dedupes the job. `prompt` are token ids. `logged` are the output
    tokens that clients may already have seen, from earlier attempts: the worker continues after
    them. `salt` separates tenants in every cache. `affinity` is what routing hashes.
    `trace` is the W3C context of the span that put the job where it is now.

    What its effective priority (policy/priority.py) is made of: `band`, `priority` (the caller's
    own order among its jobs, lower first), `weight` (the tenant's share), `virtual` (the tenant's
    virtual counter when it was dispatched), `ttft_by_ms` and `done_by_ms` (wall-clock instants by
    which the first and the last token have to be there; 0: no deadline). `expected_tokens` of
    output are predicted, `cached_tokens` of the prompt are expected in a cache. `blocks` names the
    prompt's full blocks for the prefix index, BLOCK_KEY_BYTES of each one's hash.

    What it wants of the cache service: the full blocks among its first `cache_until_tokens` prompt
    tokens are written, and kept for `cache_ttl_ms` from then on (0: no longer than they earn);
    `cache_mode` says what becomes of the others.

    Its move, if it has one: when its first token is there the worker `move_to` goes on with it,
    which takes KV at `move_address`. `found_tokens` of its prompt had been in a cache where its
    attempt began, before it moved (NOT_MOVED: it begins here).
    """

    id: str
    model: str
    tenant: str
    band: Band
    arrived_ms: int
    gateway: str
    prompt: array[int]
    sampling: Sampling
    salt: bytes = b""
    affinity: bytes = b""
    attempt: int = 1
    logged: array[int] = field(default_factory=lambda: array("I"))
    trace: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    weight: float = 1.0
    virtual: float = 0.0
    ttft_by_ms: int = 0
    done_by_ms: int = 0
    expected_tokens: int = 0
    cached_tokens: int = 0
    blocks: bytes = b""
    cache_until_tokens: int = 0
    cache_ttl_ms: int = 0
    cache_mode: CacheMode = CacheMode.IMPLICIT
    move_to: str = ""
    move_address: str = ""
    found_tokens: int = NOT_MOVED

    @property
    def expected_output(self) -> int:
        """Output tokens predicted; what runs longer is paid for by preemption in the engine."""
        expected, most = self.expected_tokens or EXPECTED_OUTPUT_TOKENS, self.sampling.max_tokens
        return expected if expected < most else most

    @property
    def cost_tokens(self) -> int:
        """KV tokens to reserve on a worker: the prompt and the predicted output."""
        return len(self.prompt) + self.expected_output


EXPECTED_OUTPUT_TOKENS = 512
"""Where nothing has been learned yet."""

BLOCK_KEY_BYTES = 8
"""How much of a block's hash the prefix index keeps: it may err, as a hit is checked by workers."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a job; `error` says why when the reason is ERROR."""

    reason: FinishReason
    error: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position.

    They are taken before temperature, penalties and filters. `logprob` is that of the token which
    stands there, `top` the most probable ones as (token id, logprob), the most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one job in one engine step, as they stand in a reply stream.

    `first` is the output position of `tokens[0]`. `cached_tokens` are the prompt tokens that this
    attempt took from a cache instead of computing them, `cache_write_tokens` those that it has
    written into one so far. `logprobs`: one for each of `tokens`, or none. `prompt_logprobs`: one
    for each prompt token but the first; they come with output position 0. A Delta without tokens
    and finish is a fence: it raises the attempt, and what an older attempt writes after it does not
    count.
    """

    job: str
    attempt: int
    first: int
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cache_write_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What a gateway needs to know of a model; its workers put it into Redis.

    `tokenizer_json` is the `tokenizers` library's serialized form. `template_tokens` are the
    special token strings that a chat template may name (`bos_token`, `eos_token`, …).
    """

    name: str
    fingerprint: str
    architecture: str
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    bos_token_id: int | None
    chat_template: str
    template_tokens: dict[str, str]
    tokenizer_json: bytes


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker's unchanging facts. An `id` is one incarnation: it is never used again.

    `kernels`: the instruction set of its native kernels, or why it computes without them.
    `precision`: the dtype it computes in, and how its weights are rounded.
    `role` is the one it was started with, its status says which it has. KV of jobs that move to it
    is taken at `kv_address`; empty: none can.
    """

    id: str
    model: str
    role: WorkerRole
    host: str
    pid: int
    kv_tokens: int
    max_jobs: int
    started_ms: int
    kernels: str = ""
    kv_address: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's changing facts, sent with each heartbeat."""

    state: WorkerState
    running: int
    waiting: int
    free_tokens: int
    steps: int
    role: WorkerRole = WorkerRole.BOTH


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What is reserved on a worker; changed only by the hand-off and finish scripts."""

    reserved_tokens: int
    reserved_jobs: int


@dataclass(frozen=True, slots=True)
class Board:
    """The dispatcher's published view of a model's fleet, which admission decides on.

    Tuples have a value per Band (index = band). `queued` counts waiting jobs, `queued_work` sums
    their expected work in tokens (uncached prompt + output). `waits_ms` is how long a job that
    arrives now would wait for a worker. `work_per_s` is the rate at which the fleet does such work
    when it is busy, 0 before it was measured, `band_work_per_s` that at which each band's leaves
    the queue; `prefill_per_s` the uncached prompt tokens per second of one worker. `free_jobs` are
    the workers' free slots. `fetched_per_s` are the tokens whose KV a worker fetches in a second
    from the cache services, 0 while unknown. `published_ms` is wall-clock time.
    """

    leader: str
    published_ms: int
    queued: tuple[int, int, int]
    queued_work: tuple[int, int, int]
    waits_ms: tuple[int, int, int]
    capacity_tokens: int
    reserved_tokens: int
    workers: int
    work_per_s: float
    prefill_per_s: float
    band_work_per_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    free_jobs: int = 0
    fetched_per_s: float = 0.0

    @property
    def queued_tokens(self) -> int:
        return sum(self.queued_work)


class JobProgress(NamedTuple):
    """How far a running job is: prompt tokens computed and found cached, output tokens made."""

    job: str
    computed: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A worker's report to the dispatcher, a few times a second while it has something to tell.

    `sequence` counts this incarnation's reports from 1: a gap means that some were lost. `jobs`:
    those running that moved since the last report. `stored` and `removed` are blocks that its KV
    pool gained and lost on balance, BLOCK_KEY_BYTES each: none is in both. `busy_ms` of engine
    steps since the last report computed `prefill_tokens` of prompts and made `output_tokens`;
    KV of `fetched_tokens` came from the cache service in `fetch_ms`.
    """

    worker: str
    sequence: int
    jobs: tuple[JobProgress, ...] = ()
    stored: bytes = b""
    removed: bytes = b""
    busy_ms: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    fetched_tokens: int = 0
    fetch_ms: int = 0


@dataclass(frozen=True, slots=True)
class JobDone:
    """A job ended on `worker`; `progress` is its last."""

    worker: str
    progress: JobProgress
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class JobMoved:
    """A job went on from `worker` to `to` with its KV; `progress` is its last on `worker`."""

    worker: str
    to: str
    progress: JobProgress


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """All blocks in a worker's pool as of its report number `sequence`."""

    sequence: int
    blocks: bytes


@dataclass(frozen=True, slots=True)
class CacheNode:
    """A cache service that lives. `boot` names this incarnation; bytes are those of its memory."""

    address: str
    boot: str
    budget_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class BlockNews:
    """Blocks of one model that a cache service gained and lost, BLOCK_KEY_BYTES each, on balance.

    `sequence` counts an incarnation's news of that model from 1: a gap means that some were lost.
    A snapshot is news in which `stored` are all blocks that were there when news number `sequence`
    was sent, or a little later.
    """

    address: str
    boot: str
    sequence: int
    stored: bytes = b""
    removed: bytes = b""


Positions = dict[str, tuple[int, int]]
"""Job id → (its place in the queue from 1, the predicted start in wall-clock ms or 0)."""
