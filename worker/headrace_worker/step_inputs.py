"""What a step computes, as plain numbers: made from a plan, sent to whoever computes a part of it.

Invariant: it says everything that the forward pass depends on but the weights and the KV pool, and
nothing else: no policy, no tensor, no sequence. Block ids mean the same on every rank, so equal
inputs leave equal KV wherever they are computed. Packed it is a few bytes a token and a few a block
of each table; `STEP_BYTES_MAX` is more than the largest step that settings allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np
from numpy.typing import NDArray

from headrace.types import BLOCK_TOKENS
from headrace_worker.native.draws import Draws
from headrace_worker.parallel.wishes import Wishes
from headrace_worker.policy.plan import PlanItem

Ints = NDArray[np.int64]

STEP_BYTES_MAX = 16 * 2**20


@dataclass(frozen=True, slots=True)
class StepInputs:
    """N rows of S sequences; see AttentionBatch for tables, lengths and starts.

    `tokens`, `positions`, `slots` [N]. `rows`: those whose logits are wanted, in their order; None
    stands for all of them, and there may be none. `wishes`: what those need, where ranks choose
    tokens together. `draws`: which of them one process draws from within the step; ranks know none.
    """

    tokens: Ints
    positions: Ints
    slots: Ints
    block_tables: Sequence[Sequence[int]]
    lengths: Sequence[int]
    query_starts: Sequence[int]
    rows: Ints | None
    wishes: Wishes | None = None
    draws: Draws | None = None

    @property
    def wanted_rows(self) -> int:
        """How many rows of logits come of it."""
        return len(self.tokens) if self.rows is None else len(self.rows)

    def pack(self) -> bytes:
        """As bytes, for `unpack` on another rank."""
        assert self.draws is None, "ranks choose by wishes"
        packed: bytes = msgpack.packb(
            (
                *(_small(array) for array in (self.tokens, self.positions, self.slots)),
                [_small(np.array(table, np.int64)) for table in self.block_tables],
                list(self.lengths),
                list(self.query_starts),
                None if self.rows is None else _small(self.rows),
                None if self.wishes is None else self.wishes.pack(),
            )
        )
        assert len(packed) <= STEP_BYTES_MAX, "a step is larger than its limit"
        return packed

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> StepInputs:
        """The inputs that `pack` was called on. Raises ValueError for what it did not make."""
        tokens, positions, slots, tables, lengths, starts, rows, wishes = msgpack.unpackb(
            data, max_bin_len=STEP_BYTES_MAX
        )
        return cls(
            _wide(tokens),
            _wide(positions),
            _wide(slots),
            [_wide(raw).tolist() for raw in tables],
            lengths,
            starts,
            None if rows is None else _wide(rows),
            None if wishes is None else Wishes.unpack(wishes),
        )

    def wishing(self, wishes: Wishes) -> StepInputs:
        """The same step, with `wishes` for its wanted rows."""
        assert len(wishes.needs) == self.wanted_rows, "a wish for each wanted row"
        return replace(self, wishes=wishes)

    def drawing(self, draws: Draws) -> StepInputs:
        """The same step, drawing tokens of some of its wanted rows."""
        return replace(self, draws=draws)


def inputs_of(items: Sequence[PlanItem]) -> StepInputs:
    """The inputs of a plan's items; for each first the rows that are scored, then the sampled."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, rows = [0], []
    for item in items:
        sequence, stop = item.sequence, item.start + item.count
        first = len(tokens)
        span = range(item.start, item.start + item.rows)
        tokens += sequence.tokens[item.start : stop]
        tokens += item.guess
        positions += span
        blocks = sequence.blocks
        slots += [blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in span]
        starts.append(len(tokens))
        rows += [first + position - item.start for position in item.scored_rows]
        if item.samples:
            rows += range(first + item.count - 1, len(tokens))
    every = rows == list(range(len(tokens)))
    return StepInputs(
        tokens=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        slots=np.array(slots, np.int64),
        block_tables=[item.sequence.blocks for item in items],
        lengths=[item.start + item.rows for item in items],
        query_starts=starts,
        rows=None if every else np.array(rows, np.int64),
    )


def _small(array: Ints) -> bytes:
    """Little-endian int32: tokens, positions and slots are below 2**31."""
    assert not len(array) or array.max() < 2**31, "a number is too large for int32"
    return array.astype("<i4").tobytes()


def _wide(raw: bytes) -> Ints:
    return np.frombuffer(raw, "<i4").astype(np.int64)
