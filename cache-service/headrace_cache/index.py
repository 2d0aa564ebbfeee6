"""What the cache service knows of each entry: hash to slot, facts in columns, its tiers.

Invariants: a key has one slot as long as it lies in a tier, is being written, or has children that
do; a slot's parent is one step less deep, so that links never form a ring, whatever was sent;
a slot without a tier has no parent. Facts stand in arrays of machine numbers, 53 bytes an entry
beside its key.
Rejected: an object an entry (600 bytes and more at a million entries, and a garbage collector that
walks them all); numpy, which the service would need for nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from headrace.frames import KINDS, EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.policy.eviction import NO_SLOT, Facts

GROWTH_SLOTS_MIN = 256
COST_US_MAX = (1 << 32) - 1
TENANTS_MAX = 256
OTHER_TENANTS = "(others)"
NO_PLACE = -1
BANDS = tuple(Band)
KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


class Tier(IntEnum):
    """Where an entry lies, as a bit; PENDING: it is being written, and nobody may read it yet."""

    RAM = 1
    DISK = 2
    PENDING = 4


READABLE: int = Tier.RAM | Tier.DISK
_RAM, _DISK = int(Tier.RAM), int(Tier.DISK)


class Record(NamedTuple):
    """What is known of an entry beside its key. `parent` is a hash, empty for none; `tenant` a
    number from `Index.tenant`; `layout` 64 bits that say how its bytes are to be read."""

    parent: bytes
    depth: int
    size_bytes: int
    crc: int
    band: Band
    tenant: int
    cost_us: int = 0
    layout: int = 0


class Index:
    """Entries by key and by slot. Columns are public to be read by slot; only methods write."""

    def __init__(self) -> None:
        self._slots: dict[str, dict[bytes, int]] = {kind: {} for kind in KINDS}
        self._hashes: list[bytes] = []
        self._free = array("i")
        self._tenants: dict[str, int] = {}
        self._names: list[str] = []
        self.counts = dict.fromkeys(Tier, 0)
        self.kind = bytearray()
        self.tiers = bytearray()
        self.band = bytearray()
        self.tenant_of = array("H")
        self.parent = array("i")
        self.children = array("I")
        self.depth = array("I")
        self.size_bytes = array("I")
        self.crc = array("I")
        self.cost_us = array("I")
        self.layout = array("Q")
        self.ram_place = array("q")
        self.disk_place = array("q")

    def __len__(self) -> int:
        """Slots in use: entries, and parents that only their children know of."""
        return len(self._hashes) - len(self._free)

    # finding

    def find(self, key: EntryKey, tiers: int = READABLE) -> int:
        """The slot of `key` if it lies in one of `tiers`, else NO_SLOT."""
        slot = self._slots[key.kind].get(key.hash, NO_SLOT)
        return slot if slot != NO_SLOT and self.tiers[slot] & tiers else NO_SLOT

    def find_run(self, kind: str, hashes: Sequence[bytes], tiers: int = READABLE) -> list[int]:
        """Slots of `hashes` up to the first that lies in none of `tiers`."""
        known, where, mask = self._slots[kind].get, self.tiers, int(tiers)
        run: list[int] = []
        for key_hash in hashes:
            slot = known(key_hash)
            if slot is None or not where[slot] & mask:
                break
            run.append(slot)
        return run

    def key(self, slot: int) -> EntryKey:
        return EntryKey(KINDS[self.kind[slot]], self._hashes[slot])

    def entries(self, start: int = 0, tiers: int = READABLE) -> Iterator[int]:
        """Slots from `start` on that lie in one of `tiers`: a cursor's order."""
        for slot in range(start, len(self._hashes)):
            if self.tiers[slot] & tiers:
                yield slot

    def hashes_of(
        self, kind: str, layouts: range, first: int, last: int, tiers: int = READABLE
    ) -> list[bytes]:
        """Hashes of the entries in slots `first` up to `last` whose layouts are in a range."""
        where, kinds, layout, number = self.tiers, self.kind, self.layout, KINDS.index(kind)
        return [
            self._hashes[slot]
            for slot in range(first, min(last, len(self._hashes)))
            if where[slot] & tiers and layout[slot] in layouts and kinds[slot] == number
        ]

    @property
    def slots(self) -> int:
        """One more than the highest slot that was ever used."""
        return len(self._hashes)

    def facts(self, slot: int, size_bytes: int) -> Facts:
        """What a policy is told of `slot`, which takes `size_bytes` from its budget."""
        return Facts(
            size_bytes,
            BANDS[self.band[slot]],
            self.parent[slot],
            self.tenant_of[slot],
            self.cost_us[slot],
            self.depth[slot],
            int.from_bytes(self._hashes[slot][:8]),
        )

    def record(self, slot: int) -> Record:
        """All that was said of `slot`; its parent only if that one's link counts."""
        parent = self.parent[slot]
        return Record(
            parent=b"" if parent == NO_SLOT else self._hashes[parent],
            depth=self.depth[slot],
            size_bytes=self.size_bytes[slot],
            crc=self.crc[slot],
            band=Band(self.band[slot]),
            tenant=self.tenant_of[slot],
            cost_us=self.cost_us[slot],
            layout=self.layout[slot],
        )

    # tenants

    def tenant(self, name: str) -> int:
        """The number of tenant `name`; those past TENANTS_MAX share one more."""
        number = self._tenants.get(name)
        if number is not None:
            return number
        if len(self._names) >= TENANTS_MAX:
            name = OTHER_TENANTS
        if name not in self._tenants:
            self._tenants[name] = len(self._names)
            self._names.append(name)
        return self._tenants[name]

    def tenant_name(self, number: int) -> str:
        return self._names[number]

    # coming and going

    def enter(self, key: EntryKey, record: Record, tier: Tier, place: int = NO_PLACE) -> int:
        """Note that `key` lies at `place` of `tier`; returns its slot.

        An entry that lies somewhere already keeps its record.
        """
        kind, key_hash = key
        slot = self._slots[kind].get(key_hash, NO_SLOT)
        if slot == NO_SLOT:
            slot = self._take_slot(key, record.depth)
        if not self.tiers[slot]:
            self._describe(slot, record)
            self._link(slot, kind, record.parent)
        self.place(slot, tier, place)
        return slot

    def enter_all(
        self,
        entries: Sequence[EntryFacts],
        tenant: int,
        costs_us: Sequence[int],
        charges: Sequence[int],
    ) -> tuple[list[int], list[Facts]]:
        """As `enter` for each, PENDING, of entries of `tenant` that lie nowhere; and what a policy
        is told of them, which take `charges` from its budget."""
        slots: list[int] = []
        told: list[Facts] = []
        pending = int(Tier.PENDING)
        for facts, cost_us, charge in zip(entries, costs_us, charges, strict=True):
            key, parent, depth, size_bytes, crc, band, _, _, _, layout, _ = facts
            slot = self._slots[key.kind].get(key.hash, NO_SLOT)
            if slot == NO_SLOT:
                slot = self._take_slot(key, depth)
            assert not self.tiers[slot], "what is entered at once lies nowhere"
            self.tiers[slot] = pending
            self.band[slot] = band
            self.tenant_of[slot] = tenant
            self.size_bytes[slot] = size_bytes
            self.crc[slot] = crc
            self.cost_us[slot] = cost_us = min(cost_us, COST_US_MAX)
            self.layout[slot] = int.from_bytes(layout)
            self.ram_place[slot] = self.disk_place[slot] = NO_PLACE
            if parent:
                self._link(slot, key.kind, parent)
            slots.append(slot)
            name = int.from_bytes(key.hash[:8])
            link, deep = self.parent[slot], self.depth[slot]
            told.append(Facts(charge, band, link, tenant, cost_us, deep, name))
        self.counts[Tier.PENDING] += len(slots)
        return slots, told

    def place(self, slot: int, tier: Tier, place: int = NO_PLACE) -> None:
        """Note that `slot`, which lies somewhere already or is just being entered, lies there."""
        tiers, bit = self.tiers[slot], int(tier)
        if not tiers & bit:
            self.tiers[slot] = tiers | bit
            self.counts[tier] += 1
        if bit == _RAM:
            self.ram_place[slot] = place
        elif bit == _DISK:
            self.disk_place[slot] = place

    def written(self, slots: Sequence[int], places: Sequence[int], crcs: Sequence[int]) -> None:
        """Note that `slots`, which were PENDING, lie in RAM now."""
        tiers, change = self.tiers, _RAM | Tier.PENDING
        for slot, place, crc in zip(slots, places, crcs, strict=True):
            assert tiers[slot] & change == Tier.PENDING, "what is written was not there"
            tiers[slot] ^= change
            self.ram_place[slot] = place
            self.crc[slot] = crc
        self.counts[Tier.PENDING] -= len(slots)
        self.counts[Tier.RAM] += len(slots)

    def leave(self, slot: int, tier: Tier) -> bool:
        """Note that `slot` no longer lies in `tier`; True if it lies nowhere now."""
        assert self.tiers[slot] & tier, "what leaves a tier was there"
        self.counts[tier] -= 1
        # plain numbers: taking a flag from flags takes ten times as long
        left = self.tiers[slot] & ~int(tier)
        self.tiers[slot] = left
        if left:
            return False
        parent, self.parent[slot] = self.parent[slot], NO_SLOT
        if not self.children[slot]:
            self._drop_unknown(slot)
        if parent != NO_SLOT:
            self.children[parent] -= 1
            if not self.tiers[parent]:
                self._drop_unknown(parent)
        return True

    def leave_all(self, slots: Sequence[int], tier: Tier) -> None:
        """As `leave` for each."""
        tiers, parents, children, bit = self.tiers, self.parent, self.children, int(tier)
        for slot in slots:
            assert tiers[slot] & bit, "what leaves a tier was there"
            left = tiers[slot] & ~bit
            tiers[slot] = left
            if left:
                continue
            parent, parents[slot] = parents[slot], NO_SLOT
            if not children[slot]:
                del self._slots[KINDS[self.kind[slot]]][self._hashes[slot]]
                self._hashes[slot] = b""
                self._free.append(slot)
            if parent != NO_SLOT:
                children[parent] -= 1
                if not tiers[parent]:
                    self._drop_unknown(parent)
        self.counts[tier] -= len(slots)

    def raise_band(self, slot: int, band: Band) -> None:
        """A request of `band` used `slot`."""
        self.band[slot] = min(self.band[slot], band)

    def _take_slot(self, key: EntryKey, depth: int) -> int:
        if self._free:
            slot = self._free.pop()
            self._hashes[slot] = key.hash
        else:
            slot = len(self._hashes)
            self._hashes.append(key.hash)
            if slot >= len(self.tiers):
                self._grow(max(slot + 1, slot + slot // 8, GROWTH_SLOTS_MIN))
        self._slots[key.kind][key.hash] = slot
        self.kind[slot] = KIND_NUMBERS[key.kind]
        self.depth[slot] = depth
        return slot

    def _grow(self, slots: int) -> None:
        more = slots - len(self.tiers)
        for column in (self.kind, self.tiers, self.band):
            column.extend(bytes(more))
        zeros = [0] * more
        for numbers in (self.tenant_of, self.children, self.depth, self.size_bytes, self.crc,
                        self.cost_us, self.layout, self.ram_place, self.disk_place):  # fmt: skip
            numbers.extend(zeros)
        self.parent.extend([NO_SLOT] * more)

    def _describe(self, slot: int, record: Record) -> None:
        self.band[slot] = record.band
        self.tenant_of[slot] = record.tenant
        self.size_bytes[slot] = record.size_bytes
        self.crc[slot] = record.crc
        self.cost_us[slot] = min(record.cost_us, COST_US_MAX)
        self.layout[slot] = record.layout
        self.ram_place[slot] = self.disk_place[slot] = NO_PLACE

    def _link(self, slot: int, kind: str, parent_hash: bytes) -> None:
        """Make the parent of that name the slot's own, if depths agree.

        A slot that its children brought has the depth that the first of them said; a parent that
        nobody put gets a slot, so that it has its children when it comes.
        """
        if not parent_hash or not self.depth[slot]:
            return
        parent = self._slots[kind].get(parent_hash, NO_SLOT)
        if parent == NO_SLOT:
            parent = self._take_slot(EntryKey(kind, parent_hash), self.depth[slot] - 1)
        elif self.depth[parent] != self.depth[slot] - 1:
            return
        self.parent[slot] = parent
        self.children[parent] += 1

    def _drop_unknown(self, slot: int) -> None:
        """Free `slot` if it lies nowhere and has no children."""
        if not self.tiers[slot] and not self.children[slot]:
            del self._slots[KINDS[self.kind[slot]]][self._hashes[slot]]
            self._hashes[slot] = b""
            self._free.append(slot)

    def check_integrity(self) -> None:
        """Assert that keys, slots, links and counts agree. Takes time in all entries."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free once"
        known = {slot: key for keys in self._slots.values() for key, slot in keys.items()}
        assert len(known) == len(self) == sum(map(len, self._slots.values())), "one slot a key"
        children = [0] * len(self.tiers)
        for slot, key_hash in known.items():
            assert slot not in free and self._hashes[slot] == key_hash, "keys and slots agree"
            assert self.tiers[slot] or self.children[slot], "a slot is kept for a reason"
            parent = self.parent[slot]
            if parent != NO_SLOT:
                assert self.tiers[slot], "what lies nowhere holds nobody"
                assert self.depth[parent] == self.depth[slot] - 1, "depth falls along a chain"
                children[parent] += 1
        assert children == list(self.children), "children are counted as they are"
        for tier in Tier:
            assert self.counts[tier] == sum(1 for tiers in self.tiers if tiers & tier), tier
