"""Attention with flash-attn over a paged pool.

Sequences of one row go through one call over the cache; those of several rows, chunks of prompts
and guessed tokens, through one call of variable lengths. Both read pages through block tables;
keys and values of the step's rows are written to the pool first. What the page map could not lay
is copied together and read packed: rare, slower, the same result.

Invariant: everything that depends on who is in the step is on the device before the first layer.
Rejected: letting the decode call append keys and values, which the prefill call cannot, and which
would make two ways to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.types import BLOCK_TOKENS
from headrace_worker.attention.flash_kernels import Cached, Kernels, Look, Rows
from headrace_worker.attention.interface import Attend, AttentionBatch
from headrace_worker.kv.paged import PagedKvPool, Placed
from headrace_worker.model.config import ModelConfig
from headrace_worker.policy.sequence import blocks_for


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that go through one call.

    `rows` [n]: which of the step's they are; None: all, in order. `tokens`: where packed ones'
    keys and values lie, None for paged ones. `tables` is empty for packed ones.
    """

    rows: Tensor | None
    counts: Rows
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    longest: int
    tokens: Tensor | None


class FlashBackend:
    """AttentionBackend over a PagedKvPool, for one model's windows and scale."""

    def __init__(self, pool: PagedKvPool, config: ModelConfig, kernels: Kernels) -> None:
        assert pool.page_tokens == kernels.page_tokens, "pages of the kernels' size"
        self.pool, self.kernels = pool, kernels
        self.looks = [Look(config.scale, config.window_of(layer)) for layer in range(config.layers)]

    def prepare(self, batch: AttentionBatch) -> Attend:
        placed = self.place(batch)
        starts, lengths = batch.query_starts, batch.lengths
        single: list[int] = []
        several: list[int] = []
        scattered: list[int] = []
        for s in range(len(lengths)):
            if placed.pages[s] is None:
                scattered.append(s)
            else:
                (single if starts[s + 1] - starts[s] == 1 else several).append(s)
        groups = [
            self._group(batch, placed, members, packed=members is scattered)
            for members in (single, several, scattered)
            if members
        ]
        return _Step(self.pool, self.kernels, self.looks, self.put(placed.slots), groups)

    def place(self, batch: AttentionBatch) -> Placed:
        """Where the step's sequences lie; what has to be moved for it is moved."""
        tables = [
            list(table[: blocks_for(length)])
            for table, length in zip(batch.block_tables, batch.lengths, strict=True)
        ]
        return self.pool.lay(tables, batch.slots.numpy())

    def put(
        self,
        numbers: Sequence[int] | NDArray[np.integer[Any]],
        kind: type[np.integer[Any]] = np.int64,
    ) -> Tensor:
        """On the pool's device."""
        return torch.from_numpy(np.asarray(numbers, kind)).to(self.pool.device)

    def _group(
        self, batch: AttentionBatch, placed: Placed, members: list[int], *, packed: bool
    ) -> _Group:
        starts = batch.query_starts
        lengths = [batch.lengths[s] for s in members]
        counts = [starts[s + 1] - starts[s] for s in members]
        every = len(members) == len(batch.lengths)
        rows = None
        if not every:
            rows = self.put([row for s in members for row in range(starts[s], starts[s + 1])])
        tokens, tables = None, np.empty((0, 0), np.int32)
        if packed:
            tokens = self.put(_tokens_of(placed, members, lengths))
        else:
            tables = page_tables([placed.pages[s] or () for s in members])
        return _Group(
            rows,
            Rows(self.put(_sums(counts), np.int32), max(counts)),
            self.put(tables, np.int32),
            self.put(lengths, np.int32),
            self.put(_sums(lengths), np.int32),
            max(lengths),
            tokens,
        )


class _Step:
    """The `Attend` of one step."""

    def __init__(
        self,
        pool: PagedKvPool,
        kernels: Kernels,
        looks: Sequence[Look],
        slots: Tensor,
        groups: Sequence[_Group],
    ) -> None:
        self._pool, self._kernels, self._looks = pool, kernels, looks
        self._slots, self._groups = slots, groups

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._pool.write(layer, self._slots, k, v)
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return self._mixed(layer, q, self._groups[0]).reshape(len(q), -1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self._groups:
            assert group.rows is not None, "a group of all rows stands alone"
            out[group.rows] = self._mixed(layer, q[group.rows], group)
        return out.view(len(q), -1)

    def _mixed(self, layer: int, q: Tensor, group: _Group) -> Tensor:
        """q [n, heads, head_dim] of the group's rows → the same shape."""
        keys, values = self._pool.cache(layer)
        cached = Cached(keys, values, group.tables, group.lengths, group.starts, group.longest)
        look = self._looks[layer]
        if group.tokens is not None:
            k, v = self._pool.gather(layer, group.tokens)
            return self._kernels.packed(q, k, v, cached, group.counts, look)
        if group.counts.most == 1:
            return self._kernels.decode(q, cached, look)
        return self._kernels.prefill(q, cached, group.counts, look)


def page_tables(pages: Sequence[Sequence[int]], width: int = 0, fill: int = 0) -> NDArray[np.int32]:
    """[S, the most of them, or `width`], filled up with a page that nobody reads."""
    tables = np.full((len(pages), width or max(map(len, pages))), fill, np.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = own
    return tables


def _sums(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *counts])


def _tokens_of(placed: Placed, members: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Slots of the members' tokens, one sequence after the other."""
    runs = []
    for s, length in zip(members, lengths, strict=True):
        places = np.array(placed.scattered[s], np.int64)
        slots = places[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
        runs.append(slots.ravel()[:length])
    return np.concatenate(runs)
