"""The KV pool in pages, on any device: what flash-attn reads.

Layout: [layer][key, value][page][token][kv_head][head_dim], so that one layer's keys are the paged
cache that flash-attn takes. Pages are 256 tokens where the kernels want it (flash-attn 2), and then
`PageMap` says where a block lies; or one block each. Payloads are those of every other pool: blocks
go from and to workers of any kind.

Invariant: a block's place changes under the lock only, and what is read or brought from another
thread is done under the lock too. One page more than the map's takes what padding rows write.

Rejected: the layout of the pool for CPUs, whose blocks hold all layers: 256 tokens of one layer
would not be one run; int8, which flash-attn does not read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.frames import Buffer
from headrace.types import BLOCK_TOKENS
from headrace_worker.attention.pages import PageMap
from headrace_worker.kv.payload import Payloads, block_bytes
from headrace_worker.kv.staging import Staging
from headrace_worker.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a step's sequences and rows lie.

    `pages[s]`: of sequence s, in order; None where its blocks are scattered over pages, and then
    `scattered[s]` are the places of its blocks. `slots` [N]: where each row's key and value go.
    """

    pages: list[Sequence[int] | None]
    scattered: dict[int, list[int]]
    slots: NDArray[np.int64]


class PagedKvPool:
    """KV of `blocks` blocks. `place` of a block: which run of 16 tokens of the pages it is."""

    copies_quickly = False
    """It may have to wait for the device."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        dtype: torch.dtype,
        *,
        page_tokens: int,
        spare_pages: int,
        device: torch.device,
    ) -> None:
        """`spare_pages`: how many more than `blocks` fill; sequences end within a page."""
        assert page_tokens % BLOCK_TOKENS == 0, "pages are whole blocks"
        self.blocks, self.dtype, self.device, self.page_tokens = blocks, dtype, device, page_tokens
        self.layers, self.kv_heads, self.head_dim = config.layers, config.kv_heads, config.head_dim
        each = page_tokens // BLOCK_TOKENS
        self.pages = page_count(blocks, page_tokens, spare_pages)
        self._map = PageMap(blocks, self.pages, each) if each > 1 else None
        self.padding_page = self.pages
        shape = (self.layers, 2, self.pages + 1, page_tokens, self.kv_heads, self.head_dim)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._tokens = self.tensor.view(self.layers, 2, -1, self.kv_heads, self.head_dim)
        self._places = self.tensor.view(
            self.layers, 2, -1, BLOCK_TOKENS * self.kv_heads * self.head_dim
        )
        self._checked = Payloads(config, dtype, "auto")
        self.layout = self._checked.layout
        self._staging = Staging(self.payload_bytes, device)
        self._lock = threading.Lock()

    @staticmethod
    def size_bytes(
        config: ModelConfig, blocks: int, dtype: torch.dtype, *, page_tokens: int, spare_pages: int
    ) -> int:
        """What a pool takes of its device's memory."""
        pages = page_count(blocks, page_tokens, spare_pages) + 1
        return pages * (page_tokens // BLOCK_TOKENS) * block_bytes(config, dtype, "auto")

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, each [pages + 1, page_tokens, kv_heads, head_dim]."""
        keys, values = self.tensor[layer].unbind(0)
        return keys, values

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v [N, kv_heads, head_dim] at `slots` [N], int64, of `Placed`."""
        self._tokens[layer, 0].index_copy_(0, slots, k)
        self._tokens[layer, 1].index_copy_(0, slots, v)

    def gather(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values at `tokens` [T], int64 slots: each [T, kv_heads, head_dim]."""
        return (
            self._tokens[layer, 0].index_select(0, tokens),
            self._tokens[layer, 1].index_select(0, tokens),
        )

    def lay(self, tables: Sequence[Sequence[int]], slots: NDArray[np.int64]) -> Placed:
        """Finds each sequence pages. `tables`: the blocks that hold its tokens, no more.

        `slots` [N]: the step's rows, as block * BLOCK_TOKENS + offset.
        """
        if self._map is None:
            return Placed(list(tables), {}, slots)
        blocks, offsets = np.divmod(slots, BLOCK_TOKENS)
        written = dict.fromkeys(blocks.tolist())
        with self._lock:
            laid = self._map.lay(tables, written, blocks[offsets == 0].tolist())
            self._move(laid.moves)
            places = {block: self._place(block) for block in written}
            scattered = {
                s: [self._place(block) for block in tables[s]]
                for s, pages in enumerate(laid.pages)
                if pages is None
            }
        here = np.array([places[block] for block in blocks.tolist()], np.int64)
        return Placed(list(laid.pages), scattered, here * BLOCK_TOKENS + offsets)

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        if moves:
            pairs = torch.tensor(moves, device=self.device)
            moved = self._places.index_select(2, pairs[:, 0])
            self._places.index_copy_(2, pairs[:, 1], moved)

    def _place(self, block: int) -> int:
        place = block if self._map is None else self._map.place(block)
        assert place is not None, "a block that was never written is read"
        return place

    # --- payloads; see KvPool

    @property
    def payload_bytes(self) -> int:
        """Size in bytes of one block's payload."""
        return self._checked.bytes

    def copy_block(self, block: int, target: NDArray[np.uint8]) -> None:
        """Writes the block's payload, as it is now, into `target`. Any thread may call it."""
        with self._lock:
            self._staging.fetch(self._places[:, :, self._place(block)], target)

    def export_block(self, block: int) -> bytes:
        """A copy of the block's payload."""
        target = np.empty(self.payload_bytes, np.uint8)
        self.copy_block(block, target)
        return target.tobytes()

    def accepts(self, data: Buffer) -> bool:
        """Whether `data` can be a block's payload. Safe from any thread."""
        return self._checked.accepts(np.frombuffer(data, np.uint8))

    def import_block(self, block: int, data: Buffer) -> None:
        """Fills `block`. Raises ValueError for a payload that `accepts` refuses."""
        payload = np.frombuffer(data, np.uint8).copy()  # checked and copied, whatever becomes of it
        if not self._checked.accepts(payload):
            self.zero_blocks([block])
            raise ValueError(
                f"{len(payload)} bytes are not {self.payload_bytes} bytes of finite KV"
            )
        with self._lock:
            place = block if self._map is None else self._map.store(block)
            self._staging.bring(payload, self._places[:, :, place])

    def zero_blocks(self, blocks: Iterable[int]) -> None:
        """Nobody reads again what they hold."""
        with self._lock:
            for block in blocks:
                if self._map is None:
                    self._places[:, :, block] = 0
                    continue
                for place in self._map.places(block):
                    self._places[:, :, place] = 0
                self._map.forget(block)

    def check_integrity(self) -> None:
        """The map's, if there is one."""
        if self._map is not None:
            self._map.check_integrity()


def page_count(blocks: int, page_tokens: int, spare_pages: int) -> int:
    """Pages for `blocks` blocks: as many as they fill, and spare ones where pages hold several."""
    each = page_tokens // BLOCK_TOKENS
    return blocks if each == 1 else -(-blocks // each) + max(1, spare_pages)
