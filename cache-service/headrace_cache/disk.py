"""The disk tier: entries in files behind the arena, read and written beside the event loop.

What it holds survives a restart. The event loop asks `find_run` (memory only), hands in copies with
`offer`, and awaits `read`; two threads do the rest. The tier keeps its own map of what it holds and
whole facts on disk, so that RAM needs to know nothing of entries that are not in it: what is read
comes with the facts of its put, as if it had just been put.

Invariants: nothing here waits for the disk but the two threads; both queues are bounded, and what
does not fit is refused; no trouble of the disk reaches the caller but as a miss, except where it
would break a promise to forget. Two services never share a directory.
Rejected: io_uring or O_DIRECT (the page cache serves a restart, and Python has no use of either).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from headrace.clock import Clock, SystemClock
from headrace.errors import SettingsError
from headrace.frames import Buffer, EntryFacts, EntryKey
from headrace_cache.disk_catalog import Catalog, Place
from headrace_cache.disk_files import Files, read_whole, write_whole
from headrace_cache.disk_log import (
    BUDGET_SEGMENTS_MIN,
    SEGMENT_BYTES_MIN,
    DiskLog,
    Forgotten,
    Match,
    Page,
)
from headrace_cache.disk_reads import Loaded
from headrace_cache.disk_terms import Came
from headrace_cache.disk_threads import JobThread
from headrace_cache.policy.lineage import Below, Crossings, Link

OFFERS_MAX = 4096
OFFER_BYTES_MAX = 128 * 1024 * 1024
OFFER_BYTES_MIN = 8 * 1024 * 1024
OFFER_SHARE = 0.125
"""Copies that wait to be written: that much of what lies in RAM, within these bounds. A single
larger one is taken when nothing else waits."""

READS_MAX = 256
READ_BYTES_MAX = 512 * 1024 * 1024
EVENTS_MAX = 1 << 14
"""Some 4 MB, which is what they take where nobody asks for them."""
BUDGET_BYTES_MIN = BUDGET_SEGMENTS_MIN * SEGMENT_BYTES_MIN
CLOSE_S_MAX = 10.0
NOTE_NAME = "note"
NOTE_BYTES_MAX = 1 << 20

T = TypeVar("T")

log = structlog.get_logger(__name__)


def offer_bytes_for(ram_bytes: int) -> int:
    """Limit of the copies that wait to be written, for a budget of entries in RAM.

    It is memory beside that budget, and stays with the process once a slow disk has filled it.
    """
    return min(max(OFFER_BYTES_MIN, int(OFFER_SHARE * ram_bytes)), OFFER_BYTES_MAX)


class Events(NamedTuple):
    """What came and went since the last time; `lost`: there was more than could be kept."""

    changes: list[tuple[Came, EntryKey]]
    lost: int


class DiskTier:
    """Entries on disk within a budget. One event loop's, but for the threads inside."""

    def __init__(
        self,
        path: Path,
        budget_bytes: int,
        *,
        clock: Clock | None = None,
        files: Files | None = None,
        segment_bytes: int | None = None,
        offer_bytes_max: int | None = None,
    ) -> None:
        """`budget_bytes` is what the files in `path` take at most, at least BUDGET_BYTES_MIN.

        `offer_bytes_max` limits the copies that wait to be written, OFFER_BYTES_MAX if not given.
        """
        self._path = path
        self._files = files or Files(path)
        self._events: deque[tuple[Came, EntryKey]] = deque(maxlen=EVENTS_MAX)
        self._events_lock = threading.Lock()
        self._lost = 0
        self._log = DiskLog(
            self._files, budget_bytes, clock or SystemClock(), self._emit, segment_bytes
        )
        self._writer = JobThread("disk-writer", OFFERS_MAX, offer_bytes_max or OFFER_BYTES_MAX)
        self._reader = JobThread("disk-reader", READS_MAX, READ_BYTES_MAX)
        self._ready = False
        self._refused = 0
        self._lock_fd: int | None = None

    # life

    def start(self) -> Future[int]:
        """Take the directory; resolves to the entries found in it once they can be read.

        Raises SettingsError if it cannot be used, or another process has it.
        """
        try:
            self._lock_fd = self._files.lock()
        except BlockingIOError as error:
            raise SettingsError(f"{self._path}: another cache service uses it") from error
        except OSError as error:
            raise SettingsError(f"{self._path}: {error}") from error
        self._writer.start()
        self._reader.start()
        return self._on(self._writer, self._recover)

    def _recover(self) -> int:
        self._log.recover()
        self._ready = True
        return len(self._log.catalog)

    def close(self, settle_s: float = CLOSE_S_MAX) -> None:
        """Write what waits, for so long at most, and let the directory go. Blocks meanwhile."""
        self._writer.stop(settle_s)
        self._reader.stop()
        self._ready = False
        self._log.close()
        if self._lock_fd is not None:
            self._files.close(self._lock_fd)
            self._lock_fd = None

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was offered is written; whether that was so in time. Blocks."""
        return self._writer.settle(timeout_s)

    # writing

    def can_take(self, size_bytes: int) -> bool:
        """Whether an offer of that size would be taken now: ready, room in the queue, disk well."""
        return self._ready and self._log.can_write() and self._writer.takes(size_bytes)

    def offer(self, facts: EntryFacts, data: Buffer, pinned_until_ms: int = 0) -> bool:
        """Have a copy of `data` written soon; whether it is taken or there already.

        `facts.crc` must be that of `data`. A pin ends at `pinned_until_ms`, wall clock; 0: none.
        """
        if self._ready and self._log.catalog.touch(facts.key):
            self._log.counts.present += 1
            return True
        if not self.can_take(facts.size_bytes) or not self._log.fits(facts):
            self._refused += 1
            return False
        copy = bytes(data)
        return self._writer.submit(
            lambda: _ignore(self._log.put(facts, copy, pinned_until_ms)),
            lambda: None,
            facts.size_bytes,
        )

    # reading

    def find(self, key: EntryKey) -> Place | None:
        """Where `key` is, if it is on disk. No I/O."""
        return self._log.catalog.find(key) if self._ready else None

    def pinned_until_ms(self, key: EntryKey) -> int:
        """When the pin of `key` ends, wall clock; 0 for none. No I/O."""
        return self._log.catalog.pinned_until_ms(key)

    def find_run(self, keys: Sequence[EntryKey]) -> list[Place]:
        """The places of the leading run of `keys` that is on disk. No I/O; 1 µs a key."""
        return self._log.catalog.find_run(keys) if self._ready else []

    def read(
        self, places: Sequence[Place], into: Sequence[memoryview] | None = None
    ) -> Future[list[Loaded | None]]:
        """The entries at `places`, checked; None for each that is gone or was not right.

        Never fails. With `into`, a buffer of `size_bytes` for each, the bytes are read right
        there: the buffers belong to the tier until the future is done, whoever still waits for it.
        """
        nothing: list[Loaded | None] = [None] * len(places)
        size_bytes = sum(place.size_bytes for place in places)
        return self._on(self._reader, lambda: self._log.read(places, into), nothing, size_bytes)

    # what must stay and what must go

    def pin(self, keys: Sequence[EntryKey], until_ms: int) -> Future[int]:
        """Keep `keys` until then (wall clock; 0: end their pins); how many could be."""
        keys = tuple(keys)
        return self._on(self._writer, lambda: self._log.pin(keys, until_ms))

    def forget(self, keys: Sequence[EntryKey]) -> Future[int]:
        """Drop `keys`, and what of them was offered before; how many were on disk.

        Done when it is sure that they do not come back after a restart; fails with OSError if
        that cannot be had, though they are no longer served then.
        """
        keys = tuple(keys)
        return self._on(self._writer, lambda: self._log.forget(keys))

    def forget_tenant(self, tenant: str) -> Future[int]:
        """Drop all of a tenant's entries, as `forget` does."""
        return self._on(self._writer, lambda: self._log.forget_tenant(tenant))

    def forget_where(
        self, match: Match, below: Below | None = None, links: Sequence[Link] = ()
    ) -> Future[Forgotten]:
        """Drop the entries that `match` picks, as `forget` does. It is called on a thread.

        `below`: only of these chains, as far as what is here and `links` tell.
        """
        return self._on(self._writer, lambda: self._log.forget_where(match, below, links))

    # looking on

    def page(
        self,
        match: Match,
        limit: int,
        start: int,
        below: Below | None = None,
        links: Sequence[Link] = (),
    ) -> Future[Page]:
        """Some entries that `match` picks, as DiskLog.page; `pin_ms` of the facts is 0."""
        return self._on(self._writer, lambda: self._log.page(match, limit, start, below, links))

    def links(self) -> Future[list[Link]]:
        """Hashes of all entries, with those of their parents."""
        return self._on(self._writer, self._log.links)

    def crossings(self, first: bytes, links: Sequence[Link]) -> Future[Crossings]:
        """As DiskLog.crossings."""
        return self._on(self._writer, lambda: self._log.crossings(first, links))

    # what is kept beside entries

    def write_note(self, data: bytes) -> Future[None]:
        """Keep `data` in place of what was kept so; it fails with OSError."""
        return self._on(self._writer, lambda: write_whole(self._files, NOTE_NAME, data))

    def read_note(self) -> bytes:
        """What `write_note` kept last; empty if nothing is. Blocks. Raises OSError."""
        return read_whole(self._files, NOTE_NAME, NOTE_BYTES_MAX)

    # what is told

    def _emit(self, came: Came, key: EntryKey) -> None:
        with self._events_lock:
            self._lost += len(self._events) == EVENTS_MAX
            self._events.append((came, key))

    def drain_events(self) -> Events:
        """What came and went since the last call. After a start, all that was found has come."""
        with self._events_lock:
            events = Events(list(self._events), self._lost)
            self._events.clear()
            self._lost = 0
        return events

    @property
    def catalog(self) -> Catalog:
        """What is on disk, to be read only."""
        return self._log.catalog

    def tenant_bytes(self, tenant: str) -> int:
        """Bytes that a tenant's entries take on disk."""
        return self._log.catalog.tenant_bytes(tenant)

    def stats(self) -> dict[str, Any]:
        """Everything counted, as nested maps of numbers."""
        waiting, waiting_bytes = self._writer.waiting
        catalog = self._log.catalog
        return asdict(self._log.counts) | {
            "ready": int(self._ready),
            "paused": int(not self._log.can_write()),
            "budget_bytes": self._log.budget_bytes,
            "used_bytes": self._log.used_bytes,
            "entries": len(catalog),
            "bytes": catalog.bytes,
            "pinned_bytes": catalog.pinned_bytes,
            "not_taken": self._refused,
            "offers_waiting": waiting,
            "offer_bytes_waiting": waiting_bytes,
            "reads_waiting": self._reader.waiting[0],
            "job_failures": self._writer.failures + self._reader.failures,
            "bytes_by_tenant": catalog.by_tenant(),
        }

    def check_integrity(self) -> None:
        """Assert that all agrees; only while nothing is written."""
        self._log.check_integrity()

    # threads

    def _on(
        self,
        thread: JobThread,
        work: Callable[[], T],
        instead: T | None = None,
        size_bytes: int = 0,
    ) -> Future[T]:
        """`work` on `thread`; `instead`, or RuntimeError, where it has no room or ends first."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # handed on: whoever waits is told
                future.set_exception(error)

        def dropped() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if instead is not None:
                future.set_result(instead)
            else:
                future.set_exception(RuntimeError("the disk tier is busy or closing"))

        if not thread.submit(run, dropped, size_bytes):
            dropped()
        return future


def _ignore(outcome: object) -> None:
    """`put` has counted its outcome; a job has none."""
