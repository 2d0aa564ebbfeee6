"""The seam between model code and attention backends.

Invariant: everything that depends on which sequences are in the step is worked out once, in
`prepare`; what runs per layer takes the same few tensor operations whatever the number of decoding
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, heads, head_dim], k, v [N, kv_heads, head_dim]) → [N, heads * head_dim].

Writes k and v to the pool first, then lets each row see its sequence up to itself."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Who the N rows of a step belong to. S sequences.

    Sequence s has rows `query_starts[s]` to `query_starts[s + 1]` (S + 1 numbers, from 0 to N),
    its last row stands at position `lengths[s] - 1`, and `block_tables[s]` are its blocks, head
    first, enough for `lengths[s]` tokens. `slots` [N], int64: block * BLOCK_TOKENS + offset, where
    each row's key and value go.
    """

    block_tables: Sequence[Sequence[int]]
    lengths: Sequence[int]
    query_starts: Sequence[int]
    slots: Tensor


class AttentionBackend(Protocol):
    """Attention over one KV pool."""

    def prepare(self, batch: AttentionBatch) -> Attend:
        """The `Attend` of one step; invalid after it."""
        ...
