"""The KV of ranks that share no memory, on several hosts or GPUs: rank 0 has its part alone.

Invariant: no block leaves or enters such a worker, as nobody could put it together but in a round
trip between two steps; its prefix cache is its own. What has to be zeroed is, on every rank, before
the step after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.frames import Buffer
from headrace_worker.kv.paged import PagedKvPool
from headrace_worker.kv.payload import Payloads
from headrace_worker.kv.pool import KvDtype, KvPool
from headrace_worker.model.config import ModelConfig
from headrace_worker.parallel import commands


class DistantKv:
    """What the engine does with KV, where most of it lies elsewhere."""

    copies_quickly = False

    def __init__(
        self,
        own: KvPool | PagedKvPool,
        whole: ModelConfig,
        dtype: torch.dtype,
        kv_dtype: KvDtype,
        command: Callable[[bytes], None],
    ) -> None:
        self._own, self._command = own, command
        payloads = Payloads(whole, dtype, kv_dtype)
        self.layout, self.payload_bytes = payloads.layout, payloads.bytes
        self.blocks = own.blocks

    def zero_blocks(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        if blocks:
            self._own.zero_blocks(blocks)
            self._command(commands.pack_blocks(blocks))

    def accepts(self, data: Buffer) -> bool:  # noqa: ARG002  # the shape of KvPool.accepts
        return False

    def copy_block(self, block: int, target: NDArray[np.uint8]) -> None:  # noqa: ARG002
        raise AssertionError("no block leaves ranks that share no memory")

    def import_block(self, block: int, data: Buffer) -> None:  # noqa: ARG002
        raise ValueError("no block enters ranks that share no memory")
