"""What segment files hold: records one after the other, and an index of them behind the last.

A segment starts with a head that draws its *marker*, 8 random bytes with which each of its records
begins: no byte of an entry, which a client chose, can pass for a record, nor can what an earlier
file left in a disk block. A record is a fixed head, the tenant's name, and the entry's bytes; one
CRC covers the head with the name, another the bytes. A sealed segment ends with an index record
(all heads with their offsets) and a trailer that says where it is.

Invariant: nothing read is believed before its CRC was right and its lengths were held against the
file's; where a head is unreadable, reading goes on at the next marker, and what lies between is
counted as lost.
Rejected: an index file of its own (two files can disagree); a scan of every file at each start.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from headrace.checksum import checksum
from headrace.frames import (
    COST_MAX,
    DEPTH_MAX,
    ENTRY_BYTES_MAX,
    KINDS,
    KV,
    TENANT_CHARS_MAX,
    EntryFacts,
    EntryKey,
)
from headrace.policy.hashing import HASH_BYTES
from headrace.types import Band
from headrace_cache.disk_files import Files, read_all

MAGIC = b"HEADRACE"
VERSION = 1
MARKER_BYTES = 8
RECORDS_MAX = 1 << 14
"""Records in one segment: bounds its index and the time to forget it."""

TENANT_BYTES_MAX = 4 * TENANT_CHARS_MAX
TIME_MS_MAX = 1 << 50
SEARCH_BYTES = 1 << 20

SEGMENT_HEAD = struct.Struct("<8sIQQ8s")
RECORD_HEAD = struct.Struct("<8sBBBBHIIIdQ32s32s8sI")
CRC = struct.Struct("<I")
OFFSET = struct.Struct("<Q")
TRAILER = struct.Struct("<8sQ")

SEGMENT_HEAD_BYTES = SEGMENT_HEAD.size + CRC.size
HEAD_BYTES = RECORD_HEAD.size + CRC.size
TRAILER_BYTES = TRAILER.size + CRC.size
INDEX_BYTES_MAX = RECORDS_MAX * (OFFSET.size + HEAD_BYTES + TENANT_BYTES_MAX)

_HAS_PARENT = 1
_HAS_LAYOUT = 2
_SUFFIX = ".segment"
_NAME_DIGITS = 16


class Op(IntEnum):
    """What a record says."""

    ENTRY = 1
    PIN = 2
    FORGET = 3
    FORGET_TENANT = 4
    INDEX = 5


class Head(NamedTuple):
    """A record but for its bytes, of which `facts` has the size and the CRC.

    `pinned_until_ms` is wall-clock time, 0 for no pin. Only an ENTRY uses all facts; a PIN and a
    FORGET use the key, a FORGET_TENANT the tenant, an INDEX the size and the CRC.
    """

    op: Op
    facts: EntryFacts
    pinned_until_ms: int


class Found(NamedTuple):
    """A record and where it starts."""

    offset: int
    head: Head
    head_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.head_bytes + self.head.facts.size_bytes


class SegmentHead(NamedTuple):
    """What a segment says of itself at its start."""

    number: int
    created_ms: int
    marker: bytes


@dataclass(slots=True)
class Scan:
    """What a segment holds. `end` is where its last whole record ends, `lost` counts gaps."""

    records: list[Found] = field(default_factory=list)
    end: int = SEGMENT_HEAD_BYTES
    sealed: bool = False
    lost: int = 0


def segment_name(number: int) -> str:
    return f"{number:0{_NAME_DIGITS}d}{_SUFFIX}"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name, None for other files."""
    digits = name.removesuffix(_SUFFIX)
    if digits == name or len(digits) != _NAME_DIGITS or not (digits.isascii() and digits.isdigit()):
        return None
    return int(digits)


def note(op: Op, key: EntryKey | None = None, tenant: str = "", until_ms: int = 0) -> Head:
    """A record without bytes: a pin, or something to forget."""
    key = key or EntryKey(KV, bytes(HASH_BYTES))
    facts = EntryFacts(
        key, parent=b"", depth=0, size_bytes=0, crc=0, band=Band.STANDARD, tenant=tenant,
        cost_tokens=0, cost_ms=0.0,
    )  # fmt: skip
    return Head(op, facts, until_ms)


def encode_segment_head(head: SegmentHead) -> bytes:
    packed = SEGMENT_HEAD.pack(MAGIC, VERSION, head.number, head.created_ms, head.marker)
    return packed + CRC.pack(checksum(packed))


def decode_segment_head(data: bytes) -> SegmentHead | None:
    """The head of a segment, None if these bytes are not one of ours."""
    if len(data) != SEGMENT_HEAD_BYTES:
        return None
    magic, version, number, created_ms, marker = SEGMENT_HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        return None
    if CRC.unpack_from(data, SEGMENT_HEAD.size)[0] != checksum(data[: SEGMENT_HEAD.size]):
        return None
    return SegmentHead(number, created_ms, marker)


def encode_head(head: Head, marker: bytes) -> bytes:
    """A record's head and its tenant's name, as they stand before its bytes."""
    facts = head.facts
    tenant = facts.tenant.encode()
    flags = (_HAS_PARENT if facts.parent else 0) | (_HAS_LAYOUT if facts.layout else 0)
    packed = RECORD_HEAD.pack(
        marker, head.op, KINDS.index(facts.key.kind), facts.band, flags, len(tenant),
        facts.depth, facts.size_bytes, facts.cost_tokens, facts.cost_ms,
        min(head.pinned_until_ms, TIME_MS_MAX), facts.key.hash, facts.parent, facts.layout,
        facts.crc,
    )  # fmt: skip
    return packed + CRC.pack(checksum(tenant, checksum(packed))) + tenant


def tenant_bytes_of(fixed: bytes | bytearray, marker: bytes) -> int | None:
    """How long the name behind a head's fixed part is; None if this is no head of ours."""
    if len(fixed) < HEAD_BYTES or fixed[:MARKER_BYTES] != marker:
        return None
    size: int = RECORD_HEAD.unpack_from(fixed)[5]
    return size if size <= TENANT_BYTES_MAX else None


def decode_head(data: bytes | bytearray, marker: bytes) -> Head | None:
    """The record whose head and name are exactly `data`, or None."""
    tenant_bytes = tenant_bytes_of(data, marker)
    if tenant_bytes is None or len(data) != HEAD_BYTES + tenant_bytes:
        return None
    tenant = bytes(data[HEAD_BYTES:])
    crc = checksum(tenant, checksum(bytes(data[: RECORD_HEAD.size])))
    if CRC.unpack_from(data, RECORD_HEAD.size)[0] != crc:
        return None
    try:
        return _head_of(RECORD_HEAD.unpack_from(data), tenant.decode())
    except ValueError:
        return None


def _head_of(fields: tuple[object, ...], tenant: str) -> Head:
    """The head in unpacked `fields`. Raises ValueError if one of them is beyond its limits."""
    (_, op, kind, band, flags, _, depth, size, tokens, cost_ms, until_ms, hash_, parent, layout,
     crc) = fields  # fmt: skip
    assert isinstance(op, int) and isinstance(kind, int) and isinstance(band, int)
    assert isinstance(flags, int) and isinstance(depth, int) and isinstance(size, int)
    assert isinstance(tokens, int) and isinstance(cost_ms, float) and isinstance(until_ms, int)
    assert isinstance(hash_, bytes) and isinstance(parent, bytes) and isinstance(layout, bytes)
    assert isinstance(crc, int)
    op = Op(op)
    size_max = INDEX_BYTES_MAX if op is Op.INDEX else ENTRY_BYTES_MAX
    within = kind < len(KINDS) and depth <= DEPTH_MAX and size <= size_max
    within = within and tokens <= COST_MAX and 0 <= cost_ms <= COST_MAX and until_ms <= TIME_MS_MAX
    if not within or (op is Op.ENTRY) != (size > 0 and op is not Op.INDEX):
        raise ValueError("a field is beyond its limits")
    facts = EntryFacts(
        key=EntryKey(KINDS[kind], hash_),
        parent=parent if flags & _HAS_PARENT else b"",
        depth=depth,
        size_bytes=size,
        crc=crc,
        band=Band(band),
        tenant=tenant,
        cost_tokens=tokens,
        cost_ms=cost_ms,
        layout=layout if flags & _HAS_LAYOUT else b"",
    )
    return Head(op, facts, until_ms)


def index_entry(offset: int, encoded_head: bytes) -> bytes:
    """What stands in a segment's index for the record at `offset`.

    Without the marker, so that the index can never be taken for records.
    """
    return OFFSET.pack(offset) + encoded_head[MARKER_BYTES:]


def encode_index(entries: bytes, marker: bytes, offset: int) -> bytes:
    """The index record and the trailer that seal a segment whose records end at `offset`."""
    plain = note(Op.INDEX).facts
    facts = EntryFacts(
        plain.key, parent=b"", depth=0, size_bytes=len(entries), crc=checksum(entries),
        band=plain.band, tenant="", cost_tokens=0, cost_ms=0.0,
    )  # fmt: skip
    trailer = TRAILER.pack(marker, offset)
    head = encode_head(Head(Op.INDEX, facts, 0), marker)
    return head + entries + trailer + CRC.pack(checksum(trailer))


class Reader:
    """Reads one segment file of `size_bytes`, trusting nothing in it."""

    def __init__(self, files: Files, fd: int, size_bytes: int, marker: bytes) -> None:
        self._files = files
        self._fd = fd
        self._size_bytes = size_bytes
        self._marker = marker

    def scan(self) -> Scan:
        """All records, by the index if there is a good one, else one by one. Raises OSError."""
        return self._by_index() or self._by_walking()

    def _take(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer at the end of the file."""
        buffer = bytearray(max(0, min(size, self._size_bytes - offset)))
        return bytes(buffer[: read_all(self._files, self._fd, [buffer], offset)])

    def _head_at(self, offset: int) -> Found | None:
        """The record at `offset`, if its head is right; its bytes may still go beyond the end."""
        data = self._take(offset, HEAD_BYTES)
        tenant_bytes = tenant_bytes_of(data, self._marker)
        if tenant_bytes is None:
            return None
        data += self._take(offset + HEAD_BYTES, tenant_bytes)
        head = decode_head(data, self._marker)
        return None if head is None else Found(offset, head, len(data))

    def _by_index(self) -> Scan | None:
        trailer = self._take(self._size_bytes - TRAILER_BYTES, TRAILER_BYTES)
        if len(trailer) != TRAILER_BYTES:
            return None
        marker, offset = TRAILER.unpack_from(trailer)
        if CRC.unpack_from(trailer, TRAILER.size)[0] != checksum(trailer[: TRAILER.size]):
            return None
        index = self._head_at(offset) if marker == self._marker else None
        if index is None or index.head.op is not Op.INDEX:
            return None
        if index.end != self._size_bytes - TRAILER_BYTES:
            return None
        entries = self._take(index.offset + index.head_bytes, index.head.facts.size_bytes)
        if checksum(entries) != index.head.facts.crc:
            return None
        return self._listed(entries, index.offset)

    def _listed(self, entries: bytes, end: int) -> Scan | None:
        """The records in an index whose segment's records end at `end`."""
        scan = Scan(end=end, sealed=True)
        at = 0
        while at < len(entries):
            if at + OFFSET.size > len(entries):
                return None
            (offset,) = OFFSET.unpack_from(entries, at)
            at += OFFSET.size
            fixed = self._marker + entries[at : at + HEAD_BYTES - MARKER_BYTES]
            tenant_bytes = tenant_bytes_of(fixed, self._marker)
            data = self._marker + entries[at : at + HEAD_BYTES - MARKER_BYTES + (tenant_bytes or 0)]
            head = decode_head(data, self._marker)
            if head is None:
                return None
            found = Found(offset, head, len(data))
            if offset < SEGMENT_HEAD_BYTES or found.end > end:
                return None
            scan.records.append(found)
            at += len(data) - MARKER_BYTES
        return scan if len(scan.records) <= RECORDS_MAX else None

    def _by_walking(self) -> Scan:
        scan = Scan()
        for found in self._walk(scan):
            scan.records.append(found)
            scan.end = found.end
            if len(scan.records) == RECORDS_MAX:
                break
        return scan

    def _walk(self, scan: Scan) -> Iterator[Found]:
        offset = SEGMENT_HEAD_BYTES
        while offset < self._size_bytes:
            found = self._head_at(offset)
            if found is not None and found.end <= self._size_bytes:
                if found.head.op is not Op.INDEX:
                    yield found
                offset = found.end
                continue
            if found is None and offset + TRAILER_BYTES == self._size_bytes:
                return  # the trailer, behind an index that was not good
            scan.lost += 1
            offset = self._next_marker(offset + 1)

    def _next_marker(self, offset: int) -> int:
        """Where the marker stands next, from `offset` on; the file's size if nowhere."""
        while offset < self._size_bytes:
            chunk = self._take(offset, SEARCH_BYTES + MARKER_BYTES - 1)
            if not chunk:
                break
            at = chunk.find(self._marker)
            if at >= 0:
                return offset + at
            offset += SEARCH_BYTES
        return self._size_bytes
