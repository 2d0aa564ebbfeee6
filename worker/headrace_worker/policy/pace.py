"""How many prompt tokens fit into a time, by the steps that have run here.

Invariant: what is allowed to lower bands beside a better one is a time, as that is what the better
one waits; tokens differ by a hundred between a small CPU and a GPU. Measured on steps that mostly
computed prompts, as others say little of what a prompt token costs. Rejected: a number of tokens
as a setting, which was right on one machine.
"""

from __future__ import annotations

TOKENS_UNKNOWN = 128
"""Before anything was measured."""
TOKENS_MIN = 16
"""A chunk of fewer costs as much as one of these."""
HALF_LIFE_STEPS = 8
TOKEN_MS_MIN = 1e-6


class Pace:
    """Milliseconds of a prompt token, averaged with a half-life of HALF_LIFE_STEPS."""

    def __init__(self) -> None:
        self._token_ms = 0.0

    def note(self, prompt_tokens: int, stream_rows: int, took_ms: float) -> None:
        """A step computed `prompt_tokens` of prompts beside `stream_rows` of running streams."""
        if prompt_tokens < max(TOKENS_MIN, stream_rows) or took_ms <= 0:
            return
        measured = max(TOKEN_MS_MIN, took_ms / (prompt_tokens + stream_rows))
        keep = 0.5 ** (1 / HALF_LIFE_STEPS) if self._token_ms else 0.0
        self._token_ms = keep * self._token_ms + (1 - keep) * measured

    @property
    def token_ms(self) -> float:
        """Milliseconds of a prompt token; 0 before anything was measured."""
        return self._token_ms

    def tokens_within(self, limit_ms: int) -> int:
        """Prompt tokens that take about `limit_ms`; never none."""
        if not self._token_ms:
            return TOKENS_UNKNOWN
        return max(TOKENS_MIN, int(limit_ms / self._token_ms))
