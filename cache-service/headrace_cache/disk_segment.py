"""One open segment file: appended to until it is sealed, then only read.

Invariant: while it is open, the file ends where its last whole record ends; if that cannot be had
back after a failed write, nothing is appended to it any more.
Rejected: writing on behind a torn record (its reader would have to guess where the next begins).
"""

from __future__ import annotations

import contextlib
import os

from headrace.frames import Buffer
from headrace_cache.disk_files import Files, append_all
from headrace_cache.segments import (
    HEAD_BYTES,
    MARKER_BYTES,
    RECORDS_MAX,
    SEGMENT_HEAD_BYTES,
    TRAILER_BYTES,
    Found,
    Head,
    Scan,
    SegmentHead,
    encode_head,
    encode_index,
    encode_segment_head,
    index_entry,
    segment_name,
)

SEAL_BYTES = HEAD_BYTES + TRAILER_BYTES
"""What sealing adds beside the index's entries."""

EMPTY_BYTES = SEGMENT_HEAD_BYTES + SEAL_BYTES
"""What a segment without records is charged."""


class Segment:
    """A segment file and its descriptor. One thread appends; `Shelf` closes it."""

    def __init__(self, files: Files, number: int, fd: int, marker: bytes) -> None:
        self.number = number
        self.fd = fd
        self.marker = marker
        self.end = SEGMENT_HEAD_BYTES
        self.records = 0
        self.is_open = True
        self._files = files
        self._index = bytearray()
        self._sealed_bytes = 0

    @property
    def charged_bytes(self) -> int:
        """What the file takes, or will take once sealed."""
        return self._sealed_bytes or self.end + len(self._index) + SEAL_BYTES

    @property
    def name(self) -> str:
        return segment_name(self.number)

    def takes(self, size_bytes: int, records: int, charged_max: int) -> bool:
        """Whether records that take `size_bytes` (`record_bytes`) still belong in here."""
        fits = self.charged_bytes + size_bytes <= charged_max
        return self.is_open and fits and self.records + records <= RECORDS_MAX

    def append(self, head: Head, data: Buffer = b"") -> Found:
        """Add a record. Raises OSError; the segment is then as before, or no longer open."""
        assert self.is_open, "closed segments are only read"
        encoded = encode_head(head, self.marker)
        found = Found(self.end, head, len(encoded))
        try:
            append_all(self._files, self.fd, [encoded, data])
        except OSError:
            self.cut()
            raise
        self._note(found, encoded)
        return found

    def adopt(self, scan: Scan, size_bytes: int) -> None:
        """Take over what `scan` found in the file, which has `size_bytes`."""
        if scan.sealed:
            self.end = scan.end
            self.records = len(scan.records)
            self._close(size_bytes)
            return
        for found in scan.records:
            self._note(found, encode_head(found.head, self.marker))
        self.end = scan.end
        if size_bytes > scan.end:
            self.cut()

    def _note(self, found: Found, encoded: bytes) -> None:
        self._index += index_entry(found.offset, encoded)
        self.end = found.end
        self.records += 1

    def cut(self) -> None:
        """Take off what stands behind the last whole record; else append no more."""
        try:
            self._files.truncate(self.fd, self.end)
        except OSError:
            self.abandon()

    def abandon(self) -> None:
        """Append no more; the file stays as it is."""
        size_bytes = self.end
        with contextlib.suppress(OSError):
            size_bytes = max(size_bytes, self._files.size(self.fd))
        self._close(size_bytes)

    def seal(self) -> None:
        """Write the index and append no more. A failure leaves a segment that is slower to scan."""
        try:
            sealing = encode_index(bytes(self._index), self.marker, self.end)
            append_all(self._files, self.fd, [sealing])
        except OSError:
            self.cut()
            if self.is_open:
                self._close(self.end)
            return
        self._close(self.end + len(sealing))

    def _close(self, size_bytes: int) -> None:
        self.is_open = False
        self._sealed_bytes = size_bytes
        self._index = bytearray()

    def sync(self) -> None:
        """What was appended survives a loss of power. Raises OSError."""
        self._files.sync(self.fd)


def record_bytes(head: Head) -> int:
    """What a record takes in a segment, its entry in the index included."""
    encoded = HEAD_BYTES + len(head.facts.tenant.encode())
    return 2 * encoded + head.facts.size_bytes + 8 - MARKER_BYTES


def create_segment(files: Files, number: int, now_ms: int) -> Segment:
    """A new segment with nothing in it. Raises OSError; nothing is left behind then."""
    head = SegmentHead(number, now_ms, os.urandom(MARKER_BYTES))
    name = segment_name(number)
    fd = files.create(name)
    try:
        append_all(files, fd, [encode_segment_head(head)])
    except OSError:
        with contextlib.suppress(OSError):
            files.close(fd)
        with contextlib.suppress(OSError):
            files.unlink(name)
        raise
    return Segment(files, number, fd, head.marker)
