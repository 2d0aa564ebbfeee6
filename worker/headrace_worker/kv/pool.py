"""The KV pool: one tensor, in which a block's keys and values over all layers are one run of bytes.

Layout `LAYOUT_VERSION`: [block][layer][key, value][token][kv_head][head_dim]. So a block goes to
and from the cache service as a single contiguous payload, and one layer's keys of a block are
one contiguous chunk to gather.

Invariant: every number in the pool is finite, since masked positions are multiplied by zero, not
skipped, and zero times infinity would reach other sequences. Imports are checked; blocks of a
sequence whose logits went bad are zeroed. One block more than asked for, always zero, pads block
tables.

Rejected: [layer][block]…, which makes a block's payload as many pieces as there are layers.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.types import BLOCK_TOKENS
from headrace_worker.model.config import ModelConfig

LAYOUT_VERSION = 1


def _lazy_zeros(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that takes no time and no room until it is written, in large pages if it can.

    `torch.zeros` writes all of it: 5 s of a worker's start for a pool of 4 GB.
    """
    memory = mmap.mmap(-1, size_bytes)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class KvPool:
    """KV of `blocks` blocks for one model. Holds no bookkeeping: see policy/blocks.py."""

    def __init__(self, config: ModelConfig, blocks: int, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.layers, self.kv_heads, self.head_dim = config.layers, config.kv_heads, config.head_dim
        self.padding_block = blocks
        row_values = self.kv_heads * self.head_dim
        self._bytes = _lazy_zeros((blocks + 1) * self.block_bytes(config, dtype)).reshape(
            blocks + 1, -1
        )
        self.tensor = (
            torch.from_numpy(self._bytes)
            .view(dtype)
            .view(blocks + 1, self.layers, 2, BLOCK_TOKENS, row_values)
        )

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Size in bytes of one block's payload."""
        return config.kv_values_per_token * BLOCK_TOKENS * dtype.itemsize

    @property
    def rows(self) -> Tensor:
        """[(block, layer, key or value, token), kv_heads * head_dim], a view."""
        return self.tensor.view(-1, self.kv_heads * self.head_dim)

    @property
    def chunks(self) -> Tensor:
        """[(block, layer, key or value), BLOCK_TOKENS * kv_heads * head_dim], a view."""
        return self.tensor.view((self.blocks + 1) * self.layers * 2, -1)

    def export_block(self, block: int) -> bytes:
        """A copy of the block's payload."""
        assert 0 <= block < self.blocks, "no such block"
        data: bytes = self._bytes[block].tobytes()
        return data

    def accepts(self, data: bytes | memoryview) -> bool:
        """Whether `data` can be a block's payload: its length, and no infinity or NaN in it."""
        if len(data) != self._bytes.shape[1]:
            return False
        # a copy, since torch wants writable memory
        values = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(self.tensor.dtype)
        return bool(torch.isfinite(values).all())

    def import_block(self, block: int, data: bytes | memoryview) -> None:
        """Fills `block`. Raises ValueError for a payload that `accepts` refuses."""
        assert 0 <= block < self.blocks, "no such block"
        if not self.accepts(data):
            raise ValueError(
                f"payload of {len(data)} bytes is not {self._bytes.shape[1]} bytes of finite KV"
            )
        self._bytes[block] = np.frombuffer(data, np.uint8)

    def zero_blocks(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._bytes[block] = 0
