"""Entries by key within a byte budget, in the arena.

Invariants: an entry is written once, between `reserve` and `commit`, and read by nobody meanwhile;
what is lent stays as it is until its lease ends, whatever becomes of the entry; room is made
before anything comes in (`room.py`), so that the budget always holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from headrace.checksum import checksum
from headrace.frames import KINDS, EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.arena import NOBODY, Arena
from headrace_cache.index import Index, Record, Tier
from headrace_cache.leases import Leases
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy
from headrace_cache.policy.quota import Quotas, Share
from headrace_cache.room import Room, charged_bytes
from headrace_cache.tallies import Tallies, Tally

TOKEN_MS_DEFAULT = 1.0
"""What a token is taken to cost where nobody measured."""

RESERVED_SHARE_MAX = 0.5
"""Of the budget, that entries being written take together."""

_RAM = int(Tier.RAM)
_WRITTEN = int(Tier.RAM | Tier.PENDING)
"""As plain numbers: operations on flags take ten times as long."""

NOWHERE = -1
OURSELVES = 0
"""Holds what the service itself reads or writes."""

Evicted = Callable[[EntryFacts, memoryview], None]
"""Told what leaves, and its bytes, before they are gone."""


class Outcome(StrEnum):
    """What became of an entry that was put."""

    KEPT = "kept"
    PRESENT = "present"
    BUSY = "busy"
    """Somebody else is writing it."""
    TOO_LARGE = "too_large"
    OUTRANKED = "outranked"
    """Worth less than all that would have to leave, or than what may leave."""
    SKIPPED = "skipped"
    """Too much is being written already."""


@dataclass(frozen=True, slots=True)
class Loan:
    """The leading run found for a list of keys, lent.

    `more`: cut short by the caller's limit. `saved_us` is what computing it would take; `tiers`
    (RAM or DISK) where its entries lay, if not all in RAM.
    """

    lease: int
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]
    more: bool
    saved_us: int
    tiers: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place for each entry, NOWHERE for those that are not to be written, and why."""

    ticket: int
    places: tuple[int, ...]
    outcomes: tuple[Outcome, ...]


class _Writing(NamedTuple):
    """An entry between reserve and commit."""

    slot: int
    place: int
    pin_ms: int


def _cost_us(facts: EntryFacts) -> int:
    """What computing an entry again takes."""
    return math.ceil(1000 * (facts.cost_ms or facts.cost_tokens * TOKEN_MS_DEFAULT))


class Store:
    """Bytes by key. One thread calls it; nothing here waits."""

    def __init__(
        self,
        budget_bytes: int,
        policy: EvictionPolicy,
        arena: Arena | None = None,
        reserved_bytes_max: int | None = None,
        watermarks: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """`arena` has room for `budget_bytes`; without it, private memory has.

        `reserved_bytes_max` is what entries being written take together, RESERVED_SHARE_MAX of the
        budget where it is not given. `watermarks` are shares of the budget: what exceeds the first
        is brought down to the second.
        """
        assert budget_bytes > 0, "settings see to a budget"
        self.budget_bytes = budget_bytes
        self.reserved_bytes_max = reserved_bytes_max or int(budget_bytes * RESERVED_SHARE_MAX)
        self.reserved_bytes = 0
        self.arena = arena or Arena(budget_bytes)
        self.index = Index()
        self.tallies = Tallies()
        self.leases = Leases()
        self.quotas = Quotas(budget_bytes, *watermarks)
        self.evicted: Evicted | None = None
        self.settled: Callable[[int], object] | None = None
        self.moved: Callable[[int], object] | None = None
        """Told of the slot of an entry that came or is going."""
        self._policy = policy
        self._room = Room(self.index, policy, self.arena, self.leases, self.quotas)
        self._room.leaving = self._leaving
        self._tickets: dict[int, dict[int, list[_Writing]]] = {}  # by holder and number

    def __len__(self) -> int:
        return self.index.counts[Tier.RAM]

    def __contains__(self, key: EntryKey) -> bool:
        return self.index.find(key, Tier.RAM) != NO_SLOT

    @property
    def used_bytes(self) -> int:
        """Charged to the budget now; what is lent and no entry's any more counts."""
        return self.quotas.used_bytes

    # reading

    def lend(
        self,
        holder: int,
        keys: Sequence[EntryKey],
        now_ms: int,
        limit_bytes: int,
        band: Band | None = None,
        layout: bytes = b"",
    ) -> Loan:
        """Lend `holder` the run of `keys` up to the first that is missing or has another layout.

        It is cut at `limit_bytes`. `keys` are of one kind.
        """
        slots, more = self.readable(keys, limit_bytes, layout)
        index = self.index
        self._policy.touch_all(slots, now_ms, band)
        if band is not None:
            for slot in slots:
                index.raise_band(slot, band)
        sizes = tuple(map(index.size_bytes.__getitem__, slots))
        saved_us = self.tallies.note_hits(index, slots)
        if not more and len(slots) < len(keys):
            self.tallies.kind(keys[0].kind).misses += len(keys) - len(slots)
        loan = Loan(
            self.leases.new_number() if slots else 0,
            tuple(map(index.ram_place.__getitem__, slots)),
            sizes,
            tuple(map(index.crc.__getitem__, slots)),
            more,
            saved_us,
        )
        if slots:
            self.leases.begin(holder, loan.lease, loan.places, sum(sizes), now_ms)
        return loan

    def hold(self, holder: int, slots: Sequence[int], now_ms: int) -> int:
        """Keep `slots` where they are until the lease that is returned ends; no use of them."""
        number = self.leases.new_number()
        places = [self.index.ram_place[slot] for slot in slots]
        size_bytes = sum(self.index.size_bytes[slot] for slot in slots)
        self.leases.begin(holder, number, places, size_bytes, now_ms)
        return number

    def readable(
        self, keys: Sequence[EntryKey], limit_bytes: int, layout: bytes
    ) -> tuple[list[int], bool]:
        """Slots of the run that may be read, and whether `limit_bytes` cut it."""
        if not keys:
            return [], False
        run = self.index.find_run(keys[0].kind, [key.hash for key in keys], Tier.RAM)
        wanted = int.from_bytes(layout)
        size_bytes = sum(map(self.index.size_bytes.__getitem__, run))
        if size_bytes <= limit_bytes and not wanted:
            return run, False
        size_bytes = 0
        for count, slot in enumerate(run):
            if wanted and self.index.layout[slot] != wanted:
                return run[:count], False
            size_bytes += self.index.size_bytes[slot]
            if size_bytes > limit_bytes:
                return run[:count], True
        return run, False

    def end(self, holder: int, number: int) -> None:
        """End a lease, or give up a ticket. A number that `holder` has not is of no effect."""
        for writing in self._tickets.get(holder, {}).pop(number, ()):
            self._give_up(writing)
        if not self._tickets.get(holder, True):
            del self._tickets[holder]
        for place in self.leases.end(holder, number):
            self._room.let_go(place)

    def end_all(self, holder: int) -> None:
        """End all that `holder` has."""
        for number in [*self._tickets.get(holder, {}), *self.leases.numbers(holder)]:
            self.end(holder, number)

    # writing

    def reserve(self, holder: int, entries: Sequence[EntryFacts], now_ms: int) -> Reservation:
        """Places for `holder` to write `entries` to, parents first; room is made for them."""
        at_once = self._reserve_at_once(entries, now_ms)
        if at_once is not None:
            ticket = self.leases.new_number()
            self._tickets.setdefault(holder, {})[ticket] = at_once
            given = tuple(each.place for each in at_once)
            return Reservation(ticket, given, (Outcome.KEPT,) * len(entries))
        writing: list[_Writing] = []
        places: list[int] = []
        outcomes: list[Outcome] = []
        refused: set[bytes] = set()
        for facts in entries:
            # a tail is of no use without its head
            if facts.parent and facts.parent in refused:
                place, outcome = self._refuse(facts, Outcome.OUTRANKED)
            else:
                place, outcome = self._reserve_one(facts, now_ms)
            if place != NOWHERE:
                slot = self.arena.owner(place)
                writing.append(_Writing(slot, place, facts.pin_ms))
            elif outcome not in (Outcome.PRESENT, Outcome.BUSY):
                refused.add(facts.key.hash)
            places.append(place)
            outcomes.append(outcome)
        ticket = self.leases.new_number() if writing else 0
        if writing:
            self._tickets.setdefault(holder, {})[ticket] = writing
        return Reservation(ticket, tuple(places), tuple(outcomes))

    def _reserve_at_once(self, entries: Sequence[EntryFacts], now_ms: int) -> list[_Writing] | None:
        """What `_reserve_one` does for each; None if they are not all new, or have no room yet."""
        index, tenant = self.index, entries[0].tenant
        keys = {facts.key for facts in entries}
        if len(keys) < len(entries) or any(facts.tenant != tenant for facts in entries):
            return None
        if any(index.find(key, _WRITTEN) != NO_SLOT for key in keys):
            return None
        charges = [charged_bytes(facts.size_bytes) for facts in entries]
        if self.reserved_bytes + sum(charges) > self.reserved_bytes_max:
            return None
        number = index.tenant(tenant)
        sizes = [facts.size_bytes for facts in entries]
        places = self._room.make_at_once(number, sizes, sum(charges), now_ms)
        if places is None:
            return None
        self.reserved_bytes += sum(charges)
        slots, told = index.enter_all(entries, number, list(map(_cost_us, entries)), charges)
        self._policy.admit_all(slots, told, now_ms)
        self.arena.own_all(places, slots)
        pins = [facts.pin_ms for facts in entries]
        return list(map(_Writing, slots, places, pins))

    def _reserve_one(self, facts: EntryFacts, now_ms: int) -> tuple[int, Outcome]:
        slot = self.index.find(facts.key, _WRITTEN)
        if slot != NO_SLOT and self.index.tiers[slot] & _RAM:
            self._renew(slot, facts, now_ms)
            return NOWHERE, Outcome.PRESENT
        if slot != NO_SLOT:
            return NOWHERE, Outcome.BUSY
        charge = charged_bytes(facts.size_bytes)
        record = self._record(facts)
        if not self.quotas.can_hold(record.tenant, charge):
            return self._refuse(facts, Outcome.TOO_LARGE)
        # one entry may always be written, however small the budget is
        if self.reserved_bytes and self.reserved_bytes + charge > self.reserved_bytes_max:
            return self._refuse(facts, Outcome.SKIPPED)
        slot = self.index.enter(facts.key, record, Tier.PENDING)
        self._policy.admit(slot, self.index.facts(slot, charge), now_ms)
        place = self._room.make(slot, facts.size_bytes, now_ms)
        if place is None:
            self.index.leave(slot, Tier.PENDING)
            return self._refuse(facts, Outcome.OUTRANKED)
        self.reserved_bytes += charge
        return place, Outcome.KEPT

    def _renew(self, slot: int, facts: EntryFacts, now_ms: int) -> None:
        self._policy.renew(slot, facts.band)
        self.index.raise_band(slot, facts.band)
        if facts.pin_ms:
            self._policy.pin(slot, now_ms + facts.pin_ms)
        for tally in self._tallies(slot):
            tally.present += 1

    def commit(self, holder: int, ticket: int, crcs: Sequence[int], now_ms: int) -> int:
        """What `ticket` reserved is written, with `crcs`, -1 for what is given up; how many stay.

        A ticket that `holder` has not is of no effect; one with another number of CRCs is given up.
        """
        writings = self._tickets.get(holder, {}).get(ticket, [])
        if not writings or len(writings) != len(crcs):
            self.end(holder, ticket)
            return 0
        self._tickets[holder].pop(ticket)
        if not self._tickets[holder]:
            del self._tickets[holder]
        for writing, crc in zip(writings, crcs, strict=True):
            if crc < 0:
                self._give_up(writing)
        written = [(each, crc) for each, crc in zip(writings, crcs, strict=True) if crc >= 0]
        self._settle([each for each, _ in written], [crc for _, crc in written], now_ms)
        return len(written)

    def _settle(self, writings: Sequence[_Writing], crcs: Sequence[int], now_ms: int) -> None:
        slots, sizes = [each.slot for each in writings], self.index.size_bytes
        self.index.written(slots, [each.place for each in writings], crcs)
        self.reserved_bytes -= sum(charged_bytes(sizes[slot]) for slot in slots)
        for writing in writings:
            if writing.pin_ms:
                self._policy.pin(writing.slot, now_ms + writing.pin_ms)
        for told in (self.settled, self.moved):
            if told is not None:
                for slot in slots:
                    told(slot)
        self.tallies.note_kept(self.index, slots)

    def _give_up(self, writing: _Writing) -> None:
        self.reserved_bytes -= charged_bytes(self.index.size_bytes[writing.slot])
        self._room.give_up(writing.slot, writing.place)

    def put(self, facts: EntryFacts, data: bytes | memoryview, now_ms: int) -> Outcome:
        """Reserve, copy and commit one entry."""
        assert len(data) == facts.size_bytes, "facts are those of the data"
        reservation = self.reserve(OURSELVES, [facts], now_ms)
        if reservation.ticket:
            self.arena.view(reservation.places[0], facts.size_bytes)[:] = data
            self.commit(OURSELVES, reservation.ticket, [facts.crc], now_ms)
        return reservation.outcomes[0]

    def verify(self, key: EntryKey) -> bool:
        """Whether the entry was corrupt, and is gone now. Takes 0.1 ms a MB."""
        slot = self.index.find(key, Tier.RAM)
        if slot == NO_SLOT or checksum(self.data(slot)) == self.index.crc[slot]:
            return False
        for tally in self._tallies(slot):
            tally.corrupt += 1
        self.drop(slot)
        return True

    def data(self, slot: int) -> memoryview:
        """The bytes of an entry, where they lie."""
        return self.arena.view(self.index.ram_place[slot], self.index.size_bytes[slot])

    # leaving

    def _leaving(self, slots: Sequence[int]) -> None:
        """The policy has chosen `slots`."""
        self.tallies.note_evicted(self.index, slots)
        for slot in slots:
            if self.evicted is not None:
                self.evicted(self.facts(slot), self.data(slot))
            if self.moved is not None:
                self.moved(slot)

    def trim(self, now_ms: int) -> bool:
        """Have some entries leave ahead of need; whether there is more to do.

        What a put would have to evict while its writer waits leaves before, down to the low
        watermark.
        """
        return self._room.trim(now_ms)

    def set_quota(self, tenant: str, share: Share, now_ms: int) -> str:
        """Why `share` cannot be granted; '' when it holds, and what exceeds it has left."""
        return self._room.set_quota(tenant, share, now_ms)

    def shares(self) -> dict[str, Share]:
        """What was granted to tenants, by their names."""
        return self._room.granted()

    def pin(self, slot: int, until_ms: int) -> bool:
        """Keep an entry until then; False if pins hold too much already."""
        return self._policy.pin(slot, until_ms)

    def unpin(self, slot: int) -> None:
        self._policy.unpin(slot)

    def pinned_until_ms(self, slot: int) -> int:
        """When the entry's own pin ends, or NOT_PINNED."""
        return self._policy.pinned_until_ms(slot)

    def drop(self, slot: int) -> None:
        """Forget an entry, for a reason that is not the policy's."""
        if self.moved is not None:
            self.moved(slot)
        self._policy.remove(slot)
        for tally in self._tallies(slot):
            tally.entries -= 1
            tally.bytes -= self.index.size_bytes[slot]
        self._room.vacate_all((slot,))

    # telling

    def facts(self, slot: int) -> EntryFacts:
        """What is known of an entry, as a put would say it."""
        record = self.index.record(slot)
        return EntryFacts(
            key=self.index.key(slot),
            parent=record.parent,
            depth=record.depth,
            size_bytes=record.size_bytes,
            crc=record.crc,
            band=record.band,
            tenant=self.index.tenant_name(record.tenant),
            cost_tokens=0,
            cost_ms=record.cost_us / 1000,
            layout=record.layout.to_bytes(8) if record.layout else b"",
        )

    def _record(self, facts: EntryFacts) -> Record:
        return Record(
            facts.parent,
            facts.depth,
            facts.size_bytes,
            facts.crc,
            facts.band,
            self.index.tenant(facts.tenant),
            _cost_us(facts),
            int.from_bytes(facts.layout),
        )

    def _tallies(self, slot: int) -> tuple[Tally, Tally]:
        index = self.index
        return self.tallies.both(KINDS[index.kind[slot]], index.tenant_name(index.tenant_of[slot]))

    def _refuse(self, facts: EntryFacts, outcome: Outcome) -> tuple[int, Outcome]:
        tenant = self.index.tenant_name(self.index.tenant(facts.tenant))
        for tally in self.tallies.both(facts.key.kind, tenant):
            tally.refused += 1
        return NOWHERE, outcome

    def stats(self) -> dict[str, Any]:
        """Everything counted, as nested maps of numbers."""
        return self.tallies.stats() | {
            "quotas": self._room.shares(),
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "reserved_bytes": self.reserved_bytes,
            "pinned_bytes": self._policy.pinned_bytes,
            "leases": len(self.leases),
            "entries": len(self),
            "shared_bytes": self.arena.mapped_bytes if self.arena.path else 0,
            "huge_pages": int(self.arena.huge_pages),
        }

    def check_integrity(self) -> None:
        """Assert that budget, counters, bytes and policy agree. Takes time in all entries."""
        index = self.index
        assert self.used_bytes <= self.budget_bytes, "the budget holds"
        resident = list(index.entries(0, Tier.RAM))
        size_bytes = sum(index.size_bytes[slot] for slot in resident)
        self.tallies.check_integrity(len(resident), size_bytes)
        places = {index.ram_place[slot]: slot for slot in resident}
        reserved = 0
        for tickets in self._tickets.values():
            for writing in (each for ticket in tickets.values() for each in ticket):
                assert index.tiers[writing.slot] == Tier.PENDING, "what is written is not read"
                places[writing.place] = writing.slot
                reserved += charged_bytes(index.size_bytes[writing.slot])
        assert reserved == self.reserved_bytes, "reservations add up"
        for place, _, live in self.arena.extents():
            if live and self.arena.owner(place) != NOBODY:
                assert places.pop(place) == self.arena.owner(place), "owners know their places"
        assert not places, "each entry has its extent"
        index.check_integrity()
        self._room.check_integrity()
