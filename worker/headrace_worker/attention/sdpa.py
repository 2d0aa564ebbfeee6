"""Attention with torch's scaled_dot_product_attention: the backend that runs everywhere.

Sequences with few rows (one that decodes, some where tokens are guessed or forced) go through one
padded call per size class (the powers of two that hold their blocks and their rows), so that one
long sequence does not make all short ones pay its length. The heads that share a KV head, and the
rows of a sequence, are folded into the query axis: they see the same keys, so nothing is repeated.
Longer prefill chunks go one call each, causal; a chunk from position 0 needs neither mask nor
gather where its layer's window holds it. Layers of one window share a mask.

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
from headrace_worker.policy.sequence import blocks_for

SIZE_CLASS_BLOCKS_MIN = 16
"""Sequences up to this many blocks share a size class: below, a call costs more than padding."""
FEW_ROWS = 16
"""Up to this many rows of a sequence go through a call that it shares."""


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
class _Group:
    """B sequences with few rows each, padded to `each` rows and to the same length."""

    rows: (
        Tensor | None
    )  # [B * each], padding repeats a row; None: the step's rows are exactly these
    count: int
    each: int
    gather: _Gather
    masks: dict[int, Tensor]  # by window, [B, 1, heads that share a KV head * each, T], 0 or -inf


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
        self._sharing = config.heads // config.kv_heads
        self._layer_chunks = torch.arange(pool.layers)[:, None] * 2

    def prepare(self, batch: AttentionBatch) -> Attend:
        starts, lengths = batch.query_starts, batch.lengths
        classes: dict[tuple[int, int], list[int]] = {}
        chunks = []
        for s in range(len(lengths)):
            rows = starts[s + 1] - starts[s]
            if rows <= FEW_ROWS:
                size = _power_of_two(max(SIZE_CLASS_BLOCKS_MIN, blocks_for(lengths[s])))
                classes.setdefault((size, _power_of_two(rows)), []).append(s)
            else:
                table = list(batch.block_tables[s])
                chunks.append(self._chunk(starts[s], starts[s + 1], lengths[s], table))
        groups = [self._group(batch, members) for members in classes.values()]
        blocks, offsets = batch.slots // BLOCK_TOKENS, batch.slots % BLOCK_TOKENS
        places = _Places(self._chunks_of(blocks), offsets.repeat(2))
        return _Step(self._pool, self._config, places, groups, chunks)

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

    def _group(self, batch: AttentionBatch, members: list[int]) -> _Group:
        starts = torch.tensor(batch.query_starts)
        which = torch.tensor(members)
        counts = starts[which + 1] - starts[which]
        each = int(counts.max())
        lengths = torch.tensor(batch.lengths)[which]
        gather = self._gather(
            [list(batch.block_tables[i][: blocks_for(batch.lengths[i])]) for i in members]
        )
        row = torch.minimum(torch.arange(each)[None, :], counts[:, None] - 1)  # [B, each]
        seen = (lengths[:, None] - counts[:, None] + row + 1)[..., None]  # [B, each, 1]
        places = torch.arange(gather.tokens)
        masks = {}
        for window in self._windows:
            hidden = places >= seen
            if window:
                hidden |= places < seen - window
            mask = self._mask(hidden)[:, None]
            masks[window] = mask if each == 1 else mask.repeat(1, 1, self._sharing, 1)
        every = each == 1 and len(members) == len(batch.slots)
        rows = None if every else (starts[which][:, None] + row).view(-1)
        return _Group(rows, len(members), each, gather, masks)

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
        return _Chunk(start, stop, length, self._gather([table[: blocks_for(length)]]), masks)


class _Step:
    """The `Attend` of one step."""

    def __init__(
        self,
        pool: KvPool,
        config: ModelConfig,
        places: _Places,
        groups: list[_Group],
        chunks: list[_Chunk],
    ) -> None:
        self._pool = pool
        self._scale, self._window_of = config.scale, config.window_of
        self._places = places
        self._groups = groups
        self._chunks = chunks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._pool.write(self._places.chunks[layer], self._places.offsets, k, v)
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return self._few(layer, q, self._groups[0])
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        for group in self._groups:
            rows = group.rows
            assert rows is not None, "a group of all rows stands alone"
            out[rows] = self._few(layer, q[rows], group)
        for chunk in self._chunks:
            out[chunk.start : chunk.stop] = self._prefill(layer, q, k, v, chunk)
        return out

    def _few(self, layer: int, q: Tensor, group: _Group) -> Tensor:
        """q [B * each, heads, head_dim] → [B * each, heads * head_dim]."""
        keys, values = self._pool.read(group.gather.chunks[layer], group.count)
        mask = group.masks[self._window_of(layer)]
        each, kv_heads, head_dim = group.each, self._pool.kv_heads, self._pool.head_dim
        # query head h belongs to KV head h // group size, so the heads fold without moving
        folded = q.reshape(group.count, each, kv_heads, -1, head_dim)
        if each > 1:
            folded = folded.permute(0, 2, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            folded.reshape(group.count, kv_heads, -1, head_dim),
            keys,
            values,
            attn_mask=mask,
            scale=self._scale,
        )
        if each > 1:
            mixed = mixed.view(group.count, kv_heads, -1, each, head_dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(group.count * each, -1)

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


def _power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()
