"""Attention with torch's scaled_dot_product_attention: the backend that runs everywhere.

Decoding sequences go through one padded call per size class (the power of two that holds their
blocks), so that one long sequence does not make all short ones pay its length. The heads that
share a KV head are folded into the query axis: they see the same keys, so nothing is repeated.
Prefill chunks go one call each, causal; a chunk from position 0 needs neither mask nor gather
where its layer's window holds it. Layers of one window share a mask.

Rejected: one padded call for all decodes (pays longest times count), a call per sequence (Python
time grows with the batch), block-sparse masks (no CPU kernel).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.types import BLOCK_TOKENS
from headrace_worker.attention.interface import Attend, AttentionBatch
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.config import ModelConfig

SIZE_CLASS_BLOCKS_MIN = 16
"""Sequences up to this many blocks share a size class: below, a call costs more than padding."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a step's keys and values go; N rows."""

    chunks: tuple[Tensor, ...]  # per layer, [2N]: of all keys, then of all values
    offsets: Tensor  # [2N], the token within its chunk


@dataclass(frozen=True, slots=True)
class _Gather:
    """Which chunks of the pool hold some sequences' keys and values, per layer."""

    chunks: tuple[Tensor, ...]  # per layer, [2 * B * blocks]: all keys, then all values
    tokens: int  # blocks * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class _Decodes:
    """B sequences with one row each, padded to the same length."""

    rows: Tensor | None  # [B]; None: the step's rows are exactly these
    count: int
    gather: _Gather
    masks: dict[int, Tensor]  # by window, [B, 1, 1, T], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows start to stop of one sequence of `length` tokens."""

    start: int
    stop: int
    length: int
    gather: _Gather | None  # None: the chunk is the whole sequence, and its keys stay exact
    masks: dict[int, Tensor | None]  # by window, [n, length], 0 or -inf; None: plain causal


class SdpaBackend:
    """AttentionBackend over a KvPool in CPU memory, for one model's windows and scale."""

    def __init__(self, pool: KvPool, config: ModelConfig) -> None:
        self._pool = pool
        self._config = config
        self._windows = sorted({config.window_of(layer) for layer in range(config.layers)})
        self._layer_chunks = torch.arange(pool.layers)[:, None] * 2

    def prepare(self, batch: AttentionBatch) -> Attend:
        starts, lengths = batch.query_starts, batch.lengths
        single = sum(starts[s + 1] - starts[s] == 1 for s in range(len(lengths)))
        decodes = self._decodes(batch, single)
        chunks = [
            self._chunk(starts[s], starts[s + 1], lengths[s], list(batch.block_tables[s]))
            for s in range(single, len(lengths))
        ]
        blocks, offsets = batch.slots // BLOCK_TOKENS, batch.slots % BLOCK_TOKENS
        places = _Places(self._chunks_of(blocks), offsets.repeat(2))
        return _Step(self._pool, self._config, places, decodes, chunks)

    def _chunks_of(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """Per layer the chunks of `blocks` [n]: [2n], all keys, then all values."""
        base = blocks * (self._pool.layers * 2)
        return (torch.cat((base, base + 1))[None, :] + self._layer_chunks).unbind(0)

    def _gather(self, tables: list[list[int]]) -> _Gather:
        width = max(map(len, tables))
        padded = np.full((len(tables), width), self._pool.padding_block, np.int64)
        for row, table in enumerate(tables):
            padded[row, : len(table)] = table
        return _Gather(self._chunks_of(torch.from_numpy(padded).view(-1)), width * BLOCK_TOKENS)

    def _decodes(self, batch: AttentionBatch, count: int) -> list[_Decodes]:
        classes: dict[int, list[int]] = {}
        tables = []
        for index in range(count):
            blocks = -(-batch.lengths[index] // BLOCK_TOKENS)
            tables.append(list(batch.block_tables[index][:blocks]))
            size = max(SIZE_CLASS_BLOCKS_MIN, 1 << (blocks - 1).bit_length())
            classes.setdefault(size, []).append(index)
        groups = []
        for members in classes.values():
            gather = self._gather([tables[i] for i in members])
            lengths = torch.tensor([batch.lengths[i] for i in members])
            places = torch.arange(gather.tokens)[None, :]
            masks = {}
            for window in self._windows:
                hidden = places >= lengths[:, None]
                if window:
                    hidden |= places < lengths[:, None] - window
                masks[window] = self._mask(hidden)[:, None, None, :]
            every = len(members) == len(batch.slots)
            rows = None if every else torch.tensor(members)
            groups.append(_Decodes(rows, len(members), gather, masks))
        return groups

    def _mask(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._pool.dtype)
        return mask.masked_fill_(hidden, -torch.inf)

    def _chunk(self, start: int, stop: int, length: int, table: list[int]) -> _Chunk:
        whole = stop - start == length
        masks: dict[int, Tensor | None] = {}
        for window in self._windows:
            seen_by_all = not window or window >= length
            if whole and seen_by_all:
                masks[window] = None
                continue
            row = torch.arange(length - (stop - start), length)[:, None]
            place = torch.arange(length)[None, :]
            hidden = place > row
            if not seen_by_all:
                hidden |= place <= row - window
            masks[window] = self._mask(hidden)
        if whole and self._pool.exact:
            return _Chunk(start, stop, length, None, masks)
        blocks = -(-length // BLOCK_TOKENS)
        return _Chunk(start, stop, length, self._gather([table[:blocks]]), masks)


class _Step:
    """The `Attend` of one step."""

    def __init__(
        self,
        pool: KvPool,
        config: ModelConfig,
        places: _Places,
        decodes: list[_Decodes],
        chunks: list[_Chunk],
    ) -> None:
        self._pool = pool
        self._scale, self._window_of = config.scale, config.window_of
        self._places = places
        self._decodes = decodes
        self._chunks = chunks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._pool.write(self._places.chunks[layer], self._places.offsets, k, v)
        if len(self._decodes) == 1 and self._decodes[0].rows is None:
            return self._decode(layer, q, self._decodes[0])
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        for group in self._decodes:
            rows = group.rows
            assert rows is not None, "a group of all rows stands alone"
            out[rows] = self._decode(layer, q[rows], group)
        for chunk in self._chunks:
            out[chunk.start : chunk.stop] = self._prefill(layer, q, k, v, chunk)
        return out

    def _decode(self, layer: int, q: Tensor, group: _Decodes) -> Tensor:
        keys, values = self._pool.read(group.gather.chunks[layer], group.count)
        # query head h belongs to KV head h // group size, so the heads fold without moving
        folded = q.reshape(group.count, self._pool.kv_heads, -1, self._pool.head_dim)
        mask = group.masks[self._window_of(layer)]
        mixed = functional.scaled_dot_product_attention(
            folded, keys, values, attn_mask=mask, scale=self._scale
        )
        return mixed.reshape(group.count, -1)

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: _Chunk) -> Tensor:
        rows = slice(chunk.start, chunk.stop)
        query = q[rows].transpose(0, 1)[None]
        if chunk.gather is None:
            keys, values = k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None]
        else:
            keys, values = self._pool.read(chunk.gather.chunks[layer], 1)
            keys, values = keys[:, :, : chunk.length], values[:, :, : chunk.length]
        mask = chunk.masks[self._window_of(layer)]
        mixed = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1).reshape(chunk.stop - chunk.start, -1)
