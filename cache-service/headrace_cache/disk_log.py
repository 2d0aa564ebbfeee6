"""The disk tier without its threads: segments appended to, read, carried over and dropped.

One thread writes (put, pin, forget, recover), any thread reads. The log is in order of time and the
oldest segment goes first, so a note that something is pinned or forgotten never outlives what it
speaks of. What is live in a leaving segment and pinned, or was used since it was written, is
written again at the log's end.

Invariants: the files never take more than the budget (one segment's worth of it is kept free for
carrying over); a record is in the catalog only once it is whole in its file; what is read is given
out only if head, key, size and CRC are right. A kill at any point costs what was not yet written.
Synced to disk are only the notes that forget: an entry that a power cut tears fails its CRC and is
computed again, but what was purged must stay gone.
Rejected: filling gaps in place (a torn write would then damage what was whole).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import structlog

from headrace.checksum import checksum
from headrace.clock import Clock
from headrace.frames import Buffer, EntryFacts, EntryKey
from headrace_cache.disk_catalog import Catalog, Live, Place
from headrace_cache.disk_files import Files
from headrace_cache.disk_reads import DiskReader, Loaded, Shelf
from headrace_cache.disk_recovery import recover
from headrace_cache.disk_segment import EMPTY_BYTES, Segment, create_segment, record_bytes
from headrace_cache.disk_terms import Came, Counts, Emit, Outcome
from headrace_cache.policy.lineage import Below, Crossings, Link, crossings
from headrace_cache.segments import Found, Head, Op, Reader, note

SEGMENTS_PER_BUDGET = 32
SEGMENT_BYTES_MIN = 64 * 1024
SEGMENT_BYTES_MAX = 1 << 30
BUDGET_SEGMENTS_MIN = 4
SEGMENTS_MAX = 1024
"""Files: more than the budget needs only where entries are so small that RECORDS_MAX seals."""

CARRY_SHARE = 0.5
"""Of a leaving segment's bytes, how many may be carried over for having been used."""

PINNED_SHARE = 0.25
"""Of the budget, how much pins may hold."""

RETRY_MS_MIN = 1_000
RETRY_MS_MAX = 60_000
NOTES_PER_WRITE = 64
"""They fit into any segment, so that room made for them is room enough."""

FORGET_COPIES = 2
"""A note that forgets is written twice: one bad sector must not bring back what was purged."""

SPOT_BITS = 32

Match = Callable[[EntryFacts], bool]

log = structlog.get_logger(__name__)


class Forgotten(NamedTuple):
    """What was dropped, with its bytes, and hashes of all entries of the chains that were meant."""

    sizes: dict[EntryKey, int]
    inside: set[bytes]


class Page(NamedTuple):
    """Some entries, and the spot from which to go on; None at the end."""

    entries: list[EntryFacts]
    start: int | None


def segment_bytes_for(budget_bytes: int) -> int:
    """The size of segments for a budget."""
    return max(SEGMENT_BYTES_MIN, min(SEGMENT_BYTES_MAX, budget_bytes // SEGMENTS_PER_BUDGET))


class DiskLog:
    """Entries in segment files of one directory, which the caller has locked."""

    def __init__(
        self,
        files: Files,
        budget_bytes: int,
        clock: Clock,
        emit: Emit,
        segment_bytes: int | None = None,
    ) -> None:
        """`emit` is told of every entry that comes and goes, on the thread that caused it."""
        self.counts = Counts()
        self.catalog = Catalog()
        self.segment_bytes = segment_bytes or segment_bytes_for(budget_bytes)
        assert budget_bytes >= BUDGET_SEGMENTS_MIN * self.segment_bytes, "settings see to that"
        self.budget_bytes = budget_bytes
        self._files = files
        self._clock = clock
        self._emit = emit
        self._shelf = Shelf(files)
        self._reader = DiskReader(files, self._shelf, self.catalog, self.counts, emit)
        self._open: Segment | None = None
        self._next_number = 1
        self._paused_until_ms = 0
        self._retry_ms = 0

    # the start

    def recover(self) -> None:
        """Take over what is in the directory. Raises OSError if it cannot be listed."""
        recovered = recover(self._files, self.catalog, self.counts)
        for segment in recovered.segments:
            self._shelf.add(segment)
            if segment.is_open:
                self._open = segment
        self._next_number = recovered.next_number
        for key in recovered.keys:
            if self.catalog.find(key) is not None:
                self._emit(Came.CAME, key)
        try:
            self._drop_beyond(0)  # the budget may be smaller than it was
        except OSError as error:
            self._pause(error)

    # writing

    @property
    def used_bytes(self) -> int:
        """What the files take, once all are sealed."""
        return sum(segment.charged_bytes for segment in self._shelf)

    def can_write(self) -> bool:
        """False for a while after a write has failed."""
        return self._clock.now_ms() >= self._paused_until_ms

    def fits(self, facts: EntryFacts) -> bool:
        """Whether an entry is small enough for a segment."""
        return record_bytes(Head(Op.ENTRY, facts, 0)) + EMPTY_BYTES <= self.segment_bytes

    def put(self, facts: EntryFacts, data: Buffer, pinned_until_ms: int = 0) -> Outcome:
        """Write an entry, making room first; a pin (wall clock) beyond its share is left out."""
        outcome = self._put(facts, data, pinned_until_ms)
        if outcome is Outcome.PRESENT:
            self.counts.present += 1
        elif outcome is not Outcome.WRITTEN:
            self.counts.refused += 1
        return outcome

    def _put(self, facts: EntryFacts, data: Buffer, pinned_until_ms: int) -> Outcome:
        if self.catalog.touch(facts.key):
            return Outcome.PRESENT
        if not self.fits(facts):
            return Outcome.TOO_LARGE
        if not self.can_write():
            return Outcome.PAUSED
        if len(data) != facts.size_bytes or checksum(data) != facts.crc:
            self.counts.corrupt += 1
            return Outcome.CORRUPT
        if pinned_until_ms and not self._may_pin(facts.size_bytes):
            pinned_until_ms = 0
        head = Head(Op.ENTRY, facts, pinned_until_ms)
        try:
            self._make_room(record_bytes(head))
            self._write_entry(head, data)
        except OSError as error:
            self._pause(error)
            return Outcome.FAILED
        self._retry_ms = 0
        self.counts.written += 1
        self.counts.written_bytes += facts.size_bytes
        self._emit(Came.CAME, facts.key)
        return Outcome.WRITTEN

    def _write_entry(self, head: Head, data: Buffer) -> None:
        segment = self._segment_for(record_bytes(head), 1)
        self.catalog.add(segment.number, segment.append(head, data))

    def _segment_for(self, size_bytes: int, records: int) -> Segment:
        """An open segment with that much room. Raises OSError."""
        segment = self._open
        if segment is not None and not segment.takes(size_bytes, records, self.segment_bytes):
            self._open = None
            if segment.is_open:
                segment.seal()
        if self._open is None:
            self._next_number += 1  # used up even if this fails: the file may stay behind
            number = self._next_number - 1
            self._open = create_segment(self._files, number, self._clock.wall_ms())
            self._shelf.add(self._open)
        return self._open

    def _pause(self, error: OSError) -> None:
        self.counts.write_errors += 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.counts.disk_full += 1
        self._retry_ms = min(max(2 * self._retry_ms, RETRY_MS_MIN), RETRY_MS_MAX)
        self._paused_until_ms = self._clock.now_ms() + self._retry_ms
        log.warning("cannot write to disk", error=str(error), retry_ms=self._retry_ms)

    # room

    def _make_room(self, size_bytes: int) -> None:
        """Drop segments until records of `size_bytes` fit, in a new one too. Raises OSError."""
        self._drop_beyond(size_bytes + EMPTY_BYTES)

    def _drop_beyond(self, size_bytes: int) -> None:
        """Drop segments until `size_bytes` more stay within the budget. Raises OSError."""
        limit = self.budget_bytes - self.segment_bytes - 2 * EMPTY_BYTES
        rounds = 0
        while self.used_bytes + size_bytes > limit or len(self._shelf) > SEGMENTS_MAX:
            oldest = self._shelf.oldest()
            if oldest is None:
                return
            rounds += 1
            self._drop(oldest, carry=rounds <= SEGMENTS_PER_BUDGET)

    def _drop(self, segment: Segment, *, carry: bool) -> None:
        """Take the oldest segment away, after what it is to leave behind. Raises OSError."""
        if segment is self._open:
            self._open = None
            segment.abandon()
        leaving = self._live_heads(segment)
        if carry:
            self._carry(segment, leaving)
        self._files.unlink(segment.name)
        self.catalog.drop_segment(segment.number)
        self._shelf.remove(segment)
        self.counts.segments_dropped += 1
        for _, found in leaving:
            if self.catalog.find(found.head.facts.key) is None:
                self._emit(Came.WENT, found.head.facts.key)

    def _live_heads(self, segment: Segment) -> list[tuple[Live, Found]]:
        """The records of `segment` that are referred to, as they stand in its file."""
        live = {each.offset: each for each in self.catalog.live_in(segment.number)}
        heads = self._heads(segment) if live else []
        return [(live[found.offset], found) for found in heads if found.offset in live]

    def _heads(self, segment: Segment) -> list[Found]:
        size_bytes = self._files.size(segment.fd)
        return Reader(self._files, segment.fd, size_bytes, segment.marker).scan().records

    def _carry(self, segment: Segment, leaving: Sequence[tuple[Live, Found]]) -> None:
        """Write again what `segment` should leave behind: pinned first, then what was used."""
        now_ms = self._clock.wall_ms()
        left_bytes = int(CARRY_SHARE * self.segment_bytes)
        for live, found in sorted(leaving, key=_rank):
            pinned = live.pinned_until_ms > now_ms
            left_bytes -= found.head.facts.size_bytes
            if not pinned and (not live.uses or left_bytes < 0):
                break
            loaded = self._reader.load(segment, [_place(segment, found)], None)[0]
            if loaded is not None:
                head = Head(Op.ENTRY, loaded.facts, live.pinned_until_ms if pinned else 0)
                self._write_entry(head, loaded.data)
                self.counts.carried += 1
                self.counts.carried_bytes += loaded.facts.size_bytes

    # reading: any thread

    def read(
        self, places: Sequence[Place], into: Sequence[memoryview] | None = None
    ) -> list[Loaded | None]:
        """What stands at `places`, as `DiskReader` says."""
        return self._reader.read(places, into)

    # pins and purges

    def _may_pin(self, size_bytes: int) -> bool:
        self.catalog.end_pins(self._clock.wall_ms())
        return self.catalog.pinned_bytes + size_bytes <= PINNED_SHARE * self.budget_bytes

    def pin(self, keys: Sequence[EntryKey], until_ms: int) -> int:
        """Keep `keys` until then (wall clock; 0: no longer); how many were here and could be."""
        pinned = []
        for key in keys:
            place = self.catalog.find(key)
            if place is None or (until_ms and not self._may_pin(place.size_bytes)):
                continue
            if self.catalog.pin(key, until_ms):
                pinned.append(note(Op.PIN, key, until_ms=until_ms))
        try:
            self._write_notes(pinned)
        except OSError as error:
            self._pause(error)
        return len(pinned)

    def forget(self, keys: Sequence[EntryKey]) -> int:
        """Drop `keys` for good; how many were here. Raises OSError if they could come back.

        Keys that are not here are forgotten too: one that could not be read may still stand in a
        file.
        """
        gone = [key for key in keys if self.catalog.drop(key)]
        self._forget_for_good([note(Op.FORGET, key) for key in keys], gone)
        return len(gone)

    def forget_tenant(self, tenant: str) -> int:
        """Drop all of a tenant's entries for good; how many. Raises OSError as `forget`."""
        keys = [
            found.head.facts.key for found in self.records() if found.head.facts.tenant == tenant
        ]
        gone = [key for key in keys if self.catalog.drop(key)]
        unread = self.catalog.drop_tenant(tenant)
        self._forget_for_good([note(Op.FORGET_TENANT, tenant=tenant)], gone)
        return len(gone) + unread

    def forget_where(
        self, match: Match, below: Below | None = None, links: Sequence[Link] = ()
    ) -> Forgotten:
        """Drop what `match` picks, as `forget` does. Reads all heads, once.

        `below`: only of these chains, as far as what is here and `links` tell.
        """
        picked = [found.head.facts for found in self.records(dead=True)]
        inside: set[bytes] = set()
        if below is not None:
            inside = below.of([*links, *(_link(facts) for facts in picked)])
            picked = [facts for facts in picked if facts.key.hash in inside]
        sizes = {facts.key: facts.size_bytes for facts in picked if match(facts)}
        live = {key: size for key, size in sizes.items() if self.catalog.find(key) is not None}
        self.forget(list(sizes))
        return Forgotten(live, inside)

    def links(self) -> list[Link]:
        """Hashes of all entries, with those of their parents."""
        return [_link(found.head.facts) for found in self.records()]

    def crossings(self, first: bytes, links: Sequence[Link]) -> Crossings:
        """Where chains go from group to group, as what is here and `links` tell."""
        return crossings(first, [*links, *self.links()])

    def page(
        self,
        match: Match,
        limit: int,
        start: int,
        below: Below | None = None,
        links: Sequence[Link] = (),
    ) -> Page:
        """The first `limit` entries that `match` picks, in the order of their `spot`s, from `start`
        on; more, where several stand at the last one's. `below` and `links` as above."""
        facts = [found.head.facts for found in self.records()]
        inside = None if below is None else below.of([*links, *map(_link, facts)])
        picked = [
            each
            for each in facts
            if spot(each.key) >= start
            and (inside is None or each.key.hash in inside)
            and match(each)
        ]
        picked.sort(key=lambda each: (spot(each.key), each.key))
        if len(picked) <= limit:
            return Page(picked, None)
        last = spot(picked[limit - 1].key)
        behind = next((at for at in range(limit, len(picked)) if spot(picked[at].key) > last), None)
        return Page(picked[:behind], None if behind is None else spot(picked[behind].key))

    def _forget_for_good(self, notes: Sequence[Head], gone: Sequence[EntryKey]) -> None:
        """Write `notes` and sync them; a full disk loses its oldest segments for it."""
        for key in gone:
            self._emit(Came.WENT, key)
        self.counts.forgotten += len(gone)
        while notes and len(self._shelf):  # nothing comes back from no file
            try:
                self._write_notes(notes, FORGET_COPIES, sync=True)
                break
            except OSError as error:
                self._pause(error)
                oldest = self._shelf.oldest()
                if oldest is not None:
                    self._drop(oldest, carry=False)
        self._drop_dead()

    def _drop_dead(self) -> None:
        """Give back the segments at the log's start in which nothing is live."""
        with contextlib.suppress(OSError):
            while (oldest := self._shelf.oldest()) is not None and oldest is not self._open:
                if self.catalog.live_count(oldest.number):
                    return
                self._drop(oldest, carry=False)

    def _write_notes(self, notes: Sequence[Head], copies: int = 1, *, sync: bool = False) -> None:
        left = iter(notes)
        written_to: dict[int, None] = {}
        while batch := list(islice(left, NOTES_PER_WRITE)):
            self._make_room(copies * sum(record_bytes(each) for each in batch))
            for each in batch:
                for _ in range(copies):
                    segment = self._segment_for(record_bytes(each), 1)
                    segment.append(each)
                    written_to[segment.number] = None
        if not sync:
            return
        self._files.sync_names()  # of segments that are new
        for number in written_to:
            with self._shelf.hold(number) as held:
                if held is not None:  # else it went, with all that is older
                    held.sync()

    # looking on

    def records(self, *, dead: bool = False) -> Iterator[Found]:
        """All entries, oldest segment first, as their heads stand on disk. Skips what fails.

        `dead`: also the records that nothing refers to any more.
        """
        for segment in self._shelf:
            with self._shelf.hold(segment.number) as held:
                if held is None:
                    continue
                try:
                    heads = self._heads(held) if dead else [f for _, f in self._live_heads(held)]
                except OSError:
                    self.counts.read_errors += 1
                    continue
            yield from (found for found in heads if found.head.op is Op.ENTRY)

    def close(self) -> None:
        """Close all files; the last segment stays open to be appended to after the next start."""
        self._open = None
        self._shelf.close()

    def check_integrity(self) -> None:
        """Assert that files, catalog and budget agree. Takes time in all entries."""
        self.catalog.check_integrity()
        assert self.used_bytes <= self.budget_bytes, "the budget holds"
        numbers = [segment.number for segment in self._shelf]
        assert numbers == sorted(numbers), "segments stand in the order of time"
        assert all(number < self._next_number for number in numbers), "numbers are not used again"
        assert all(not s.is_open or s is self._open for s in self._shelf), "one is appended to"


def spot(key: EntryKey) -> int:
    """Where an entry stands in a list: SPOT_BITS of its hash."""
    return int.from_bytes(key.hash[: SPOT_BITS // 8])


def _link(facts: EntryFacts) -> Link:
    return facts.key.hash, facts.parent


def _place(segment: Segment, found: Found) -> Place:
    facts = found.head.facts
    return Place(facts.key, segment.number, found.offset, found.head_bytes, facts.size_bytes)


def _rank(leaving: tuple[Live, Found]) -> tuple[bool, bool, int, int, int]:
    """Who is carried over first: pinned, used, of a better band, used more often, newer."""
    live, _ = leaving
    return (not live.pinned_until_ms, not live.uses, live.band, -live.uses, -live.offset)
