"""What the holders of a prompt's leading blocks save the fleet.

Invariant: what is computed elsewhere costs, besides the prefill, `scatter` times its tokens,
divided among those that hold them already: the more copies there are, the less one more matters.
Rejected: the same for every copy, by which a prefix that everybody holds never gets cheap to move.
"""

from __future__ import annotations

from headrace.types import BLOCK_TOKENS
from headrace_gateway.policy.expectations import Holders

Hold = tuple[int, int, float]
"""Workers (a bit set), the leading blocks of the prompt that they hold, and what it would cost the
fleet, besides the prefill itself, to have these computed elsewhere."""


def holds_of(found: list[Holders], scatter: float) -> list[Hold]:
    """`found`, which is not empty and has most blocks first, with what it saves."""
    if len(found) == 1:
        blocks, slots = found[0]
        return [(slots, blocks, scatter * blocks * BLOCK_TOKENS / slots.bit_count())]
    holds: list[Hold] = []
    parts: list[float] = []
    holders, last = 0, len(found) - 1
    for at, (blocks, slots) in enumerate(found):
        holders += slots.bit_count()
        behind = found[at + 1][0] if at < last else 0
        parts.append(scatter * (blocks - behind) * BLOCK_TOKENS / holders)
    saves = 0.0
    while parts:
        saves += parts.pop()
        blocks, slots = found[len(parts)]
        holds.append((slots, blocks, saves))
    holds.reverse()
    return holds
