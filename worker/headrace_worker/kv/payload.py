"""How a KV block's numbers stand in its payload, and which of them are a part's.

Layout `LAYOUT_VERSION`: [layer][key, value][token][kv_head][head_dim]. With `kv_dtype` int8 the
numbers of a layer's keys, or values, are int8, and behind them stand their scales in the model's
dtype, [token][kv_head].

Invariant: a payload is that of the whole model, however many ranks hold it between them: each
copies its layers and heads out of it and into it. So blocks go from any worker to any other of the
same model, and the cache service keeps one kind. Rejected: payloads by rank, which only workers
of equal shape could exchange, and which make an entry of each rank's piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.frames import LAYOUT_BYTES
from headrace.types import BLOCK_TOKENS
from headrace_worker.model.config import ModelConfig

LAYOUT_VERSION = 1
LEVELS = 127
"""The largest int8 number that is used."""

KvDtype = Literal["auto", "int8"]
"""How keys and values are kept: as the model computes them, or rounded to int8."""

Bytes = NDArray[np.uint8]

_BITS: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32}


class Payloads:
    """The payloads of one model's blocks, or of the blocks of a part of it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kv_dtype: KvDtype) -> None:
        self._layers, self._kv_heads = config.layers, config.kv_heads
        self._head_dim, self._itemsize = config.head_dim, dtype.itemsize
        self._exact = kv_dtype == "auto"
        self._chunk_values = BLOCK_TOKENS * config.kv_heads * config.head_dim
        self.bytes = block_bytes(config, dtype, kv_dtype)
        """Size of one."""
        self.width = dtype.itemsize if self._exact else 0
        """Of its numbers, where a payload is nothing but numbers, in bytes; else 0."""
        self.largest_bits = _bits_of(
            torch.finfo(dtype).max / (1 if self._exact else LEVELS + 1), dtype
        )
        shape = (config.layers, config.kv_heads, config.head_dim, BLOCK_TOKENS)
        facts = (LAYOUT_VERSION, *shape, str(dtype), kv_dtype, self.bytes)
        self.layout = hashlib.sha256(repr(facts).encode()).digest()[:LAYOUT_BYTES]
        """Names how the numbers are arranged; only who has the same can use them."""

    def accepts(self, payload: Bytes) -> bool:
        """Whether its length is right and no number in it is infinite or none at all.

        Without their sign bits, numbers are in the order of their bits, infinities and NaN last.
        Of int8 blocks the scales are looked at. Safe from any thread.
        """
        if len(payload) != self.bytes:
            return False
        if not self._exact:
            payload = payload.reshape(self._layers * 2, -1)[:, self._chunk_values :].ravel()
        bits = payload.view(_BITS[self._itemsize])
        unsigned = bits & np.array(2 ** (8 * self._itemsize - 1) - 1, bits.dtype)
        return int(unsigned.max()) <= self.largest_bits

    def sections(self, payload: Bytes) -> Iterator[Bytes]:
        """The payload's numbers, then its scales if it has any: views.

        Each [layers, key or value, token, kv_head, bytes of its numbers].
        """
        chunks = payload.reshape(self._layers, 2, -1)
        shape = (self._layers, 2, BLOCK_TOKENS, self._kv_heads, -1)
        if self._exact:
            yield chunks.reshape(shape)
            return
        yield _split(chunks[..., : self._chunk_values], shape)
        yield _split(chunks[..., self._chunk_values :], shape)


def _split(chunks: Bytes, shape: tuple[int, ...]) -> Bytes:
    """`chunks` in another shape, as a view."""
    view = chunks.view()
    *sizes, rest = shape
    view.shape = (*sizes, chunks.size // int(np.prod(sizes))) if rest == -1 else shape
    return view


def block_bytes(config: ModelConfig, dtype: torch.dtype, kv_dtype: KvDtype) -> int:
    """Size in bytes of one block's payload."""
    if kv_dtype == "auto":
        return config.kv_values_per_token * BLOCK_TOKENS * dtype.itemsize
    scales = config.kv_values_per_token // config.head_dim
    return (config.kv_values_per_token + scales * dtype.itemsize) * BLOCK_TOKENS


def _bits_of(number: float, dtype: torch.dtype) -> int:
    """The bits of `number` in `dtype`, as an integer."""
    raw = torch.tensor([number], dtype=dtype).view(torch.uint8).numpy()
    return int(raw.view(_BITS[dtype.itemsize])[0])
