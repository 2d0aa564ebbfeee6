"""The cache service as its users see it: it answers in time, or it is as if it were empty.

Invariants: no trouble of the service reaches the caller as an exception or as a wait beyond the
time limit; what is returned has the CRC its writer computed. Gets and puts have a connection each,
so that a large put never stands before a get.
Rejected: waiting for room in the queue of puts. A worker has better things to do than to cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from headrace import copying
from headrace.arena_view import ArenaView
from headrace.cache_entries import (
    BATCH_ENTRIES_MAX,
    Entry,
    PutEntry,
    WriteEntry,
    check_entry,
    check_layout,
    keys_of,
)
from headrace.cache_lane import ClientCounts, Lane
from headrace.cache_reads import ReadRun, Wish, read_run
from headrace.cache_writes import write_entries
from headrace.clock import Clock, SystemClock
from headrace.frames import (
    KV,
    Ask,
    Counted,
    EntryKey,
    Has,
    Known,
    Manage,
    Stats,
    Verify,
    parse_address,
)
from headrace.types import Band

__all__ = ["CacheClient", "Entry", "PutEntry", "ReadRun", "WriteEntry"]

GET_TIMEOUT_S = 0.5
PUT_TIMEOUT_S = 5.0

PUT_QUEUE_BYTES_MAX = 256 * 1024 * 1024
PUT_QUEUE_ENTRIES_MAX = 4096

log = structlog.get_logger(__name__)

K = TypeVar("K", Has, Verify)


@dataclass(frozen=True, slots=True)
class _Offer:
    entries: tuple[Entry, ...]
    trace: Mapping[str, str]
    done: asyncio.Future[bool]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)


class CacheClient:
    """Reads and writes entries. Belongs to one event loop; `close()` it there."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = GET_TIMEOUT_S,
        put_timeout_s: float = PUT_TIMEOUT_S,
        clock: Clock | None = None,
        arena: bool = True,
    ) -> None:
        """`url` is `tcp://host:port` or `unix:///path`. Raises SettingsError if it is neither.

        `arena`: read and write the service's memory in place, where it runs on this host.
        """
        address = parse_address(url)
        copying.prepare()
        self.counts = ClientCounts()
        self._timeout_s = timeout_s
        self._put_timeout_s = put_timeout_s
        clock = clock or SystemClock()
        self._gets = Lane(address, clock, self.counts, arena=arena)
        self._puts = Lane(address, clock, self.counts, arena=arena)
        self._queue: deque[_Offer] = deque()
        self._queued_bytes = 0
        self._queued_entries = 0
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    @contextlib.asynccontextmanager
    async def read(
        self,
        hashes: Sequence[bytes],
        *,
        band: Band | None = None,
        tenant: str = "",
        layout: bytes = b"",
        trace: Mapping[str, str] | None = None,
        kind: str = KV,
        timeout_s: float | None = None,
    ) -> AsyncIterator[ReadRun]:
        """The leading run of `hashes` that the service holds, to be used within the block.

        `band` is the class of the request they are read for: it raises theirs. `layout` (8 bytes)
        is the only one accepted; empty: any. `trace` are the W3C headers of the caller's span.
        `timeout_s`: instead of the client's own limit.
        """
        check_layout(layout)
        keys = keys_of(hashes, kind)
        run = ReadRun()
        if keys:
            wish = Wish(keys, band, tenant, layout, trace or {})
            left_s = _countdown(self._timeout_s if timeout_s is None else timeout_s)
            run = await read_run(self._gets, wish, self.counts, left_s)
        try:
            yield run
        finally:
            run.close()

    async def read_into(
        self,
        hashes: Sequence[bytes],
        targets: Sequence[memoryview],
        *,
        band: Band | None = None,
        tenant: str = "",
        layout: bytes = b"",
        trace: Mapping[str, str] | None = None,
        kind: str = KV,
        timeout_s: float | None = None,
    ) -> int:
        """Copy the leading run of `hashes` that the service holds to `targets`; how many that are.

        One writable target for each hash; what has another length is not taken, nor what is behind
        it. Targets past the run may hold anything then. The other arguments are `read`'s.
        """
        assert len(targets) == len(hashes), "a place for each entry"
        assert not any(target.readonly for target in targets), "places can be written to"
        check_layout(layout)
        keys = keys_of(hashes, kind)
        if not keys:
            return 0
        wish = Wish(keys, band, tenant, layout, trace or {})
        left_s = _countdown(self._timeout_s if timeout_s is None else timeout_s)
        run = await read_run(self._gets, wish, self.counts, left_s, targets)
        run.close()
        return len(run.hashes)

    async def get_run(
        self,
        hashes: Sequence[bytes],
        trace: Mapping[str, str] | None = None,
        *,
        kind: str = KV,
        band: Band | None = None,
        layout: bytes = b"",
        tenant: str = "",
    ) -> list[tuple[bytes, memoryview]]:
        """What `read` reads, copied: each memoryview is the caller's own, and writable."""
        options: dict[str, Any] = {"band": band, "layout": layout, "tenant": tenant, "kind": kind}
        async with self.read(hashes, trace=trace, **options) as run:
            copies = [memoryview(bytearray(block)) for block in run.blocks]
        return list(zip(run.hashes, copies, strict=True))

    async def verify(self, hashes: Sequence[bytes], *, kind: str = KV) -> int:
        """Have the service check the CRC of `hashes`; how many it dropped."""
        dropped = 0
        left_s = _countdown(self._timeout_s)
        for keys in _cut(keys_of(hashes, kind)):
            answered = await self._gets.ask(partial(_of_keys, Verify, keys), Counted, left_s())
            dropped += answered.answer.count if answered is not None else 0
        return dropped

    async def has(
        self, hashes: Sequence[bytes], *, kind: str = KV, timeout_s: float | None = None
    ) -> list[bool]:
        """Which of `hashes` the service holds; it counts as no use of them."""
        flags: list[bool] = []
        left_s = _countdown(self._timeout_s if timeout_s is None else timeout_s)
        for keys in _cut(keys_of(hashes, kind)):
            answered = await self._gets.ask(partial(_of_keys, Has, keys), Known, left_s())
            if answered is None or len(answered.answer.flags) != len(keys):
                break
            flags += answered.answer.flags
        return flags + [False] * (len(hashes) - len(flags))

    async def write(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Store `entries` now, parents first; whether the service holds all of them then.

        Each entry's `fill` is called once, if at all. Raises what a `fill` raises.
        """
        for entry in entries:
            check_entry(entry)
        return await self._write(entries, trace or {}, self._put_timeout_s)

    async def _write(
        self, entries: Sequence[Entry], trace: Mapping[str, str], timeout_s: float
    ) -> bool:
        written = await write_entries(self._puts, entries, trace, timeout_s)
        self.counts.puts_failed += written.failed
        self.counts.puts_sent += len(entries) - written.failed
        self.counts.puts_ahead += written.ahead
        return written.held == len(entries)

    async def put(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Store `entries`; whether the service holds all of them now. See `offer`."""
        offer = self._enqueue(entries, trace or {})
        if offer is None:
            return False
        await asyncio.wait({offer.done}, timeout=self._put_timeout_s)
        return offer.done.done() and not offer.done.cancelled() and offer.done.result()

    def offer(self, entries: Sequence[Entry], trace: Mapping[str, str] | None = None) -> bool:
        """Queue `entries` to be stored in the background; False when the queue has no room.

        A chain's parents come before their children. What does not fit is dropped and counted:
        the newest, since those before it are their parents.
        """
        return self._enqueue(entries, trace or {}) is not None

    def _enqueue(self, entries: Sequence[Entry], trace: Mapping[str, str]) -> _Offer | None:
        assert not self._closed, "a closed client takes nothing"
        for entry in entries:
            check_entry(entry)
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
                held = await self._write(offer.entries, offer.trace, self._put_timeout_s)
                self._queue.popleft()
                self._queued_bytes -= offer.size_bytes
                self._queued_entries -= len(offer.entries)
                if not offer.done.done():
                    offer.done.set_result(held)
        finally:
            self._sender = None

    async def flush(self, timeout_s: float) -> bool:
        """Wait until what was offered is sent or given up; whether that was so in time."""
        if self._sender is not None:
            await asyncio.wait({self._sender}, timeout=timeout_s)
        return self._sender is None

    @property
    def resting(self) -> bool:
        """Whether calls are skipped just now, because the service failed."""
        return self._gets.resting or self._puts.resting

    async def stats(self) -> dict[str, Any] | None:
        """The service's counters, or None."""
        answered = await self._gets.ask(
            lambda message_id, _: Ask(message_id, "stats"), Stats, self._timeout_s
        )
        return answered.answer.values if answered is not None else None

    async def manage(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request of the administration (`cache_admin.py`), or None."""
        answered = await self._gets.ask(
            lambda message_id, _: Manage(message_id, values), Stats, self._put_timeout_s
        )
        return answered.answer.values if answered is not None else None

    async def ping(self) -> bool:
        """Whether the service answers."""
        answered = await self._gets.ask(
            lambda message_id, _: Ask(message_id, "ping"), Counted, self._timeout_s
        )
        return answered is not None

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


def _of_keys(build: type[K], keys: tuple[EntryKey, ...], message_id: int, _: ArenaView | None) -> K:
    return build(message_id, keys)


def _cut(keys: tuple[EntryKey, ...]) -> list[tuple[EntryKey, ...]]:
    """`keys` in pieces that a frame holds."""
    return [keys[at : at + BATCH_ENTRIES_MAX] for at in range(0, len(keys), BATCH_ENTRIES_MAX)]
