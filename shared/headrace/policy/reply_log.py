"""Which tokens of a reply stream count: the one rule that everyone who reads it applies.

Invariant: given the same entries in the same order, every reader (the gateway that streams them,
the dispatcher that hands a job on) accepts exactly the same tokens. So a job that is moved to
another worker continues after precisely what its client has seen, whatever the dead worker had
still in flight. Rejected: trusting that a re-run regenerates the same tokens, which does not
hold for rounding that depends on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.types import Delta, Finish, TokenLogprobs


class ReplyLog:
    """The accepted output of one job."""

    def __init__(self, attempt: int = 1, logged: Iterable[int] = ()) -> None:
        self.attempt = attempt
        self.tokens: list[int] = list(logged)
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.cache_write_tokens = 0
        self.logprobs: dict[int, TokenLogprobs] = {}
        """By output position, for jobs that asked."""
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def is_gap(self, delta: Delta) -> bool:
        """Whether tokens before `delta` are missing: Redis lost entries that it had taken."""
        return (
            self.finish is None and delta.attempt >= self.attempt and delta.first > len(self.tokens)
        )

    def extend(self, attempt: int, first: int, tokens: tuple[int, ...], cached: int) -> bool:
        """`accept` for a delta that tells of nothing but `tokens` and `cached` ones, where it goes
        on with what stands here, as nearly all do; False where `accept` has to look."""
        have = self.tokens
        if attempt != self.attempt or first != len(have) or self.finish is not None:
            return False
        if not first:
            self.cached_tokens = cached
        have += tokens
        return True

    def accept(self, delta: Delta) -> tuple[int, ...]:
        """The tokens of `delta` that are new; records them, and the finish if there is one.

        Drops what a stale attempt wrote, what stands already, and what would leave a gap.
        """
        if self.finish is not None or delta.attempt < self.attempt:
            return ()
        self.attempt = delta.attempt
        position = len(self.tokens)
        if delta.first > position:
            return ()
        if position == 0:
            # the attempt that a client first heard of; later ones do not change its usage
            self.cached_tokens = delta.cached_tokens
            self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        # a later attempt may write less, as it finds what an earlier one wrote
        self.cache_write_tokens = max(self.cache_write_tokens, delta.cache_write_tokens)
        skipped = position - delta.first
        if delta.logprobs:
            self.logprobs.update(enumerate(delta.logprobs[skipped:], position))
        fresh = delta.tokens[skipped:]
        self.tokens.extend(fresh)
        if delta.finish is not None:
            self.finish = delta.finish
        return fresh

    def check_integrity(self) -> None:
        assert self.attempt >= 1, "attempts count from one"
        assert self.finish is None or self.finish.reason, "a finish has a reason"
