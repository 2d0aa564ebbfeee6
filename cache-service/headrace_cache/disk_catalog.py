"""What is on disk and where, in memory: names to places, and each segment's records in arrays.

Entries are named by 60 bits of their hash, so that an entry takes about 150 bytes here. Two entries
of one name cannot both be known, and whoever reads one compares the whole key that stands on disk:
the worst that can come of a clash is a miss.
Invariants: a name's reference points at a record of that name in a segment that is known; the
newest record of a name is the one referred to; live counts are counts of such records.
One lock holds it all together: the event loop looks up while the disk's threads add and drop.
Rejected: whole keys (80 bytes more an entry); a reference in the RAM tier's index (either tier
could then not change without the other).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from headrace.frames import KINDS, EntryKey
from headrace.policy.hashing import MODEL_TAG_BYTES
from headrace_cache.segments import RECORDS_MAX, Found

USES_MAX = 255
NAME_SHIFT = 4
_KIND_BITS = {kind: bits for bits, kind in enumerate(KINDS)}
SLICE = 256
"""Records dropped under one hold of the lock: less than 1 ms."""


class Place(NamedTuple):
    """Where an entry is on disk: good until its segment goes, and then no worse than a miss."""

    key: EntryKey
    segment: int
    offset: int
    head_bytes: int
    size_bytes: int


class Live(NamedTuple):
    """A record that is referred to, as `live_in` tells of it."""

    record: int
    offset: int
    uses: int
    band: int
    pinned_until_ms: int


class _Records:
    """One segment's entries."""

    def __init__(self) -> None:
        self.names = array("Q")
        self.offsets = array("Q")
        self.sizes = array("I")
        self.heads = array("H")
        self.tenants = array("I")
        self.models = array("I")
        self.bands = bytearray()
        self.uses = bytearray()
        self.live = 0


def name_of(key: EntryKey) -> int:
    """60 bits that name `key` here."""
    return (int.from_bytes(key.hash[:8], "little") >> NAME_SHIFT) ^ _KIND_BITS[key.kind]


class Catalog:
    """All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refs: dict[int, int] = {}
        self._segments: dict[int, _Records] = {}
        self._pins: dict[int, int] = {}
        self._tenants: dict[str, int] = {}
        self._tenant_bytes = array("Q")
        self._tenant_records = array("Q")
        self._tenant_numbers_free: list[int] = []
        self.bytes = 0
        self.pinned_bytes = 0

    def __len__(self) -> int:
        return len(self._refs)

    # what is asked

    def find(self, key: EntryKey) -> Place | None:
        with self._lock:
            return self._find(key)

    def find_run(self, keys: Sequence[EntryKey]) -> list[Place]:
        """The places of `keys` up to the first that is not on disk."""
        names = [name_of(key) for key in keys]
        places: list[Place] = []
        with self._lock:
            refs, segments = self._refs, self._segments
            for key, name in zip(keys, names, strict=True):
                ref = refs.get(name)
                if ref is None:
                    break
                records, record = segments[ref // RECORDS_MAX], ref % RECORDS_MAX
                places.append(
                    Place(key, ref // RECORDS_MAX, records.offsets[record],
                          records.heads[record], records.sizes[record])
                )  # fmt: skip
        return places

    def _find(self, key: EntryKey) -> Place | None:
        ref = self._refs.get(name_of(key))
        if ref is None:
            return None
        number, record = divmod(ref, RECORDS_MAX)
        records = self._segments[number]
        offset, head = records.offsets[record], records.heads[record]
        return Place(key, number, offset, head, records.sizes[record])

    def model_of(self, key: EntryKey) -> bytes | None:
        """The tag of the model that an entry is of, zeros for none; None where it is not known."""
        with self._lock:
            ref = self._refs.get(name_of(key))
            if ref is None:
                return None
            number, record = divmod(ref, RECORDS_MAX)
            return self._segments[number].models[record].to_bytes(MODEL_TAG_BYTES)

    def models(self) -> set[int]:
        """The tags of all models, as numbers. Takes time in all entries."""
        with self._lock:
            return {tag for records in self._segments.values() for tag in records.models}

    def segments(self) -> list[int]:
        with self._lock:
            return list(self._segments)

    def names_in(self, segment: int, model: bytes) -> list[int]:
        """The names of a model's records in `segment` that are referred to."""
        wanted = int.from_bytes(model)
        with self._lock:
            records = self._segments.get(segment)
            if records is None:
                return []
            first = segment * RECORDS_MAX
            return [
                name
                for record, name in enumerate(records.names)
                if records.models[record] == wanted and self._refs.get(name) == first + record
            ]

    def live_in(self, segment: int) -> list[Live]:
        """The records of `segment` that are referred to, in the order of their offsets."""
        with self._lock:
            records = self._segments.get(segment)
            if records is None or not records.live:
                return []
            return [
                Live(record, records.offsets[record], records.uses[record],
                     records.bands[record], self._pins.get(name, 0))
                for record, name in enumerate(records.names)
                if self._refs.get(name) == segment * RECORDS_MAX + record
            ]  # fmt: skip

    def live_count(self, segment: int) -> int:
        with self._lock:
            records = self._segments.get(segment)
            return records.live if records is not None else 0

    def is_of(self, key: EntryKey, tenant: str) -> bool:
        """Whether `key` is on disk, and `tenant`'s."""
        with self._lock:
            ref = self._refs.get(name_of(key))
            if ref is None:
                return False
            number, record = divmod(ref, RECORDS_MAX)
            return self._segments[number].tenants[record] == self._tenants.get(tenant)

    def tenant_bytes(self, tenant: str) -> int:
        """Bytes of all entries of `tenant`."""
        with self._lock:
            number = self._tenants.get(tenant)
            return self._tenant_bytes[number] if number is not None else 0

    def by_tenant(self) -> dict[str, int]:
        """Bytes of entries by tenant, of those that have any."""
        with self._lock:
            held = {tenant: self._tenant_bytes[n] for tenant, n in self._tenants.items()}
            return {tenant: size_bytes for tenant, size_bytes in held.items() if size_bytes}

    def pinned_until_ms(self, key: EntryKey) -> int:
        with self._lock:
            return self._pins.get(name_of(key), 0)

    # what comes and goes

    def add(self, segment: int, found: Found, uses: int = 0) -> None:
        """The entry `found` in `segment` is the newest of its name."""
        facts = found.head.facts
        name = name_of(facts.key)
        with self._lock:
            self._unref(name)
            records = self._segments.setdefault(segment, _Records())
            assert len(records.names) < RECORDS_MAX, "a full segment is sealed"
            tenant = self._tenant_number(facts.tenant)
            self._refs[name] = segment * RECORDS_MAX + len(records.names)
            records.names.append(name)
            records.offsets.append(found.offset)
            records.sizes.append(facts.size_bytes)
            records.heads.append(found.head_bytes)
            records.tenants.append(tenant)
            records.models.append(int.from_bytes(facts.layout[:MODEL_TAG_BYTES]))
            records.bands.append(facts.band)
            records.uses.append(min(uses, USES_MAX))
            records.live += 1
            self.bytes += facts.size_bytes
            self._tenant_bytes[tenant] += facts.size_bytes
            self._tenant_records[tenant] += 1
            self._set_pin(name, found.head.pinned_until_ms)

    def _tenant_number(self, tenant: str) -> int:
        number = self._tenants.get(tenant)
        if number is None:
            if self._tenant_numbers_free:
                number = self._tenant_numbers_free.pop()
            else:
                number = len(self._tenant_bytes)
                self._tenant_bytes.append(0)
                self._tenant_records.append(0)
            self._tenants[tenant] = number
        return number

    def _set_pin(self, name: int, until_ms: int) -> None:
        """Pin what is known until then, or unpin it (0)."""
        number, record = divmod(self._refs[name], RECORDS_MAX)
        size_bytes = self._segments[number].sizes[record]
        if self._pins.pop(name, 0):
            self.pinned_bytes -= size_bytes
        if until_ms:
            self._pins[name] = until_ms
            self.pinned_bytes += size_bytes

    def _unref(self, name: int) -> bool:
        if name not in self._refs:
            return False
        self._set_pin(name, 0)
        ref = self._refs.pop(name)
        number, record = divmod(ref, RECORDS_MAX)
        records = self._segments[number]
        records.live -= 1
        self.bytes -= records.sizes[record]
        self._tenant_bytes[records.tenants[record]] -= records.sizes[record]
        return True

    def touch(self, key: EntryKey) -> bool:
        """Count a use of `key`; whether it is on disk."""
        with self._lock:
            ref = self._refs.get(name_of(key))
            if ref is None:
                return False
            number, record = divmod(ref, RECORDS_MAX)
            uses = self._segments[number].uses
            uses[record] = min(uses[record] + 1, USES_MAX)
            return True

    def pin(self, key: EntryKey, until_ms: int) -> bool:
        """Keep `key` until then (0: no longer); whether it is on disk."""
        name = name_of(key)
        with self._lock:
            if name not in self._refs:
                return False
            self._set_pin(name, until_ms)
            return True

    def end_pins(self, now_ms: int) -> None:
        """Take off the pins whose time has come. Takes time in all pins."""
        with self._lock:
            for name in [name for name, until in self._pins.items() if until <= now_ms]:
                self._set_pin(name, 0)

    def drop(self, key: EntryKey, place: Place | None = None) -> bool:
        """Forget `key`, if it is (still, where a place is given) there."""
        with self._lock:
            now = self._find(key)
            if now is None or (place is not None and now != place):
                return False
            return self._unref(name_of(key))

    def drop_tenant(self, tenant: str) -> int:
        """Forget all of a tenant's entries; how many. Takes time in all entries, in slices."""
        with self._lock:
            number = self._tenants.get(tenant)
            segments = list(self._segments)
        if number is None:
            return 0
        return sum(self._drop_in(segment, number) for segment in segments)

    def _drop_in(self, segment: int, tenant: int) -> int:
        dropped = 0
        for live in self.live_in(segment):
            with self._lock:
                records = self._segments[segment]
                name = records.names[live.record]
                if records.tenants[live.record] == tenant:
                    dropped += self._unref(name)
        return dropped

    def drop_segment(self, segment: int) -> None:
        """Forget the segment and all that is still referred to in it."""
        start = 0
        while True:
            with self._lock:
                records = self._segments.get(segment)
                if records is None:
                    return
                for record in range(start, min(start + SLICE, len(records.names))):
                    name = records.names[record]
                    if self._refs.get(name) == segment * RECORDS_MAX + record:
                        self._unref(name)
                start += SLICE
                if start >= len(records.names):
                    del self._segments[segment]
                    self._forget_tenants(records)
                    return

    def _forget_tenants(self, records: _Records) -> None:
        """Count off the tenants of `records`; numbers that nothing uses any more are free."""
        gone = set()
        for tenant in records.tenants:
            self._tenant_records[tenant] -= 1
            if not self._tenant_records[tenant]:
                gone.add(tenant)
        if gone:
            self._tenant_numbers_free += sorted(gone)
            self._tenants = {name: n for name, n in self._tenants.items() if n not in gone}

    def check_integrity(self) -> None:
        """Assert that references, records and counts agree. Takes time in all entries."""
        with self._lock:
            live = dict.fromkeys(self._segments, 0)
            tenant_bytes = [0] * len(self._tenant_bytes)
            records_of = [0] * len(self._tenant_bytes)
            for name, ref in self._refs.items():
                number, record = divmod(ref, RECORDS_MAX)
                records = self._segments[number]
                assert records.names[record] == name, "a reference leads to its name"
                live[number] += 1
                tenant_bytes[records.tenants[record]] += records.sizes[record]
            for number, records in self._segments.items():
                assert records.live == live[number], "live records are counted"
                for tenant in records.tenants:
                    records_of[tenant] += 1
            assert records_of == list(self._tenant_records), "tenants' records are counted"
            used = {n for n, count in enumerate(records_of) if count}
            assert used == set(self._tenants.values()), "a tenant with records has a number"
            assert tenant_bytes == list(self._tenant_bytes), "tenants' bytes add up"
            assert sum(tenant_bytes) == self.bytes, "bytes add up"
            pinned_bytes = 0
            for name in self._pins:
                number, record = divmod(self._refs[name], RECORDS_MAX)
                pinned_bytes += self._segments[number].sizes[record]
            assert pinned_bytes == self.pinned_bytes, "pinned bytes add up"
