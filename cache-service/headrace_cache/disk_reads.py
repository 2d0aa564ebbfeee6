"""Reading entries from segments while others are written and dropped.

Invariants: a segment's descriptor is closed when it left the shelf and its last reader is done;
what is returned was compared with the key that was asked for and with both of its CRCs.
Rejected: mapping the files (a bad sector is then a signal that ends the process).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import structlog

from headrace.checksum import checksum
from headrace.frames import EntryFacts
from headrace_cache.disk_catalog import Catalog, Place
from headrace_cache.disk_files import Files, read_all
from headrace_cache.disk_segment import Segment
from headrace_cache.disk_terms import Came, Counts, Emit
from headrace_cache.segments import Head, Op, decode_head

log = structlog.get_logger(__name__)

RUN_BYTES_MAX = 16 * 1024 * 1024
RUN_ENTRIES_MAX = 256


@dataclass(frozen=True, slots=True)
class Loaded:
    """An entry as it was written. `data` is the caller's own, or the buffer it gave."""

    facts: EntryFacts
    data: memoryview
    pinned_until_ms: int


class Shelf:
    """The segments there are, oldest first. Any thread may hold one while it reads."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._readers: dict[int, int] = {}
        self._leaving: dict[int, Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        with self._lock:
            return iter(list(self._segments.values()))

    def add(self, segment: Segment) -> None:
        with self._lock:
            self._segments[segment.number] = segment

    def oldest(self) -> Segment | None:
        with self._lock:
            return next(iter(self._segments.values()), None)

    def remove(self, segment: Segment) -> None:
        """Take a segment off the shelf; it is closed once nobody reads it."""
        with self._lock:
            del self._segments[segment.number]
            if segment.number in self._readers:
                self._leaving[segment.number] = segment
                return
        self._close(segment)

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[Segment | None]:
        """The segment of that number, which stays open meanwhile; None if it is gone."""
        with self._lock:
            segment = self._segments.get(number)
            if segment is not None:
                self._readers[number] = self._readers.get(number, 0) + 1
        try:
            yield segment
        finally:
            if segment is not None:
                self._let_go(number)

    def _let_go(self, number: int) -> None:
        with self._lock:
            self._readers[number] -= 1
            if self._readers[number]:
                return
            del self._readers[number]
            segment = self._leaving.pop(number, None)
        if segment is not None:
            self._close(segment)

    def _close(self, segment: Segment) -> None:
        with contextlib.suppress(OSError):
            self._files.close(segment.fd)

    def close(self) -> None:
        """Close everything; nobody reads any more."""
        for segment in self:
            self.remove(segment)


class DiskReader:
    """Reads what the catalog tells of. Any thread may; counters may then miss one."""

    def __init__(
        self, files: Files, shelf: Shelf, catalog: Catalog, counts: Counts, emit: Emit
    ) -> None:
        self._files = files
        self._shelf = shelf
        self._catalog = catalog
        self._counts = counts
        self._emit = emit

    def read(
        self, places: Sequence[Place], into: Sequence[memoryview] | None = None
    ) -> list[Loaded | None]:
        """What stands at `places`, into buffers of their sizes if given; None for what is gone.

        An entry that is not as it was written is dropped.
        """
        loaded: list[Loaded | None] = [None] * len(places)
        missing = list(range(len(places)))
        for _ in range(2):  # what was carried over meanwhile has another place now
            for run in runs_of([places[index] for index in missing]):
                indexes = [missing[index] for index in run]
                self._read_run(places, into, indexes, loaded)
            missing = [index for index in missing if loaded[index] is None]
            moved = {index: self._catalog.find(places[index].key) for index in missing}
            missing = [i for i in missing if moved[i] is not None and moved[i] != places[i]]
            places = [moved.get(index) or place for index, place in enumerate(places)]
        for each in loaded:
            self._counts.read += each is not None
            self._counts.read_bytes += each.facts.size_bytes if each is not None else 0
            self._counts.missed += each is None
        return loaded

    def _read_run(
        self,
        places: Sequence[Place],
        into: Sequence[memoryview] | None,
        indexes: Sequence[int],
        loaded: list[Loaded | None],
    ) -> None:
        run = [places[index] for index in indexes]
        buffers = [into[index] for index in indexes] if into is not None else None
        with self._shelf.hold(run[0].segment) as segment:
            if segment is not None:
                for index, each in zip(indexes, self.load(segment, run, buffers), strict=True):
                    loaded[index] = each

    def load(
        self, segment: Segment, run: Sequence[Place], buffers: Sequence[memoryview] | None
    ) -> list[Loaded | None]:
        """`read_run`; what is not right is dropped and counted."""
        if buffers is None:
            buffers = [memoryview(bytearray(place.size_bytes)) for place in run]
        try:
            loaded = read_run(self._files, segment, run, buffers)
        except OSError as error:
            self._counts.read_errors += 1
            log.warning("cannot read from disk", error=str(error), segment=segment.name)
            loaded = [None] * len(run)
        for place, each in zip(run, loaded, strict=True):
            if each is not None:
                self._catalog.touch(place.key)
            elif self._catalog.drop(place.key, place):
                self._counts.corrupt += 1
                self._emit(Came.WENT, place.key)
        return loaded


def read_run(
    files: Files, segment: Segment, places: Sequence[Place], buffers: Sequence[memoryview]
) -> list[Loaded | None]:
    """What stands at `places`, which follow each other in `segment`; None where it is not right.

    Each entry is read into its buffer. Raises OSError.
    """
    heads = [bytearray(place.head_bytes) for place in places]
    parts: list[bytearray | memoryview] = []
    for head, buffer in zip(heads, buffers, strict=True):
        parts += [head, buffer]
    read_all(files, segment.fd, parts, places[0].offset)
    return [
        _checked(decode_head(head, segment.marker), place, buffer)
        for head, place, buffer in zip(heads, places, buffers, strict=True)
    ]


def _checked(head: Head | None, place: Place, data: memoryview) -> Loaded | None:
    if head is None or head.op is not Op.ENTRY or head.facts.key != place.key:
        return None
    if head.facts.size_bytes != len(data) or checksum(data) != head.facts.crc:
        return None
    return Loaded(head.facts, data, head.pinned_until_ms)


def runs_of(places: Sequence[Place]) -> Iterator[list[int]]:
    """Indexes of `places`, grouped into runs that stand one behind the other in one segment.

    In the order of the disk: chains leave RAM from their ends, so theirs is the other way round.
    """
    order = sorted(range(len(places)), key=lambda i: (places[i].segment, places[i].offset))
    run: list[int] = []
    size_bytes = 0
    for index in order:
        place = places[index]
        last = places[run[-1]] if run else None
        follows = (
            last is not None
            and last.segment == place.segment
            and last.offset + last.head_bytes + last.size_bytes == place.offset
            and size_bytes + place.size_bytes <= RUN_BYTES_MAX
            and len(run) < RUN_ENTRIES_MAX
        )
        if run and not follows:
            yield run
            run, size_bytes = [], 0
        run.append(index)
        size_bytes += place.size_bytes
    if run:
        yield run
