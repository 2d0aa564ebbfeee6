"""The cache service as its users see it: it answers in time, or it is as if it were empty.

Invariants: no trouble of the service reaches the caller as an exception or as a wait beyond the
time limit; what is returned has the CRC its writer computed. Gets and puts have a connection each,
so that a large put never stands before a get.
Rejected: waiting for room in the queue of puts. A worker has better things to do than to cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from headrace.cache_lane import ClientCounts, Lane
from headrace.clock import Clock, SystemClock
from headrace.frames import (
    COST_MAX,
    DEPTH_MAX,
    ENTRY_BYTES_MAX,
    KINDS,
    KV,
    TENANT_CHARS_MAX,
    Ask,
    Buffer,
    Counted,
    EntryFacts,
    EntryKey,
    Found,
    Get,
    Has,
    Known,
    Put,
    Stats,
    Verify,
    parse_address,
)
from headrace.policy.hashing import HASH_BYTES
from headrace.types import Band

GET_TIMEOUT_S = 0.5
PUT_TIMEOUT_S = 5.0

KEYS_PER_ROUND = 64
"""Keys in one get: what came before a time limit struck is returned, round by round."""

PUT_FRAME_BYTES_MAX = 16 * 1024 * 1024
PUT_FRAME_ENTRIES_MAX = 256
PUT_QUEUE_BYTES_MAX = 256 * 1024 * 1024
PUT_QUEUE_ENTRIES_MAX = 4096

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PutEntry:
    """An entry to put. `data` must stay as it is until the put is over.

    The other fields are EntryFacts', where they are explained.
    """

    hash: bytes
    data: Buffer
    parent: bytes = b""
    depth: int = 0
    band: Band = Band.STANDARD
    tenant: str = ""
    cost_tokens: int = 0
    cost_ms: float = 0.0
    kind: str = KV


@dataclass(frozen=True, slots=True)
class _Offer:
    entries: tuple[PutEntry, ...]
    trace: Mapping[str, str]
    done: asyncio.Future[bool]

    @property
    def size_bytes(self) -> int:
        return sum(len(entry.data) for entry in self.entries)


class CacheClient:
    """Reads and writes entries. Belongs to one event loop; `close()` it there."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = GET_TIMEOUT_S,
        put_timeout_s: float = PUT_TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        """`url` is `tcp://host:port` or `unix:///path`. Raises SettingsError if it is neither."""
        address = parse_address(url)
        self.counts = ClientCounts()
        self._timeout_s = timeout_s
        self._put_timeout_s = put_timeout_s
        clock = clock or SystemClock()
        self._gets = Lane(address, clock, self.counts)
        self._puts = Lane(address, clock, self.counts)
        self._queue: deque[_Offer] = deque()
        self._queued_bytes = 0
        self._queued_entries = 0
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    async def get_run(
        self,
        hashes: Sequence[bytes],
        trace: Mapping[str, str] | None = None,
        *,
        kind: str = KV,
        band: Band | None = None,
    ) -> list[tuple[bytes, memoryview]]:
        """The leading run of `hashes` that the service holds, each with its bytes.

        `band` is the class of the request they are read for: it raises theirs. `trace` are the
        W3C headers of the caller's span. Each memoryview is the caller's own, and writable.
        """
        keys = _keys(hashes, kind)
        found: list[tuple[bytes, memoryview]] = []
        left_s = _countdown(self._timeout_s)
        more = True
        while more and len(found) < len(keys) and left_s() > 0:
            asked = keys[len(found) : len(found) + KEYS_PER_ROUND]
            run, more = await self._get_round(asked, trace or {}, band, left_s)
            found += run
        self.counts.hits += len(found)
        self.counts.misses += len(keys) - len(found)
        return found

    async def _get_round(
        self,
        keys: tuple[EntryKey, ...],
        trace: Mapping[str, str],
        band: Band | None,
        left_s: Callable[[], float],
    ) -> tuple[list[tuple[bytes, memoryview]], bool]:
        """What one get of `keys` brings, and whether it is worth asking for those behind."""
        answered = await self._gets.ask(
            partial(Get, keys=keys, band=band, trace=trace), Found, left_s()
        )
        if answered is None:
            return [], False
        answer, parts = answered
        run: list[tuple[bytes, memoryview]] = []
        for key, part, crc in zip(keys, parts, answer.crcs, strict=False):
            if part is None or zlib.crc32(part) != crc:
                self.counts.corrupt += 1
                log.warning("corrupt cache entry dropped", hash=key.hash.hex())
                await self._gets.ask(partial(Verify, keys=(key,)), Counted, left_s())
                return run, False
            run.append((key.hash, part))
        return run, bool(run) and (answer.more or len(run) == len(keys))

    async def has(self, hashes: Sequence[bytes], *, kind: str = KV) -> list[bool]:
        """Which of `hashes` the service holds; it counts as no use of them."""
        keys = _keys(hashes, kind)
        flags: list[bool] = []
        left_s = _countdown(self._timeout_s)
        for start in range(0, len(keys), PUT_FRAME_ENTRIES_MAX):
            asked = keys[start : start + PUT_FRAME_ENTRIES_MAX]
            answered = await self._gets.ask(partial(Has, keys=asked), Known, left_s())
            if answered is None or len(answered[0].flags) != len(asked):
                break
            flags += answered[0].flags
        return flags + [False] * (len(keys) - len(flags))

    async def put(
        self, entries: Sequence[PutEntry], trace: Mapping[str, str] | None = None
    ) -> bool:
        """Store `entries`; whether the service holds all of them now. See `offer`."""
        offer = self._enqueue(entries, trace or {})
        if offer is None:
            return False
        await asyncio.wait({offer.done}, timeout=self._put_timeout_s)
        return offer.done.done() and not offer.done.cancelled() and offer.done.result()

    def offer(self, entries: Sequence[PutEntry], trace: Mapping[str, str] | None = None) -> bool:
        """Queue `entries` to be stored in the background; False when the queue has no room.

        A chain's parents come before their children. What does not fit is dropped and counted:
        the newest, since those before it are their parents.
        """
        return self._enqueue(entries, trace or {}) is not None

    def _enqueue(self, entries: Sequence[PutEntry], trace: Mapping[str, str]) -> _Offer | None:
        assert not self._closed, "a closed client takes nothing"
        for entry in entries:
            _check_entry(entry)
        offer = _Offer(tuple(entries), trace, asyncio.get_running_loop().create_future())
        size_bytes = offer.size_bytes
        if (
            self._queued_bytes + size_bytes > PUT_QUEUE_BYTES_MAX
            or self._queued_entries + len(entries) > PUT_QUEUE_ENTRIES_MAX
        ):
            self.counts.puts_dropped += len(entries)
            return None
        self._queue.append(offer)
        self._queued_bytes += size_bytes
        self._queued_entries += len(entries)
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_queued())
        return offer

    async def _send_queued(self) -> None:
        try:
            while self._queue:
                offer = self._queue[0]
                held = await self._send(offer)
                self._queue.popleft()
                self._queued_bytes -= offer.size_bytes
                self._queued_entries -= len(offer.entries)
                if not offer.done.done():
                    offer.done.set_result(held)
        finally:
            self._sender = None

    async def _send(self, offer: _Offer) -> bool:
        """Send `offer` in frames; whether the service holds all of it now."""
        held = True
        for batch in _batches(offer.entries):
            facts = tuple(_facts(entry) for entry in batch)
            answered = await self._puts.ask(
                partial(Put, entries=facts, trace=offer.trace),
                Counted,
                self._put_timeout_s,
                [entry.data for entry in batch],
            )
            if answered is None:
                self.counts.puts_failed += len(batch)
            else:
                self.counts.puts_sent += len(batch)
            held = held and answered is not None and answered[0].count == len(batch)
        return held

    async def flush(self, timeout_s: float) -> bool:
        """Wait until what was offered is sent or given up; whether that was so in time."""
        if self._sender is not None:
            await asyncio.wait({self._sender}, timeout=timeout_s)
        return self._sender is None

    async def stats(self) -> dict[str, Any] | None:
        """The service's counters, or None."""
        answered = await self._gets.ask(partial(Ask, op="stats"), Stats, self._timeout_s)
        return answered[0].values if answered is not None else None

    async def ping(self) -> bool:
        """Whether the service answers."""
        asked = await self._gets.ask(partial(Ask, op="ping"), Counted, self._timeout_s)
        return asked is not None

    async def close(self) -> None:
        """Give up what is queued, hang up. `flush` first to have it sent."""
        self._closed = True
        if self._sender is not None:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender
        for offer in self._queue:
            self.counts.puts_dropped += len(offer.entries)
            if not offer.done.done():
                offer.done.set_result(False)
        self._queue.clear()
        self._queued_bytes = self._queued_entries = 0
        self._gets.drop()
        self._puts.drop()

    def check_integrity(self) -> None:
        """Assert that the queue's counters agree with the queue."""
        assert self._queued_bytes == sum(offer.size_bytes for offer in self._queue)
        assert self._queued_entries == sum(len(offer.entries) for offer in self._queue)
        assert self._queue == deque() or self._sender is not None, "what is queued has a sender"


def _countdown(timeout_s: float) -> Callable[[], float]:
    """A function that says how many seconds of `timeout_s` are left, never below zero."""
    now_s = asyncio.get_running_loop().time
    end_s = now_s() + timeout_s
    return lambda: max(0.0, end_s - now_s())


def _keys(hashes: Sequence[bytes], kind: str) -> tuple[EntryKey, ...]:
    assert kind in KINDS, f"kind is one of {KINDS}"
    assert all(len(each) == HASH_BYTES for each in hashes), f"a hash has {HASH_BYTES} bytes"
    return tuple(EntryKey(kind, each) for each in hashes)


def _check_entry(entry: PutEntry) -> None:
    _keys((entry.hash,), entry.kind)
    assert len(entry.parent) in (0, HASH_BYTES), f"a parent is empty or {HASH_BYTES} bytes"
    assert memoryview(entry.data).format == "B", "entries are bytes: cast other memoryviews"
    assert 1 <= len(entry.data) <= ENTRY_BYTES_MAX, f"an entry has 1 to {ENTRY_BYTES_MAX} bytes"
    assert 0 <= entry.depth <= DEPTH_MAX, f"depths go up to {DEPTH_MAX}"
    assert 0 <= entry.cost_tokens <= COST_MAX and 0 <= entry.cost_ms <= COST_MAX
    assert len(entry.tenant) <= TENANT_CHARS_MAX, (
        f"tenants have up to {TENANT_CHARS_MAX} characters"
    )


def _facts(entry: PutEntry) -> EntryFacts:
    return EntryFacts(
        key=EntryKey(entry.kind, entry.hash),
        parent=entry.parent,
        depth=entry.depth,
        size_bytes=len(entry.data),
        crc=zlib.crc32(entry.data),
        band=entry.band,
        tenant=entry.tenant,
        cost_tokens=entry.cost_tokens,
        cost_ms=entry.cost_ms,
    )


def _batches(entries: Sequence[PutEntry]) -> list[list[PutEntry]]:
    """`entries` in order, cut where a frame would grow too large."""
    batches: list[list[PutEntry]] = []
    size_bytes = 0
    for entry in entries:
        size_bytes += len(entry.data)
        full = bool(batches) and len(batches[-1]) >= PUT_FRAME_ENTRIES_MAX
        if not batches or full or size_bytes > PUT_FRAME_BYTES_MAX:
            batches.append([])
            size_bytes = len(entry.data)
        batches[-1].append(entry)
    return batches
