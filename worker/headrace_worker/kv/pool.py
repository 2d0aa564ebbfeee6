"""The KV pool: one tensor, in which a block's keys and values over all layers are one run of bytes.

A block's numbers stand as its payload has them (see payload.py). So it goes to and from the cache
service in one piece, and one layer's keys of a block are one contiguous chunk to gather. int8 takes
little more than half of bfloat16's bytes, for half a percent of each number at most.

Invariant: every number in the pool is finite, since masked positions are multiplied by zero, not
skipped, and zero times infinity would reach other sequences. Imports are checked; blocks of a
sequence whose logits went bad are zeroed. One block more than asked for, always zero, pads block
tables.

Rejected: [layer][block]…, which makes a block's payload as many pieces as there are layers; a
scale per block, which tokens that come later would outgrow; torch's isfinite, which took 2 ms for
a block in bfloat16 where comparing bits takes 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace import copying
from headrace.copying import copy_numbers
from headrace.frames import Buffer
from headrace.types import BLOCK_TOKENS
from headrace_worker.kv.payload import (
    LAYOUT_VERSION,
    LEVELS,
    KvDtype,
    Payloads,
    block_bytes,
)
from headrace_worker.model.config import ModelConfig
from headrace_worker.native.pages import mapped

__all__ = ["LAYOUT_VERSION", "KvDtype", "KvPool", "quantize"]

_SCALE_MIN = 1e-30
"""Keeps zeros from being divided by zero."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] → int8 of its shape, and the scales [...] in its dtype.

    int8 times scale is within half a scale of x. A NaN or an infinity makes the scale one.
    """
    scales = (x.abs().amax(-1) / LEVELS).clamp_min_(_SCALE_MIN)
    return (x.float() / scales.float()[..., None]).round_().to(torch.int8), scales


class KvPool:
    """KV of `blocks` blocks for one model. Holds no bookkeeping: see policy/blocks.py.

    Chunk (block, layer, key or value) has the number (block * layers + layer) * 2, plus 1 for
    values. `exact`: what is read equals what was written.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        dtype: torch.dtype,
        kv_dtype: KvDtype = "auto",
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        """`memory`: where it lies, zeroed, room for a block more than `blocks`; None: its own."""
        self.blocks, self.dtype = blocks, dtype
        self.layers, self.kv_heads, self.head_dim = config.layers, config.kv_heads, config.head_dim
        self.padding_block = blocks
        self.exact = kv_dtype == "auto"
        size_bytes = (blocks + 1) * self.block_bytes(config, dtype, kv_dtype)
        memory = mapped(size_bytes) if memory is None else memory  # torch.zeros would write it
        assert len(memory) == size_bytes, "memory for all blocks and the padding one"
        self._bytes = memory.reshape(blocks + 1, -1)
        stored = torch.from_numpy(self._bytes).view(dtype if self.exact else torch.int8)
        self.tensor = stored.view(blocks + 1, self.layers, 2, -1)
        self._chunks = stored.view((blocks + 1) * self.layers * 2, -1)
        self._values, self._scales = self._split(self._chunks)
        self._checked = Payloads(config, dtype, kv_dtype)
        self.layout = self._checked.layout

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype, kv_dtype: KvDtype = "auto") -> int:
        """Size in bytes of one block's payload."""
        return block_bytes(config, dtype, kv_dtype)

    def _split(self, chunks: Tensor) -> tuple[Tensor, Tensor | None]:
        """n chunks as numbers [n, BLOCK_TOKENS, kv_heads, head_dim], and their scales, if any."""
        heads = (len(chunks), BLOCK_TOKENS, self.kv_heads)
        values = chunks[:, : BLOCK_TOKENS * self.kv_heads * self.head_dim]
        scales = chunks[:, values.shape[1] :]
        return (
            values.view(*heads, self.head_dim),
            None if self.exact else scales.view(self.dtype).view(heads),
        )

    def write(self, chunks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v [N, kv_heads, head_dim] of one layer.

        `chunks`, `offsets` int64 [2N]: in which chunk and at which token of it, for keys and then
        for values.
        """
        kv, places = torch.cat((k, v)), (chunks, offsets)
        if self._scales is None:
            self._values.index_put_(places, kv)
            return
        values, scales = quantize(kv)
        self._values.index_put_(places, values)
        self._scales.index_put_(places, scales)

    def read(self, chunks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, kv_heads, T, head_dim] of `count` sequences of equal length.

        `chunks`, int64: all sequences' key chunks, then all their value chunks.
        """
        values = self._chunks.index_select(0, chunks)
        if not self.exact:
            numbers, scales = self._split(values)
            assert scales is not None, "int8 has scales"
            values = numbers.to(self.dtype).mul_(scales[..., None])
        shape = (2, count, -1, self.kv_heads, self.head_dim)
        keys, values = values.view(shape).transpose(2, 3).unbind(0)
        return keys, values

    @property
    def payload_bytes(self) -> int:
        """Size in bytes of one block's payload."""
        return int(self._bytes.shape[1])

    @property
    def copies_quickly(self) -> bool:
        """Whether `copy_block` is done in C."""
        return self._checked.width > 0 and copying.state() == "native"

    def payload(self, block: int) -> NDArray[np.uint8]:
        """The block's payload where it lies: it changes as the block is written to."""
        assert 0 <= block < self.blocks, "no such block"
        row: NDArray[np.uint8] = self._bytes[block]
        return row

    def export_block(self, block: int) -> bytes:
        """A copy of the block's payload."""
        return self.payload(block).tobytes()

    def copy_block(self, block: int, target: NDArray[np.uint8]) -> int | None:
        """Writes the block's payload, as it is now, into `target`.

        In C, where that can be, it is summed and looked through by the way, see `Kv.copy_block`.
        """
        payload, width = self.payload(block), self._checked.width
        if width and len(target) == len(payload) and target.flags.c_contiguous:
            to, source = target.ctypes.data, payload.ctypes.data
            crc = copy_numbers(to, source, len(payload), width, self._checked.largest_bits)
            if crc is not None:
                return crc
        target[:] = payload
        return None

    def accepts(self, data: Buffer) -> bool:
        """Whether `data` can be a block's payload. Safe from any thread."""
        return self._checked.accepts(np.frombuffer(data, np.uint8))

    def import_block(self, block: int, data: Buffer) -> None:
        """Fills `block`. Raises ValueError, and zeroes it, for a payload that `accepts` refuses."""
        payload, row = np.frombuffer(data, np.uint8), self.payload(block)
        if len(payload) == self.payload_bytes:
            row[:] = payload
            if self._checked.accepts(row):  # what was copied, whatever becomes of the original
                return
        row[:] = 0
        raise ValueError(f"{len(payload)} bytes are not {self.payload_bytes} bytes of finite KV")

    def zero_blocks(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._bytes[block] = 0
