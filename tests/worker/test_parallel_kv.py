"""KV of several ranks as one pool: blocks come and go as whole models' payloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace_worker.kv.parts import PartedKv
from headrace_worker.kv.payload import KvDtype
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.rope import plain
from headrace_worker.parallel.shape import Shape, part_of
from worker.test_parallel_shape import config

BLOCKS = 5
MODEL = config(layers=6, heads=12, kv_heads=2, head_dim=16, ropes=(plain(16, 10_000.0),))


def parted(shape: Shape, dtype: torch.dtype, kv_dtype: KvDtype) -> tuple[PartedKv, list[KvPool]]:
    parts = [part_of(MODEL, shape, rank) for rank in range(shape.ranks)]
    pools = [KvPool(part.config, BLOCKS, dtype, kv_dtype) for part in parts]
    return PartedKv(list(zip(parts, pools, strict=True)), MODEL, dtype, kv_dtype), pools


def written(pool: KvPool, seed: int, heads: slice = slice(None), layers: range = range(6)) -> None:
    """The same keys and values for each layer and head, whichever pool holds them."""
    source = torch.Generator().manual_seed(seed)
    for layer in range(6):
        k, v = torch.randn(2, 16, 2, 16, generator=source).to(pool.dtype)
        if layer in layers:
            chunk = (3 * pool.layers + layer - layers.start) * 2
            places = torch.arange(16).repeat(2)
            chunks = torch.tensor([chunk] * 16 + [chunk + 1] * 16)
            pool.write(chunks, places, k[:, heads], v[:, heads])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(1, 3), Shape(2, 1), Shape(4, 1), Shape(2, 2)])
def test_a_block_is_the_same_however_it_is_held(shape: Shape, dtype: Any, kv_dtype: Any) -> None:
    """Out of parts and into parts, bit for bit the block of one process."""
    alone = KvPool(MODEL, BLOCKS, dtype, kv_dtype)
    written(alone, 1)
    kv, pools = parted(shape, dtype, kv_dtype)
    for rank, pool in enumerate(pools):
        part = part_of(MODEL, shape, rank)
        written(pool, 1, slice(part.kv_heads.start, part.kv_heads.stop), part.layers)
    assert kv.layout == alone.layout and kv.payload_bytes == alone.payload_bytes
    assert kv.export_block(3) == alone.export_block(3)
    kv.import_block(1, alone.export_block(3))
    assert kv.export_block(1) == alone.export_block(3)
    for pool in pools:
        assert pool.export_block(1) == pool.export_block(3), "every copy of a head is filled"
    kv.zero_blocks([3])
    assert not any(any(pool.export_block(3)) for pool in pools)
    assert any(kv.export_block(1)), "a block more stays"


def test_what_is_no_kv_is_left_out() -> None:
    kv, pools = parted(Shape(2, 2), torch.float32, "auto")
    good = np.ones(kv.payload_bytes // 4, np.float32)
    kv.import_block(0, good.tobytes())
    bad = good.copy()
    bad[-1] = np.inf
    for payload in (bad.tobytes(), good.tobytes()[:-4]):
        assert not kv.accepts(payload)
        with pytest.raises(ValueError, match="finite KV"):
            kv.import_block(0, payload)
        assert not any(any(pool.export_block(0)) for pool in pools)
