"""What a client writes: entries that bring their bytes, and entries that copy them on demand.

Tuples: a batch's are made, looked through and told while the writer waits to copy them, and frozen
dataclasses take four times as long for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from headrace.checksum import checksum
from headrace.copying import copy_bytes, copy_checked
from headrace.frames import (
    COST_MAX,
    DEPTH_MAX,
    ENTRY_BYTES_MAX,
    KINDS,
    KV,
    LAYOUT_BYTES,
    PIN_MS_MAX,
    TENANT_CHARS_MAX,
    Buffer,
    EntryFacts,
    EntryKey,
)
from headrace.policy.hashing import HASH_BYTES
from headrace.types import Band

BATCH_BYTES_MAX = 16 * 1024 * 1024
BATCH_ENTRIES_MAX = 256
GROWTH = 4


class WriteEntry(NamedTuple):
    """An entry whose bytes are copied when their place is known.

    `fill(view)` writes all `size_bytes` of them into `view`, and gives their CRC if it has it by
    the way. It may run in a thread, and not at all where the service has the entry or no room; in
    vain where that turns out meanwhile. Where it is `quick`, as it copies what is in memory and
    waits for nobody who does more, it may also run in the event loop. The other fields are
    EntryFacts'.
    """

    hash: bytes
    size_bytes: int
    fill: Callable[[memoryview], int | None]
    parent: bytes = b""
    depth: int = 0
    band: Band = Band.STANDARD
    tenant: str = ""
    cost_tokens: int = 0
    cost_ms: float = 0.0
    kind: str = KV
    layout: bytes = b""
    pin_ms: int = 0
    quick: bool = False

    def fill_checked(self, view: memoryview) -> int:
        """`fill`, and the CRC of what is in `view` then."""
        crc = self.fill(view)
        return checksum(view) if crc is None else crc

    def payload(self) -> Buffer:
        """The bytes, for a service whose arena is not mapped here."""
        data = bytearray(self.size_bytes)
        self.fill(memoryview(data))
        return data


class PutEntry(NamedTuple):
    """An entry with its bytes. `data` must stay as it is until the put is over.

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
    layout: bytes = b""
    pin_ms: int = 0

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def fill(self, view: memoryview) -> None:
        copy_bytes(view, self.data)

    def fill_checked(self, view: memoryview) -> int:
        return copy_checked(view, self.data)

    def payload(self) -> Buffer:
        return self.data


Entry = WriteEntry | PutEntry


def keys_of(hashes: Sequence[bytes], kind: str) -> tuple[EntryKey, ...]:
    assert kind in KINDS, f"kind is one of {KINDS}"
    assert all(len(each) == HASH_BYTES for each in hashes), f"a hash has {HASH_BYTES} bytes"
    return tuple(EntryKey(kind, each) for each in hashes)


def check_layout(layout: bytes) -> None:
    assert len(layout) in (0, LAYOUT_BYTES), f"a layout is empty or {LAYOUT_BYTES} bytes"


def check_entry(entry: Entry) -> None:
    """Assert what the service would hang up on."""
    assert entry.kind in KINDS, f"kind is one of {KINDS}"
    assert len(entry.hash) == HASH_BYTES, f"a hash has {HASH_BYTES} bytes"
    assert len(entry.parent) in (0, HASH_BYTES), f"a parent is empty or {HASH_BYTES} bytes"
    if isinstance(entry, PutEntry):
        assert memoryview(entry.data).format == "B", "entries are bytes: cast other memoryviews"
    assert 1 <= entry.size_bytes <= ENTRY_BYTES_MAX, f"an entry has 1 to {ENTRY_BYTES_MAX} bytes"
    assert 0 <= entry.depth <= DEPTH_MAX, f"depths go up to {DEPTH_MAX}"
    assert 0 <= entry.cost_tokens <= COST_MAX and 0 <= entry.cost_ms <= COST_MAX
    assert 0 <= entry.pin_ms <= PIN_MS_MAX, f"pins last up to {PIN_MS_MAX} ms"
    assert len(entry.tenant) <= TENANT_CHARS_MAX, (
        f"tenants have up to {TENANT_CHARS_MAX} characters"
    )
    check_layout(entry.layout)


def facts_of(entry: Entry, crc: int = 0) -> EntryFacts:
    return EntryFacts(
        EntryKey(entry.kind, entry.hash), entry.parent, entry.depth, entry.size_bytes, crc,
        entry.band, entry.tenant, entry.cost_tokens, float(entry.cost_ms), entry.layout,
        entry.pin_ms,
    )  # fmt: skip


def batches(
    entries: Sequence[Entry], size_bytes_max: int = BATCH_BYTES_MAX, first_bytes_max: int = 0
) -> list[list[Entry]]:
    """`entries` in order, cut where a batch would grow too large.

    The first is of `first_bytes_max` (0: as large as any), each of the others up to GROWTH times
    what the one before it was allowed.
    """
    cut: list[list[Entry]] = []
    limit_bytes = min(first_bytes_max or size_bytes_max, size_bytes_max)
    room_bytes = 0
    for entry in entries:
        size_bytes = entry.size_bytes
        room_bytes -= size_bytes
        if not cut or room_bytes < 0 or len(cut[-1]) >= BATCH_ENTRIES_MAX:
            room_bytes = limit_bytes - size_bytes
            limit_bytes = min(GROWTH * limit_bytes, size_bytes_max)
            cut.append([])
        cut[-1].append(entry)
    return cut
