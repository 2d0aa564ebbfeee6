"""Blocks that wait to be written to the cache service, and the batches that are under way.

Invariant: what waits is bounded, and what is under way: BATCHES_MAX batches of BATCH_BYTES_MAX each
(and at least a block). Batches begin in the order in which their blocks were offered, parents
first, and no block is in two of them: the second would find it neither there nor wanted. A batch
begins beside another only if it is a whole one: then the one is copied while the service finds
places for the other or is told that it is written. What comes in a trickle is written in one batch
after the other, as each takes the service as long as copying some blocks.
Rejected: a loop for each batch over one plain queue, which halves the batches of a trickle.
"""

from __future__ import annotations

import asyncio
from collections import deque

from headrace_worker.kv.export import Export

BLOCKS_MAX = 512
"""That wait."""
BATCH_BLOCKS_MAX = 32
BATCH_BYTES_MAX = 32 * 1024 * 1024
BATCHES_MAX = 2
"""Under way at a time."""


class PutQueue:
    """Belongs to one event loop. Who `take`s a batch says `done`, whatever became of it."""

    def __init__(self) -> None:
        self._waiting: deque[Export] = deque()
        self._under_way: list[list[Export]] = []
        self._news = asyncio.Event()

    @property
    def blocks(self) -> int:
        """Waiting or under way."""
        return len(self._waiting) + sum(map(len, self._under_way))

    def offer(self, export: Export) -> bool:
        """Have `export` wait; False where there is no room."""
        if len(self._waiting) >= BLOCKS_MAX:
            return False
        self._waiting.append(export)
        self._news.set()
        return True

    async def take(self) -> list[Export]:
        """The next batch, as soon as it may begin."""
        while not self.can_begin():
            self._news.clear()
            await self._news.wait()
        batch = [self._waiting.popleft() for _ in range(self._length())]
        self._under_way.append(batch)
        return batch

    def can_begin(self) -> bool:
        """Whether the next batch may begin now."""
        if not self._waiting or len(self._under_way) >= BATCHES_MAX:
            return False
        if not self._under_way:
            return True
        length = self._length()
        if length == len(self._waiting) and length < BATCH_BLOCKS_MAX:
            return False
        busy = {export.facts.hash for batch in self._under_way for export in batch}
        return not any(self._waiting[place].facts.hash in busy for place in range(length))

    def _length(self) -> int:
        """How many of those that wait the next batch has."""
        size_bytes = 0
        for count, export in enumerate(self._waiting):
            size_bytes += export.size_bytes
            if count == BATCH_BLOCKS_MAX or (count and size_bytes > BATCH_BYTES_MAX):
                return count
        return len(self._waiting)

    def done(self, batch: list[Export]) -> None:
        self._under_way.remove(batch)
        self._news.set()

    async def flushed(self) -> None:
        """Wait until nothing waits or is under way."""
        while self.blocks:
            self._news.clear()
            await self._news.wait()

    def check_integrity(self) -> None:
        """Assert that the limits hold, and that no block is under way twice."""
        assert len(self._waiting) <= BLOCKS_MAX and len(self._under_way) <= BATCHES_MAX
        seen: set[bytes] = set()
        for batch in self._under_way:
            assert 1 <= len(batch) <= BATCH_BLOCKS_MAX, "batches are bounded"
            size_bytes = sum(export.size_bytes for export in batch)
            assert len(batch) == 1 or size_bytes <= BATCH_BYTES_MAX, "so are their bytes"
            hashes = {export.facts.hash for export in batch}
            assert not hashes & seen, "a block is written once at a time"
            seen |= hashes
