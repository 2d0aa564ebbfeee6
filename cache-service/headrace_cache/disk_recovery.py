"""From a directory of segments to a catalog, after a stop, a kill or a loss of power.

Invariant: records count in the order in which they were written, so that what was forgotten stays
forgotten and the newest record of a key is the one that is read. A torn tail is cut, the last
segment is appended to again; an unreadable file is removed, as nothing in it can be told apart.
Rejected: checking every entry's CRC here (it is checked when it is read, and the start would take
as long as reading the disk).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from headrace.frames import EntryKey
from headrace_cache.disk_catalog import Catalog
from headrace_cache.disk_files import Files, read_all
from headrace_cache.disk_segment import Segment
from headrace_cache.segments import (
    SEGMENT_HEAD_BYTES,
    Found,
    Op,
    Reader,
    Scan,
    decode_segment_head,
    segment_number,
)

log = structlog.get_logger(__name__)


class Losses(Protocol):
    """Where recovery counts what it could not read."""

    lost_records: int
    lost_segments: int


@dataclass(slots=True)
class Recovered:
    """The segments, oldest first, of which the last may be open; and the keys found in them."""

    segments: list[Segment] = field(default_factory=list)
    keys: dict[EntryKey, None] = field(default_factory=dict)
    next_number: int = 1


def recover(files: Files, catalog: Catalog, losses: Losses) -> Recovered:
    """Read all segments of the directory into `catalog`. Raises OSError if it cannot be listed."""
    recovered = Recovered()
    numbers = [(segment_number(name), name) for name in files.names()]
    for number, name in numbers:
        if number is None:
            continue
        recovered.next_number = max(recovered.next_number, number + 1)
        opened = _open(files, number, name)
        if opened is None:
            losses.lost_segments += 1
            log.warning("unreadable segment removed", name=name)
            with contextlib.suppress(OSError):
                files.unlink(name)
            continue
        segment, scan = opened
        losses.lost_records += scan.lost
        recovered.segments.append(segment)
        for found in scan.records:
            _replay(segment.number, found, catalog, recovered.keys)
    for segment in recovered.segments[:-1]:
        if segment.is_open:
            segment.seal()
    return recovered


def _open(files: Files, number: int, name: str) -> tuple[Segment, Scan] | None:
    """A segment and what is in it, cut behind its last whole record; None if it is unreadable."""
    try:
        fd = files.open(name)
    except OSError:
        return None
    try:
        size_bytes = files.size(fd)
        buffer = bytearray(min(SEGMENT_HEAD_BYTES, size_bytes))
        read_all(files, fd, [buffer], 0)
        head = decode_segment_head(bytes(buffer))
        if head is not None and head.number == number:
            segment = Segment(files, number, fd, head.marker)
            scan = Reader(files, fd, size_bytes, head.marker).scan()
            segment.adopt(scan, size_bytes)
            return segment, scan
    except OSError as error:
        log.warning("segment cannot be read", name=name, error=str(error))
    with contextlib.suppress(OSError):
        files.close(fd)
    return None


def _replay(segment: int, found: Found, catalog: Catalog, keys: dict[EntryKey, None]) -> None:
    """Let one record count."""
    head = found.head
    if head.op is Op.ENTRY:
        catalog.add(segment, found)
        keys[head.facts.key] = None
    elif head.op is Op.PIN:
        catalog.pin(head.facts.key, head.pinned_until_ms)
    elif head.op is Op.FORGET:
        catalog.drop(head.facts.key)
    elif head.op is Op.FORGET_TENANT:
        catalog.drop_tenant(head.facts.tenant)
