"""What a prompt's blocks that the cache services hold spare the workers.

Invariant: a block that is fetched costs what fetching takes, counted in prompt tokens that would be
computed meanwhile, and never more than computing it: workers do not fetch what does not pay. It is
spared for every worker alike, so it changes who gets a job only where something else differs:
workers' speeds, and how much is new for the fleet.
Rejected: a fetch speed for each worker. They read from the same services.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.types import BLOCK_TOKENS
from headrace_gateway.policy.shared_index import SharedIndex

PART_DEFAULT = 0.1
"""Of computing a token, that fetching it takes where nobody measured."""
HALF_LIFE_TOKENS = 32_768
"""Fetched tokens after which a measurement counts half."""
MEASURED_TOKENS_MIN = 64


@dataclass(frozen=True, slots=True)
class Spared:
    """Blocks of a prompt that no worker holds and the cache services do, and what that spares in
    prompt tokens."""

    blocks: int = 0
    tokens: int = 0


NOTHING = Spared()


def part_of(prefill_per_s: float, fetched_per_s: float) -> float:
    """What fetching a token takes, in parts of computing one; either speed is 0 while unknown."""
    if not fetched_per_s or not prefill_per_s:
        return PART_DEFAULT
    return min(1.0, prefill_per_s / fetched_per_s)


def spared_by(index: SharedIndex, blocks: bytes, first: int, part: float) -> Spared:
    """What fetching the run of `blocks` from number `first` on spares, as far as `index` knows."""
    count = index.run_after(blocks, first)
    return Spared(count, int(count * BLOCK_TOKENS * (1 - part))) if count else NOTHING


class Fetching:
    """The cache services as routing sees them: what they hold, how fast it is fetched."""

    def __init__(self) -> None:
        self.index = SharedIndex()
        self._tokens = 0.0
        self._ms = 0.0

    def note(self, tokens: int, took_ms: int) -> None:
        """A worker fetched KV of so many tokens."""
        if tokens > 0:
            keep = 0.5 ** (tokens / HALF_LIFE_TOKENS)
            self._tokens = keep * self._tokens + tokens
            self._ms = keep * self._ms + max(took_ms, 0)

    @property
    def fetched_per_s(self) -> float:
        """Tokens in a second of fetching; 0 while unknown."""
        if self._tokens < MEASURED_TOKENS_MIN:
            return 0.0
        return 1000 * self._tokens / max(self._ms, 1.0)

    def part(self, prefill_per_s: float) -> float:
        """What fetching a token takes, in parts of computing one at that speed (0: unknown)."""
        return part_of(prefill_per_s, self.fetched_per_s)

    def spares(self, blocks: bytes, first: int, prefill_per_s: float) -> Spared:
        """What fetching the blocks from number `first` on spares, of a prompt of these `blocks`."""
        return spared_by(self.index, blocks, first, self.part(prefill_per_s))

    def check_integrity(self) -> None:
        self.index.check_integrity()
