"""A job in a simulated worker: how long it really is, how far it is, what KV it holds.

Invariant: like the worker's own sequences it has known tokens (prompt and output so far) of which
`computed` have KV, and a band that improves with the time that steps leave it out. While it
decodes, neither is kept here: its lane (lane.py) counts steps and time left out for all its
members at once, so a thousand sequences advance at no cost.
"""

from __future__ import annotations

from headrace.policy.priority import Rank, aged_band, due_ms
from headrace.types import BLOCK_TOKENS, Job
from headrace_sim.kv_cache import PrefixBlock
from headrace_worker.policy.sequence import CATCH_UP_TOKENS, PROMOTE_MS


class SimSequence:
    """One job. `output_tokens` is what nobody knows beforehand: how long its output will be."""

    __slots__ = (
        "blocks",
        "brought",
        "cached",
        "computed",
        "due_ms",
        "first_ms",
        "held",
        "held_tokens",
        "idle_since_ms",
        "job",
        "joined_idle_ms",
        "joined_steps",
        "moves",
        "order",
        "output",
        "output_tokens",
        "own_tokens",
        "preemptions",
        "prompt_computed",
        "prompt_tokens",
        "reported",
        "seen_band",
        "shareable",
        "stay",
        "tenant",
        "virtual",
        "waited_ms",
    )

    def __init__(self, job: Job, output_tokens: int, blocks: tuple[PrefixBlock, ...]) -> None:
        self.job = job
        self.tenant = job.tenant
        self.prompt_tokens = len(job.prompt)
        self.output_tokens = output_tokens
        self.blocks = blocks
        """Prefix blocks, and what it computed beyond them before it was preempted."""
        self.shareable = len(blocks)
        """How many of them others may find as well."""
        self.due_ms = due_ms(job)
        self.virtual = job.virtual
        """Its tenant's virtual counter when it was dispatched."""
        self.order = 0
        self.computed = 0
        self.held = 0
        """Leading blocks that it holds in the cache."""
        self.held_tokens = 0
        self.own_tokens = 0
        """KV tokens reserved for it alone, without what decoding added."""
        self.output = 0
        """Output tokens when it last joined or left a lane."""
        self.joined_steps = 0
        self.joined_idle_ms = 0.0
        self.first_ms = -1.0
        self.cached = -1
        """Prompt tokens found in the cache when it was first admitted; -1 before."""
        self.prompt_computed = 0
        """`prompt_progress` when it last began to decode or left the batch."""
        self.preemptions = 0
        self.stay = 0
        """Counts its stays in the batch, so that what was planned for an earlier one is void."""
        self.waited_ms = 0.0
        self.idle_since_ms: float | None = None
        self.seen_band = int(job.band)
        self.reported = (0, 0)
        self.moves = False
        """Another worker goes on with it when it has its first token."""
        self.brought = 0
        """KV tokens that came with it, until it is admitted."""

    @property
    def known(self) -> int:
        """Known tokens of a sequence that does not decode."""
        return self.prompt_tokens + self.output

    @property
    def prompt_progress(self) -> int:
        """Prompt tokens computed so far; one that was preempted computes them again."""
        computed, cached = self.computed, self.cached
        if computed > self.prompt_tokens:
            computed = self.prompt_tokens
        if cached > 0:
            computed -= cached
        return computed if computed > self.prompt_computed else self.prompt_computed

    @property
    def pending(self) -> int:
        """Known tokens without KV."""
        return self.prompt_tokens + self.output - self.computed

    @property
    def lacks_prompt(self) -> bool:
        """Whether more is missing than one token, or than a little output."""
        pending = self.prompt_tokens + self.output - self.computed
        return pending > (CATCH_UP_TOKENS if self.output else 1)

    @property
    def rank(self) -> tuple[Rank, int]:
        """Smaller goes first; the band as of when it was looked at last."""
        job = self.job
        return Rank(self.seen_band, self.virtual, self.due_ms, job.arrived_ms), self.order

    def settle_band(self, now_ms: float) -> int:
        """Look at the band of a sequence that does not decode."""
        idle_ms = 0.0 if self.idle_since_ms is None else now_ms - self.idle_since_ms
        self.seen_band = band = aged_band(self.job.band, int(self.waited_ms + idle_ms), PROMOTE_MS)
        return band

    def promoted_ms(self) -> float:
        """When the band of a sequence improves that nobody computes; it is past for the best."""
        assert self.idle_since_ms is not None, "only waiting earns a better band"
        return self.idle_since_ms + left_to_promotion_ms(self.waited_ms)

    def note_step(self, computed: bool, now_ms: float) -> None:
        """The step that begins at `now_ms` computes some of it, or leaves it out."""
        if not computed:
            self.idle_since_ms = now_ms if self.idle_since_ms is None else self.idle_since_ms
        elif self.idle_since_ms is not None:
            self.waited_ms += now_ms - self.idle_since_ms
            self.idle_since_ms = None


def moved(sequence: SimSequence, blocks: tuple[PrefixBlock, ...]) -> SimSequence:
    """`sequence`, which has left its first worker, as it comes to the next one with its KV.

    All of the prompt's full blocks came along; what follows them is computed again.
    """
    there = SimSequence(sequence.job, sequence.output_tokens, blocks)
    there.virtual = sequence.virtual
    there.output = sequence.output
    there.first_ms = sequence.first_ms
    there.cached = sequence.cached
    there.prompt_computed = sequence.prompt_computed
    there.reported = (sequence.prompt_computed, sequence.output)
    there.brought = sequence.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    return there


def left_to_promotion_ms(waited_ms: float) -> float:
    """How much longer somebody who waited so long has to wait for the next better band."""
    return (waited_ms // PROMOTE_MS + 1) * PROMOTE_MS - waited_ms
