"""What a worker's own blocks take on their way to the cache: `python -m bench cache_worker`.

Blocks of a KV pool are offered to a worker's link (`cache_link.py`), as its engine does, and go
through its queue into the service's arena: looked up, named, copied, checked for numbers that are
none, summed, committed. All are new ones, so that each evicts. Nothing is computed meanwhile.
One thread's memcpy of the same sizes is measured in the same run (`cache.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.cache import BUDGET_BYTES, RING_BYTES, copy_rates, serve, wait_ready
from headrace import copying, logs, loops, turns
from headrace.cache_client import CacheClient
from headrace_worker.cache_link import CacheLink
from headrace_worker.kv.export import Export, ExportFacts
from headrace_worker.kv.pool import KvPool
from headrace_worker.model.config import ModelConfig
from headrace_worker.put_queue import BATCH_BLOCKS_MAX

CHAIN_BLOCKS = 64
OFFERED_MAX = 400
"""Blocks that wait or are under way; the queue drops what is more than it holds."""

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
"""SmolLM2's; a block of its bfloat16 is 368,640 bytes."""


def pool_of_numbers() -> KvPool:
    """A pool larger than the CPU's caches, full of finite numbers."""
    config = ModelConfig(
        "llama", 300, KV_HEADS * HEAD_DIM, 64, LAYERS, KV_HEADS, KV_HEADS, HEAD_DIM, 1e-5, 4096,
        False, (),
    )  # fmt: skip
    block_bytes = KvPool.block_bytes(config, torch.bfloat16)
    pool = KvPool(config, RING_BYTES // block_bytes, torch.bfloat16)
    numbers = np.random.default_rng(0)
    for block in range(pool.blocks):
        pool.payload(block)[:] = numbers.integers(0, 60, block_bytes, np.uint8)
    return pool


def exports_of(pool: KvPool) -> Iterator[Export]:
    """Blocks of the pool in turn, each time under another hash."""
    parent = b""
    for number in itertools.count():
        depth = number % CHAIN_BLOCKS
        key = f"{number:032d}".encode()
        facts = ExportFacts(key, parent if depth else b"", depth)
        read = partial(pool.copy_block, number % pool.blocks)
        quick = pool.copies_quickly
        yield Export(facts, pool.payload_bytes, read, pool.accepts, quick=quick)
        parent = key


async def write(link: CacheLink, exports: Iterator[Export], blocks: int) -> None:
    """Offer that many as fast as they are taken, and wait until they are written."""
    written = link.counts.written_blocks + blocks
    while blocks or link.counts.written_blocks < written:
        room = OFFERED_MAX - (written - blocks - link.counts.written_blocks)
        some = min(CHAIN_BLOCKS, blocks, max(0, room))
        link.store_later(list(itertools.islice(exports, some)))
        blocks -= some
        assert not link.counts.unwritten_blocks, "everything is written"
        await asyncio.sleep(0.0005)


async def measure(url: str, pool: KvPool, batches: int) -> tuple[float, float]:
    """Bytes a second, and the share of entries that found places ahead."""
    client = CacheClient(url, timeout_s=10, put_timeout_s=10)
    await wait_ready(client)
    link = CacheLink(client, layout=pool.layout, block_bytes=pool.payload_bytes)
    writers = asyncio.create_task(link.run())
    exports = exports_of(pool)
    await write(link, exports, BUDGET_BYTES // pool.payload_bytes + 1)  # evicts from here on
    began = time.perf_counter()
    await write(link, exports, batches * BATCH_BLOCKS_MAX)
    took_s = time.perf_counter() - began
    writers.cancel()
    await asyncio.gather(writers, return_exceptions=True)
    ahead = client.counts.puts_ahead / client.counts.puts_sent
    await link.close()
    return batches * BATCH_BLOCKS_MAX * pool.payload_bytes / took_s, ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", type=int, default=200, help=f"of {BATCH_BLOCKS_MAX} blocks")
    args = parser.parse_args()
    logs.setup("bench", level="error")
    copying.prepare()
    turns.ask(turns.SHORT_NS)  # as a worker does
    pool = pool_of_numbers()
    copied = copy_rates(BATCH_BLOCKS_MAX, pool.payload_bytes, 0.5)["memcpy"]
    with tempfile.TemporaryDirectory() as folder:
        url = f"unix://{Path(folder) / 'cache.sock'}"
        server = serve(url)
        try:
            with asyncio.Runner(loop_factory=loops.loop_factory()) as runner:
                rate, ahead = runner.run(measure(url, pool, args.batches))
        finally:
            server.terminate()
            server.wait()
    print(
        f"blocks of {pool.payload_bytes} bytes, copies {copying.state()}: {rate / 1e9:.2f} GB/s, "
        f"{100 * rate / copied:.0f} % of memcpy's {copied / 1e9:.2f}; "
        f"{100 * ahead:.0f} % of them to places had ahead"
    )


if __name__ == "__main__":
    main()
