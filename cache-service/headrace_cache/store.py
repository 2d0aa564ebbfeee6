"""Entries by key within a byte budget, in the arena.

Invariants: an entry is written once, between `reserve` and `commit`, and read by nobody meanwhile;
what is lent stays as it is until its lease ends, whatever becomes of the entry; room is made
before anything comes in (`room.py`), so that the budget always holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.checksum import checksum
from headrace.frames import KINDS, EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.arena import NOBODY, Arena
from headrace_cache.grants import Loan, Outcome, Reservation
from headrace_cache.index import Index, Tier
from headrace_cache.leases import Leases
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy
from headrace_cache.policy.quota import Quotas, Share
from headrace_cache.room import Room
from headrace_cache.tallies import Tallies, Tally
from headrace_cache.writes import Writes

RESERVED_SHARE_MAX = 0.5
"""Of the budget, that entries being written take together."""

OURSELVES = 0
"""Holds what the service itself reads or writes."""

Evicted = Callable[[EntryFacts, memoryview], None]
"""Told what leaves, and its bytes, before they are gone."""


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
        self.writes = Writes(
            self.index,
            policy,
            self._room,
            self.arena,
            self.leases,
            self.tallies,
            budget_bytes,
            reserved_bytes_max or int(budget_bytes * RESERVED_SHARE_MAX),
        )

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
        self.writes.end(holder, number)
        for place in self.leases.end(holder, number):
            self._room.let_go(place)

    def end_all(self, holder: int) -> None:
        """End all that `holder` has."""
        for number in (*self.writes.tickets(holder), *self.leases.numbers(holder)):
            self.end(holder, number)

    def overdue(self, since_ms: int) -> set[int]:
        """Who was lent something, or has places ahead, since before then."""
        return {*self.leases.overdue(since_ms), *self.writes.advances.overdue(since_ms)}

    # writing

    @property
    def reserved_bytes(self) -> int:
        """Charged for what is being written, or had ahead."""
        return self.writes.reserved_bytes

    def reserve(
        self, holder: int, entries: Sequence[EntryFacts], now_ms: int, using: int = 0
    ) -> Reservation:
        """Places for `holder` to write `entries` to, parents first; room is made for them.

        With `using`, a ticket of `reserve_ahead`, it is those places and no others.
        """
        if using:
            return self.writes.name(holder, using, entries, now_ms)
        return self.writes.reserve(holder, entries, now_ms)

    def reserve_ahead(
        self, holder: int, tenant: str, count: int, size_bytes: int, now_ms: int
    ) -> tuple[int, tuple[int, ...]]:
        """A ticket, and up to `count` places for entries of `tenant` that `holder` names later.

        No ticket (0) where there are none to be had.
        """
        return self.writes.reserve_ahead(holder, tenant, count, size_bytes, now_ms)

    def commit(self, holder: int, ticket: int, crcs: Sequence[int], now_ms: int) -> int:
        """What `ticket` reserved is written, with `crcs`, -1 for what is given up; how many stay.

        A ticket that `holder` has not is of no effect; one with another number of CRCs is given up.
        """
        writings = self.writes.commit(holder, ticket, crcs)
        for writing in writings:
            if writing.pin_ms:
                self._policy.pin(writing.slot, now_ms + writing.pin_ms)
        slots = [each.slot for each in writings]
        for told in (self.settled, self.moved):
            if told is not None:
                for slot in slots:
                    told(slot)
        self.tallies.note_kept(self.index, slots)
        return len(slots)

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

    def _tallies(self, slot: int) -> tuple[Tally, Tally]:
        index = self.index
        return self.tallies.both(KINDS[index.kind[slot]], index.tenant_name(index.tenant_of[slot]))

    def stats(self) -> dict[str, Any]:
        """Everything counted, as nested maps of numbers."""
        return self.tallies.stats() | {
            "quotas": self._room.shares(),
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "reserved_bytes": self.reserved_bytes,
            "ahead_bytes": self.writes.advances.bytes,
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
        places |= dict(self.writes.owned())
        for place, _, live in self.arena.extents():
            if live and self.arena.owner(place) != NOBODY:
                assert places.pop(place) == self.arena.owner(place), "owners know their places"
        assert not places, "each entry has its extent"
        index.check_integrity()
        self.writes.check_integrity()
        self._room.check_integrity()
