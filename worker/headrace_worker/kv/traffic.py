"""KV that goes to the cache service or another worker and comes from it: books and bytes.

Invariant: a block that is offered keeps its bytes until they are taken: whoever hands it out again
tells `note_evicted` before it is overwritten. What comes in is held against the sequence's own
chain and checked; a cache can be wrong, an answer cannot. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.frames import Buffer
from headrace.types import Band
from headrace_worker.kv.export import Export, ExportFacts, State
from headrace_worker.policy.blocks import BlockPool, CachedBlock
from headrace_worker.policy.sequence import Sequence
from headrace_worker.results import BlockPayload

COPIES_BYTES_MAX = 64 * 1024 * 1024
"""Of blocks that were handed out again before the cache service had them."""


class Kv(Protocol):
    """Where blocks lie: one pool, or the parts that ranks have of one. See KvPool."""

    layout: bytes

    @property
    def payload_bytes(self) -> int: ...

    @property
    def copies_quickly(self) -> bool:
        """Whether `copy_block` is a copy in memory, made without Python's lock."""
        ...

    def copy_block(self, block: int, target: NDArray[np.uint8]) -> int | None:
        """Writes the block's payload, as it is now, into `target`. Any thread may call it.

        The CRC-32C of what was written, -1 where `accepts` would refuse it, None if nobody looked.
        """
        ...

    def accepts(self, data: Buffer) -> bool: ...

    def import_block(self, block: int, data: Buffer) -> None: ...

    def zero_blocks(self, blocks: Iterable[int]) -> None: ...


class Traffic:
    """What of one pool has been offered. With `offers` false, nothing is."""

    def __init__(self, pool: BlockPool, kv: Kv, *, offers: bool) -> None:
        self._pool = pool
        self._kv = kv
        self._offers = offers
        self._open: dict[int, list[Export]] = {}
        """Exports by block, as long as it holds what they are of; settled ones among them."""
        self._lent: dict[int, list[Export]] = {}
        """As `_open`, of what goes to other workers."""
        self._copies: list[Export] = []
        self._made: list[Export] = []
        self._made_lent: list[Export] = []

    def take(self) -> list[Export]:
        """What was offered since the last call, parents first."""
        made, self._made = self._made, []
        return made

    def offer(
        self, cached: CachedBlock, *, job: str = "", pin_ms: int = 0, cost_ms: float = 0.0
    ) -> bool:
        """Offers a block of the pool, in place; whether that is so."""
        if not self._offers:
            return False
        cached.offered = True
        facts = ExportFacts(
            cached.hash,
            cached.parent,
            cached.depth,
            cached.band,
            cached.tenant,
            job,
            pin_ms,
            cost_ms,
        )
        export = self._export(facts, cached.block)
        still = [e for e in self._open.get(cached.block, ()) if e.state is State.OFFERED]
        self._open[cached.block] = [*still, export]
        self._made.append(export)
        return True

    def _export(self, facts: ExportFacts, block: int) -> Export:
        kv = self._kv
        read = partial(kv.copy_block, block)
        return Export(facts, kv.payload_bytes, read, kv.accepts, quick=kv.copies_quickly)

    def take_lent(self) -> list[Export]:
        """What was lent since the last call, parents first."""
        made, self._made_lent = self._made_lent, []
        return made

    def lend(self, sequence: Sequence, first: int) -> int:
        """Lends the full blocks from number `first` to who goes on with the job; how many it has
        now been lent."""
        for index in range(first, sequence.registered):
            # another block may hold the same, and then that one can be found
            found = self._pool.match_prefix([sequence.block_hash(index)])
            cached = self._pool.cached(found[0]) if found else None
            if cached is None:
                continue
            facts = ExportFacts(
                cached.hash,
                cached.parent,
                cached.depth,
                sequence.band,
                sequence.tenant,
                sequence.id,
            )
            export = self._export(facts, cached.block)
            still = [e for e in self._lent.get(cached.block, ()) if e.state is State.OFFERED]
            self._lent[cached.block] = [*still, export]
            self._made_lent.append(export)
        return max(first, sequence.registered)

    def note_evicted(self, evicted: Iterable[CachedBlock], *, cost_ms: float = 0.0) -> None:
        """Copies those that the service has not been offered, or has not taken yet.

        `cost_ms` is what computing a block takes.
        """
        for cached in evicted:
            exports = self._open.pop(cached.block, [])
            if exports and exports[-1].state is State.DROPPED:
                cached.offered = False
            if not cached.offered and self.offer(cached, cost_ms=cost_ms):
                exports += self._open.pop(cached.block)
            for export in (*exports, *self._lent.pop(cached.block, ())):
                if export.state is State.OFFERED:
                    self._keep(export)

    def _keep(self, export: Export) -> None:
        self._copies = [copy for copy in self._copies if copy.state is State.OFFERED]
        if sum(copy.size_bytes for copy in self._copies) + export.size_bytes > COPIES_BYTES_MAX:
            export.drop()
            return
        export.keep()
        self._copies.append(export)

    def forget(self, blocks: Iterable[int]) -> None:
        """What `blocks` hold cannot be trusted: nobody finds it, or is given it, again."""
        blocks = list(blocks)
        for block in blocks:
            for export in (*self._open.pop(block, ()), *self._lent.pop(block, ())):
                export.drop()
        self._pool.forget(blocks)

    def load(
        self, sequence: Sequence, payloads: Iterable[BlockPayload], *, cost_ms: float = 0.0
    ) -> frozenset[bytes]:
        """Puts into the pool what continues the resident prefix; the hashes taken.

        What does not fit the sequence's own chain, or is no valid KV, is left out and computed.
        """
        by_hash = {payload.hash: payload for payload in payloads}
        if not by_hash:
            return frozenset()
        hashes = sequence.reusable_hashes()
        chain = self._pool.match_prefix(hashes)
        # held meanwhile: the chain itself must not give way to its own continuation
        self._pool.acquire(chain)
        taken: set[bytes] = set()
        for index in range(len(chain), len(hashes)):
            block_hash = hashes[index]
            resident = self._pool.match_prefix([block_hash])
            if not resident:
                payload = by_hash.get(block_hash)
                if payload is None or not self._pool.can_allocate(1):
                    break
                block = self._load_one(sequence, index, payload, cost_ms)
                if block is None:
                    break
                resident = [block]
                taken.add(block_hash)
            self._pool.acquire(resident)
            chain += resident
        self._pool.release(chain, sequence.band)
        return frozenset(taken)

    def take_in(
        self, payloads: Iterable[BlockPayload], band: Band, tenant: str, *, cost_ms: float = 0.0
    ) -> int:
        """Puts into the pool what another worker computed for a job that will come; how many.

        Nobody's for now: they give way as others do that came last.
        """
        taken = 0
        for payload in payloads:
            if self._pool.contains(payload.hash):
                continue
            if not self._pool.can_allocate(1):
                break
            taken += self._adopt(payload, payload.parent, payload.depth, band, tenant, cost_ms) >= 0
        return taken

    def _load_one(
        self, sequence: Sequence, index: int, payload: BlockPayload, cost_ms: float
    ) -> int | None:
        """The block that holds `payload` now; None, and it is free, if that is no valid KV."""
        parent = sequence.parent_hash(index)
        block = self._adopt(payload, parent, index, sequence.band, sequence.tenant, cost_ms)
        return block if block >= 0 else None

    def _adopt(
        self,
        payload: BlockPayload,
        parent: bytes,
        depth: int,
        band: Band,
        tenant: str,
        cost_ms: float,
    ) -> int:
        """The block that holds `payload` now; -1 if that is no valid KV."""
        block = self._pool.adopt(payload.hash, parent, depth, band, tenant)
        self.note_evicted(self._pool.take_evicted(), cost_ms=cost_ms)  # before it is overwritten
        try:
            self._kv.import_block(block, payload.data)
        except ValueError:
            self.forget([block])
            return -1
        return block

    def check_integrity(self) -> None:
        """Only blocks that can be found are on offer in place."""
        for block, exports in (*self._open.items(), *self._lent.items()):
            if any(export.state is State.OFFERED for export in exports):
                cached = self._pool.cached(block)
                assert cached is not None, "an offered block was forgotten"
                assert exports[-1].facts.hash == cached.hash, "an offered block changed hands"
