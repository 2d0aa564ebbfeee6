"""Attention by the native kernels, straight from the pool's blocks.

Invariant: a row's result depends on its own sequence alone, bit for bit, whether it decodes or
stands in a chunk: see csrc/attention.inc.h. Nothing is gathered, no mask is made: a step costs
what its longest and its shortest sequences really have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace_worker.attention.interface import AttentionBatch
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.config import ModelConfig
from headrace_worker.native.abi import (
    KV_BF16,
    KV_F32,
    KV_INT8,
    Batch,
    Library,
    Pool,
    address_of,
)

HEAD_DIM_STEP = 16
"""Heads have to be a multiple of this."""
_KINDS = {torch.float32: KV_F32, torch.bfloat16: KV_BF16}


def supports(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels can attend for a model of this shape and dtype."""
    return config.head_dim % HEAD_DIM_STEP == 0 and dtype in _KINDS


class NativeBackend:
    """AttentionBackend over a KvPool, for one model's windows and scale."""

    def __init__(self, library: Library, pool: KvPool, config: ModelConfig) -> None:
        assert supports(config, pool.dtype), "asked before"
        self.library, self.config, self.dtype = library, config, pool.dtype
        self._kept = pool
        kind = _KINDS[pool.dtype]
        self.pool = Pool(
            base=address_of(pool.payload(0)),
            block_bytes=pool.payload_bytes,
            chunk_bytes=pool.payload_bytes // (2 * pool.layers),
            kind=kind if pool.exact else KV_INT8,
            scale_kind=kind,
            kv_heads=pool.kv_heads,
            head_dim=pool.head_dim,
        )

    def prepare(self, batch: AttentionBatch) -> NativeAttend:
        return NativeAttend(self, batch)


class Placed:
    """Who the rows of a step belong to, as the kernels take it: `batch`, and what it points to."""

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        starts: Sequence[int],
        slots: NDArray[np.int64],
    ) -> None:
        """As in AttentionBatch."""
        sizes = [len(table) for table in tables]
        blocks = np.fromiter(chain.from_iterable(tables), np.int32, sum(sizes))
        small = np.array((*starts, *lengths, *accumulate(sizes[:-1], initial=0)), np.int32)
        count, start = len(lengths), address_of(small)
        self._alive = (blocks, small, slots)
        self.batch = Batch(
            count,
            len(slots),
            start,
            start + 4 * (count + 1),
            address_of(blocks),
            start + 4 * (2 * count + 1),
            address_of(slots),
        )


class NativeAttend:
    """The `Attend` of one step."""

    def __init__(self, backend: NativeBackend, batch: AttentionBatch) -> None:
        self._backend = backend
        self._placed = Placed(
            batch.block_tables, batch.lengths, batch.query_starts, batch.slots.numpy()
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend = self._backend
        out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=torch.float32)
        backend.library.attend(
            backend.pool,
            self._placed.batch,
            layer,
            backend.config.scale,
            backend.config.window_of(layer),
            q.float().contiguous(),
            k.float().contiguous(),
            v.float().contiguous(),
            out,
        )
        return out.to(backend.dtype)
