"""The worker's link to the cache service: look up before computing, write back after.

Invariant: the cache can only save work. Every call has a time limit, any trouble is a miss, and
writes wait in a bounded queue that drops when full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from opentelemetry.trace import Span, SpanKind

from headrace import telemetry
from headrace.cache_client import CacheClient, PutEntry
from headrace.types import BLOCK_TOKENS, Band
from headrace_worker.results import BlockPayload

PUT_BLOCKS_MAX = 512
PUT_BATCH = 32


class CacheLink:
    """Fetches and stores KV blocks by hash."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client
        self._pending: asyncio.Queue[BlockPayload] = asyncio.Queue(PUT_BLOCKS_MAX)
        self.dropped = 0

    async def fetch(
        self, hashes: Sequence[bytes], parent: bytes, first_depth: int, band: Band, span: Span
    ) -> list[BlockPayload]:
        """The leading run of `hashes` that the service has; empty on any trouble.

        `parent` is the hash before `hashes[0]`, which is block number `first_depth` of its chain.
        `band` is the job's: being read for it raises the entries' class.
        """
        get = telemetry.tracer().start_span("cache lookup", telemetry.under(span), SpanKind.CLIENT)
        found = await self._client.get_run(hashes, telemetry.inject(get), band=band)
        blocks = []
        for depth, (block_hash, data) in enumerate(found, first_depth):
            blocks.append(BlockPayload(block_hash, parent, depth, data))
            parent = block_hash
        get.set_attributes(
            {
                "headrace.cache.tier": "cache-service",
                "headrace.cache.asked_blocks": len(hashes),
                "headrace.cache.hit_blocks": len(blocks),
                "headrace.cache.bytes": sum(len(block.data) for block in blocks),
            }
        )
        get.end()
        return blocks

    def store_later(self, blocks: Sequence[BlockPayload]) -> None:
        """Queue `blocks` for writing; what does not fit is dropped and counted."""
        for block in blocks:
            try:
                self._pending.put_nowait(block)
            except asyncio.QueueFull:
                self.dropped += 1

    async def run(self) -> None:
        """Write queued blocks until cancelled, a batch at a time, skipping those that are there."""
        while True:
            batch = [await self._pending.get()]
            while len(batch) < PUT_BATCH and not self._pending.empty():
                batch.append(self._pending.get_nowait())
            present = await self._client.has([block.hash for block in batch])
            missing = [b for b, there in zip(batch, present, strict=True) if not there]
            if missing:
                await self._client.put([_entry(block) for block in missing])
            for _ in batch:
                self._pending.task_done()

    async def flushed(self) -> None:
        await self._pending.join()

    async def close(self) -> None:
        await self._client.close()


def _entry(block: BlockPayload) -> PutEntry:
    return PutEntry(
        hash=block.hash,
        data=block.data,
        parent=block.parent,
        depth=block.depth,
        band=block.band,
        tenant=block.tenant,
        cost_tokens=BLOCK_TOKENS,
    )
