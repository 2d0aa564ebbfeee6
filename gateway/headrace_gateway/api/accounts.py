"""What a turn is expected to use, what it takes of its key's limits, and what it used.

Invariant: what was taken is settled once, whatever way the turn ends, before its client hears of
the end, so that a client which sends one request after the other is never refused for its last
one. Only what came to its own end is learned from: a client that leaves says nothing about lengths.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from headrace.types import FinishReason, Sampling
from headrace_gateway.api.context import Call, Gateway
from headrace_gateway.choices import Choice
from headrace_gateway.limits import Grant
from headrace_gateway.policy.lengths import Lengths

PACE_TOKENS_MIN = 8
"""Fewer tokens say nothing about how fast they come."""
_OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class Account:
    """One turn's."""

    def __init__(self, gateway: Gateway, call: Call) -> None:
        self._fleet = gateway.fleet
        self._call = call
        self._model = ""
        self._lengths: Lengths | None = None
        self._grant: Grant | None = None
        self._first: dict[int, tuple[int, int]] = {}

    def open(self, model: str) -> None:
        """Begin a turn with `model`. Raises OverloadError when the key is known to be used up."""
        self._model = model
        self._lengths = self._fleet.lengths(model)
        limits = self._call.tenant.limits
        if limits is not None:
            self._fleet.limiter.check(limits)

    def expect(self, sampling: Sampling) -> int:
        """Output tokens of a job, as long as its tenant's usually are."""
        if sampling.ignore_eos:
            return sampling.max_tokens
        assert self._lengths is not None, "open() comes first"
        expected = self._lengths.expect(self._call.tenant.name, sampling.max_tokens)
        return max(sampling.min_tokens, expected)

    def expect_cached(self, prompt: array[int], blocks: bytes) -> int:
        """Tokens of `prompt` that will be in a cache, in whole blocks and never all.

        `blocks` are its keys, as Job has them.
        """
        assert self._lengths is not None, "open() comes first"
        held = self._fleet.held_tokens(self._model, blocks)
        return self._lengths.expect_cached(self._call.tenant.name, len(prompt), held)

    @property
    def limited(self) -> bool:
        return self._call.tenant.limits is not None

    async def take(self, turn: str, tokens: int) -> None:
        """Take a request of `tokens`. Raises OverloadError (429), DependencyError."""
        limits, limiter = self._call.tenant.limits, self._fleet.limiter
        if limits is None:
            return
        try:
            self._grant = await limiter.take(limits, turn, tokens)
        finally:
            self._call.reply_headers.update(limiter.headers(limits))

    async def settle(self, tokens: int) -> None:
        """The turn ended by itself and used `tokens`."""
        grant, self._grant = self._grant, None
        if grant is not None:
            await self._fleet.limiter.settle(grant, tokens)
            self._call.reply_headers.update(self._fleet.limiter.headers(grant.limits))

    def close(self, tokens: int, *, accepted: bool) -> None:
        """Settle in the background what is not; a turn that was never accepted used nothing."""
        grant, self._grant = self._grant, None
        if grant is not None:
            used = tokens if accepted else 0
            self._fleet.limiter.settle_soon(grant, used, counts=accepted)

    def time(self, index: int, tokens: int, now_ms: int) -> None:
        """Choice `index` got `tokens` at monotonic `now_ms`; its first delivery counts."""
        self._first.setdefault(index, (now_ms, tokens))

    def learn(
        self,
        choices: Sequence[Choice],
        prompts: Sequence[array[int]],
        n: int,
        last_ms: dict[int, int],
    ) -> None:
        """Note the lengths of an ended turn's choices, `n` for each prompt.

        `last_ms` is when each got its last token.
        """
        assert self._lengths is not None, "open() comes first"
        for choice in choices:
            if choice.finish not in _OWN_ENDS:
                continue
            prompt = prompts[choice.index // n]
            self._lengths.note(
                self._call.tenant.name,
                choice.completion_tokens,
                len(prompt),
                choice.cached_tokens,
            )
            first_ms, tokens = self._first.get(choice.index, (0, 0))
            later = choice.completion_tokens - tokens
            if later >= PACE_TOKENS_MIN:
                self._lengths.note_pace((last_ms[choice.index] - first_ms) / later)
