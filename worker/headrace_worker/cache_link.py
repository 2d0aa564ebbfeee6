"""The worker's link to the cache service: look up before computing, write what was computed.

Invariant: the cache can only save work. Every call has a time limit, any trouble is a miss, and
writes wait in a bounded queue that drops when full. What a lookup lent stays lent until the engine
has taken it in, whatever becomes of the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from opentelemetry.trace import Span, SpanKind

from headrace import telemetry
from headrace.cache_client import CacheClient, ReadRun, WriteEntry
from headrace.cache_cluster import CacheCluster
from headrace.clock import Clock, SystemClock
from headrace.frames import PIN_MS_MAX
from headrace.types import BLOCK_TOKENS, Job
from headrace_worker.cache_counts import CacheCounts
from headrace_worker.kv.export import Export, State, WithdrawnError
from headrace_worker.policy.fetching import NO_TIER, Fetch, Reason, Speeds, Wanted, plan
from headrace_worker.put_queue import BATCHES_MAX, PutQueue
from headrace_worker.results import BlockPayload, MissingRun, Outlook

ROUNDS_MAX = 8
"""Parts of one lookup; each is planned on what the one before took."""
LOOKUP_MS_MAX = 500
"""Of one lookup, all parts together, where the settings do not say."""

Client = CacheClient | CacheCluster


class Fetched:
    """What a lookup brought. `blocks` are lent: `close` it, in the event loop, when they are used.

    `saved_ms` is what computing them would take, less what fetching them took; 0 where the engine
    has not computed anything to measure by.
    """

    def __init__(self) -> None:
        self.blocks: list[BlockPayload] = []
        self.tier = NO_TIER
        self.asked = 0
        self.bytes = 0
        self.took_ms = 0.0
        self.saved_ms = 0.0
        self.reason = Reason.NO_TIME
        self._lent = AsyncExitStack()
        self._closing: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Give back what was lent. Any time, any number of times."""
        self.blocks = []
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._lent.aclose())

    def add(self, run: ReadRun, missing: MissingRun) -> None:
        parent = self.blocks[-1].hash if self.blocks else missing.parent
        for block_hash, data in zip(run.hashes, run.blocks, strict=True):
            depth = missing.first + len(self.blocks)
            self.blocks.append(BlockPayload(block_hash, parent, depth, data))
            parent = block_hash
        self.bytes += run.bytes
        self.took_ms += run.took_ms
        if run.blocks:
            self.tier = run.tier

    @property
    def lent(self) -> AsyncExitStack:
        return self._lent


@dataclass(slots=True)
class _Writes:
    """Of one job that runs: what of its prompt is being written, and what has been."""

    open: int = 0
    written_tokens: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class CacheLink:
    """Fetches and stores KV blocks by hash."""

    def __init__(
        self,
        client: Client,
        *,
        layout: bytes,
        block_bytes: int,
        limit_ms: int = LOOKUP_MS_MAX,
        clock: Clock | None = None,
    ) -> None:
        """`layout` and `block_bytes` are the engine's blocks'. A lookup may take `limit_ms`."""
        self._client = client
        self._layout = layout
        self._block_bytes = block_bytes
        self._limit_ms = limit_ms
        self._clock = clock or SystemClock()
        self._puts = PutQueue()
        self._writes: dict[str, _Writes] = {}
        self.speeds = Speeds()
        self.counts = CacheCounts()

    # reading

    async def fetch(self, job: Job, missing: MissingRun, outlook: Outlook, span: Span) -> Fetched:
        """The leading run of what `job` is `missing`, as far as fetching it is expected to pay.

        Nothing on any trouble. The caller closes what it gets. `span` is the job's.
        """
        get = telemetry.tracer().start_span("cache lookup", telemetry.under(span), SpanKind.CLIENT)
        fetched = Fetched()
        try:
            await self._fetch_rounds(fetched, job, missing, outlook, telemetry.inject(get))
        except BaseException:
            fetched.close()
            raise
        finally:
            get.set_attributes(_told(fetched, missing))
            get.end()
        self.counts.note_lookup(
            fetched.reason.name.lower(),
            fetched.tier,
            len(fetched.blocks),
            fetched.bytes,
            fetched.took_ms,
            fetched.saved_ms,
        )
        return fetched

    async def _fetch_rounds(
        self,
        fetched: Fetched,
        job: Job,
        missing: MissingRun,
        outlook: Outlook,
        trace: dict[str, str],
    ) -> None:
        for number in range(ROUNDS_MAX):
            now_ms = self._clock.now_ms()
            at = len(fetched.blocks)
            wanted = Wanted(
                len(missing.hashes) - at,
                self._block_bytes,
                outlook.token_ms,
                max(0.0, outlook.wait_ms(job.band) - fetched.took_ms),
                self._limit_ms - fetched.took_ms,
                fetched.tier,
            )
            if not wanted.blocks:
                break
            fetch = plan(wanted, self.speeds, now_ms)
            if fetch.blocks or not number:
                fetched.reason = fetch.reason
            if not fetch.blocks:
                break
            if fetch.reason is Reason.PROBE:
                self.speeds.note_probe(now_ms)
            hashes = missing.hashes[at : at + fetch.blocks]
            reading = self._client.read(
                hashes, band=job.band, tenant=job.tenant, layout=self._layout, trace=trace
            )
            run = await fetched.lent.enter_async_context(reading)
            self._note_run(fetched, fetch, run)
            fetched.add(run, missing)
            if len(run.blocks) < fetch.blocks:
                break
        if outlook.token_ms:
            computed_ms = len(fetched.blocks) * BLOCK_TOKENS * outlook.token_ms
            fetched.saved_ms = computed_ms - fetched.took_ms

    def _note_run(self, fetched: Fetched, fetch: Fetch, run: ReadRun) -> None:
        fetched.asked += fetch.blocks
        self.speeds.note(
            asked=fetch.blocks,
            found=len(run.blocks),
            tier=run.tier,
            size_bytes=run.bytes,
            took_ms=run.took_ms,
            now_ms=self._clock.now_ms(),
        )

    # writing

    def store_later(self, exports: Sequence[Export]) -> None:
        """Queue `exports` for writing; what does not fit is dropped and counted."""
        for export in exports:
            if not self._puts.offer(export):
                export.drop()
                self.counts.unwritten_blocks += 1
                continue
            if export.facts.job:
                self._writes.setdefault(export.facts.job, _Writes()).open += 1

    async def run(self) -> None:
        """Write queued blocks until cancelled, BATCHES_MAX batches at a time."""
        async with asyncio.TaskGroup() as writers:
            for _ in range(BATCHES_MAX):
                writers.create_task(self._write_batches())

    async def _write_batches(self) -> None:
        while True:
            batch = await self._puts.take()
            try:
                await self._write(batch)
            finally:
                for export in batch:
                    export.drop()
                    self._settle(export)
                self._puts.done(batch)

    async def _write(self, batch: Sequence[Export]) -> None:
        """Write what is not there, and keep what is to be kept."""
        present = await self._client.has([export.facts.hash for export in batch])
        there = dict(zip(batch, present, strict=True))
        for export in batch:
            if there[export] and not export.facts.pin_ms:
                export.settle()
        asked = [export for export in batch if export.state is State.OFFERED]
        if not asked:
            return
        try:
            kept = await self._client.write([self._entry(export) for export in asked])
        except WithdrawnError:
            self.counts.unwritten_blocks += len(asked)
            return  # it was withdrawn while it waited; the others are written when they give way
        written = [export for export in asked if not there[export]]
        if not kept:
            held = await self._client.has([export.facts.hash for export in written])
            self.counts.unwritten_blocks += held.count(False)
            written = [export for export, there in zip(written, held, strict=True) if there]
        for export in asked:
            if there[export]:
                export.settle()
        for export in written:
            self._note_written(export)

    def _entry(self, export: Export) -> WriteEntry:
        facts = export.facts
        return WriteEntry(
            hash=facts.hash,
            size_bytes=export.size_bytes,
            fill=export.fill,
            parent=facts.parent,
            depth=facts.depth,
            band=facts.band,
            tenant=facts.tenant,
            cost_tokens=BLOCK_TOKENS,
            cost_ms=facts.cost_ms,
            layout=self._layout,
            pin_ms=min(facts.pin_ms, PIN_MS_MAX),
            quick=export.quick,
        )

    def _note_written(self, export: Export) -> None:
        self.counts.written_blocks += 1
        self.counts.written_bytes += export.size_bytes
        writes = self._writes.get(export.facts.job)
        if writes is not None:
            writes.written_tokens += BLOCK_TOKENS

    def _settle(self, export: Export) -> None:
        writes = self._writes.get(export.facts.job)
        if writes is not None:
            writes.open -= 1
            if not writes.open:
                writes.settled.set()

    # what a running job is told

    def written_tokens(self, job_id: str) -> int:
        """Of the job's prompt, as far as the service has them by now."""
        writes = self._writes.get(job_id)
        return writes.written_tokens if writes is not None else 0

    def is_writing(self, job_id: str) -> bool:
        writes = self._writes.get(job_id)
        return writes is not None and writes.open > 0

    async def written(self, job_id: str) -> None:
        """Wait until what the job has offered so far is written, or given up."""
        while self.is_writing(job_id):
            writes = self._writes[job_id]
            writes.settled.clear()
            await writes.settled.wait()

    def forget(self, job_id: str) -> None:
        """The job has ended: nobody asks for it any more."""
        writes = self._writes.pop(job_id, None)
        if writes is not None:
            writes.settled.set()

    async def flushed(self) -> None:
        await self._puts.flushed()

    async def close(self) -> None:
        await self._client.close()

    def check_integrity(self) -> None:
        """No more is open for jobs than is queued or being written."""
        counts = [writes.open for writes in self._writes.values()]
        assert min(counts, default=0) >= 0, "settled more often than queued"
        assert sum(counts) <= self._puts.blocks, "open without an export"
        self._puts.check_integrity()


def _told(fetched: Fetched, missing: MissingRun) -> dict[str, str | int | float]:
    """What a trace tells of a lookup."""
    return {
        "headrace.cache.tier": fetched.tier,
        "headrace.cache.missing_blocks": len(missing.hashes),
        "headrace.cache.asked_blocks": fetched.asked,
        "headrace.cache.hit_blocks": len(fetched.blocks),
        "headrace.cache.bytes": fetched.bytes,
        "headrace.cache.fetch_ms": round(fetched.took_ms, 3),
        "headrace.cache.saved_ms": round(fetched.saved_ms, 3),
        "headrace.cache.reason": fetched.reason.value,
    }
