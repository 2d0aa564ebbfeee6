"""A job while it runs: its tokens, how many of them have KV, and the blocks that hold it.

Invariant: `computed` tokens have KV in `blocks`, in order; known tokens are never taken back, so
a preempted sequence loses KV but no output. There is no prefill or decode state: a sequence
whose computed tokens are one behind its known ones is what others call decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from headrace.policy.hashing import next_hash
from headrace.policy.priority import Rank, aged_band
from headrace.types import BLOCK_TOKENS, Band, FinishReason

PROMOTE_MS = 30_000
"""A sequence's band improves by one for so long without being computed."""
CATCH_UP_TOKENS = 32
"""A started sequence that lacks no more output than this goes before everybody's prompts."""


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.PREEMPTED, Status.FINISHED}),
    Status.PREEMPTED: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


def blocks_for(tokens: int) -> int:
    """Blocks that hold the KV of `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class Sequence:
    """One job in the engine.

    `tokens_max` is the length, prompt included, at which it ends by `LENGTH`; `stop_ids` end it
    by `STOP`. The rows of its first `scoring` tokens are wanted for their probabilities; `scored`
    of them have been computed.

    Its rank is made of `band`, the tenant's `virtual` counter, `due_ms`, `arrived_ms` and `order`,
    its arrival number in this engine, the last tie-breaker. `arrived_ms` is wall-clock time; all
    other times are this engine's monotonic clock's: `added_ms` when it came, `ttft_by_ms` and
    `done_by_ms` its deadlines, None without one.

    It ages while steps leave it out, not while they compute it: what runs needs no help, and a long
    stream of a low band must not outgrow those that arrive. Rejected: counting from its arrival,
    after which a minute of decoding made batch work interactive.
    """

    __slots__ = (
        "arrived_ms",
        "band",
        "blocks",
        "cached_blocks",
        "computed",
        "done_by_ms",
        "due_ms",
        "hashes",
        "id",
        "idle_since_ms",
        "order",
        "preemptions",
        "prompt_tokens",
        "registered",
        "root",
        "scored",
        "scoring",
        "status",
        "stop_ids",
        "tenant",
        "tokens",
        "tokens_max",
        "ttft_by_ms",
        "virtual",
        "waited_ms",
    )

    def __init__(
        self,
        id: str,
        prompt: Iterable[int],
        *,
        root: bytes,
        tokens_max: int,
        logged: Iterable[int] = (),
        stop_ids: frozenset[int] = frozenset(),
        band: Band = Band.STANDARD,
        tenant: str = "",
        virtual: float = 0.0,
        due_ms: int = 0,
        ttft_by_ms: int | None = None,
        done_by_ms: int | None = None,
        arrived_ms: int = 0,
        added_ms: int = 0,
        order: int = 0,
        scoring: int = 0,
    ) -> None:
        self.id = id
        self.tokens = list(prompt)
        self.prompt_tokens = len(self.tokens)
        self.tokens.extend(logged)
        self.root = root
        self.tokens_max = tokens_max
        self.stop_ids = stop_ids
        self.band = band
        self.tenant = tenant
        self.virtual = virtual
        self.due_ms = due_ms
        self.ttft_by_ms = ttft_by_ms
        self.done_by_ms = done_by_ms
        self.arrived_ms = arrived_ms
        self.order = order
        self.waited_ms = 0
        """How long steps had left it out, until it was computed last."""
        self.idle_since_ms: int | None = added_ms
        """Since when steps leave it out; None while they compute it."""
        self.scoring = scoring
        self.scored = 0
        self.status = Status.WAITING
        self.computed = 0
        self.preemptions = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.registered = 0
        """Leading blocks that the pool has been told the hash of."""
        self.cached_blocks: tuple[int, ...] | None = None
        """The blocks found in the cache when it was first admitted; None before."""

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def output_tokens(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Known tokens without KV; the last one's row gives the next token."""
        return len(self.tokens) - self.computed

    def lacks_prompt(self) -> bool:
        """Whether more than one token is missing and not just output that ran ahead a little."""
        return self.pending > 1 and not self.runs_ahead()

    def runs_ahead(self) -> bool:
        """Whether a little output has no KV yet: a grammar forced some tokens."""
        return self.computed >= self.prompt_tokens and 1 < self.pending <= CATCH_UP_TOKENS

    def effective_band(self, now: int) -> int:
        """The band, improved by the time without being computed."""
        idle_ms = 0 if self.idle_since_ms is None else now - self.idle_since_ms
        return aged_band(self.band, self.waited_ms + idle_ms, PROMOTE_MS)

    def rank(self, now: int) -> tuple[Rank, int]:
        """Smaller goes first: headrace.policy.priority, then who came here first."""
        band = self.effective_band(now)
        return Rank(band, self.virtual, self.due_ms, self.arrived_ms), self.order

    def is_late(self, now: int) -> bool:
        """Whether a deadline has passed: `priority.is_late` on this engine's clock."""
        if self.done_by_ms is not None and now >= self.done_by_ms:
            return True
        return self.ttft_by_ms is not None and now >= self.ttft_by_ms and not self.output_tokens

    def note_step(self, computed: bool, now: int) -> None:
        """The step that begins at `now` computes some of it, or leaves it out."""
        if not computed:
            self.idle_since_ms = now if self.idle_since_ms is None else self.idle_since_ms
        elif self.idle_since_ms is not None:
            self.waited_ms += now - self.idle_since_ms
            self.idle_since_ms = None

    def become(self, status: Status) -> None:
        assert status in TRANSITIONS[self.status], f"{self.status} cannot become {status}"
        self.status = status

    def block_hash(self, index: int) -> bytes:
        """The chained hash of full block `index`; hashes are computed once."""
        while len(self.hashes) <= index:
            start = len(self.hashes) * BLOCK_TOKENS
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(next_hash(parent, self.tokens[start : start + BLOCK_TOKENS]))
        return self.hashes[index]

    def parent_hash(self, index: int) -> bytes:
        return self.block_hash(index - 1) if index else self.root

    def reusable_hashes(self) -> list[bytes]:
        """Hashes of the full blocks worth finding: at least one token is left to compute.

        A row that is still to be scored has to be computed, whatever is cached.
        """
        count = (self.known - 1) // BLOCK_TOKENS
        if self.scored < self.scoring:
            count = min(count, self.scored // BLOCK_TOKENS)
        if count:
            self.block_hash(count - 1)
        return self.hashes[:count]

    def ending(self) -> FinishReason | None:
        """Why the known output is complete, if it is."""
        if self.output_tokens and self.tokens[-1] in self.stop_ids:
            return FinishReason.STOP
        if self.known >= self.tokens_max:
            return FinishReason.LENGTH
        return None

    def check_integrity(self) -> None:
        assert 0 <= self.computed <= self.known, "computed runs ahead of known"
        assert 0 <= self.scored <= self.scoring <= self.prompt_tokens, "scored past what was asked"
        assert len(self.blocks) >= blocks_for(self.computed), "computed tokens without a block"
        held = self.status is Status.RUNNING
        assert held or not (self.blocks or self.computed), "only a running sequence owns blocks"
