"""Which attention backend a pool gets: the fastest that can be had here."""

from __future__ import annotations

from headrace_worker import native
from headrace_worker.attention.interface import AttentionBackend
from headrace_worker.attention.sdpa import SdpaBackend
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.config import ModelConfig
from headrace_worker.native.attention import NativeBackend, supports


def attention_over(pool: KvPool, config: ModelConfig) -> AttentionBackend:
    """A backend over `pool` for one model's windows and scale."""
    library = native.library()
    if library is not None and supports(config, pool.dtype):
        return NativeBackend(library, pool, config)
    return SdpaBackend(pool, config)
