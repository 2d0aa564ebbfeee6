"""Entries on their way in: places given to writers, until they commit or are gone.

Invariants: an entry is PENDING, and read by nobody, between `reserve` and `commit`; a place that
somebody may still write to is nobody else's, also where its entry turned out not to be wanted.
Rejected: naming places only with the commit. Entering a batch in the indexes takes as long as
copying it, and can be done meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from headrace.frames import EntryFacts
from headrace_cache.advances import Advance, Advances
from headrace_cache.arena import AHEAD, Arena
from headrace_cache.grants import NOWHERE, Outcome, Reservation
from headrace_cache.index import Index, Record, Tier
from headrace_cache.leases import Leases
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy
from headrace_cache.room import Room, charged_bytes
from headrace_cache.tallies import Tallies

TOKEN_MS_DEFAULT = 1.0
"""What a token is taken to cost where nobody measured."""

_RAM = int(Tier.RAM)
_WRITTEN = int(Tier.RAM | Tier.PENDING)
"""As plain numbers: operations on flags take ten times as long."""


class Writing(NamedTuple):
    """An entry between reserve and commit.

    Without a slot (NO_SLOT) it is a place had ahead whose entry is not wanted: what it was charged
    for, and to whom, stands here.
    """

    slot: int
    place: int
    pin_ms: int = 0
    tenant: int = 0
    size_bytes: int = 0


def _cost_us(facts: EntryFacts) -> int:
    """What computing an entry again takes."""
    return math.ceil(1000 * (facts.cost_ms or facts.cost_tokens * TOKEN_MS_DEFAULT))


class Writes:
    """Tickets by holder. `reserved_bytes` is charged for what they are for, and what is ahead."""

    def __init__(
        self,
        index: Index,
        policy: EvictionPolicy,
        room: Room,
        arena: Arena,
        leases: Leases,
        tallies: Tallies,
        budget_bytes: int,
        reserved_bytes_max: int,
    ) -> None:
        self.reserved_bytes = 0
        self.advances = Advances(room, arena, budget_bytes)
        self._index = index
        self._policy = policy
        self._room = room
        self._arena = arena
        self._leases = leases
        self._tallies = tallies
        self._reserved_bytes_max = reserved_bytes_max
        self._tickets: dict[int, dict[int, list[Writing]]] = {}  # by holder and number

    def tickets(self, holder: int) -> list[int]:
        """Of what `holder` writes or has ahead."""
        return [*self._tickets.get(holder, {}), *self.advances.tickets(holder)]

    # places for entries

    def reserve(self, holder: int, entries: Sequence[EntryFacts], now_ms: int) -> Reservation:
        """As Store.reserve."""
        at_once = self._reserve_at_once(entries, now_ms)
        if at_once is not None:
            given = tuple(each.place for each in at_once)
            ticket = self._begin(holder, self._leases.new_number(), at_once)
            return Reservation(ticket, given, (Outcome.KEPT,) * len(entries))
        writing: list[Writing] = []
        places: list[int] = []
        outcomes: list[Outcome] = []
        refused: set[bytes] = set()
        for facts in entries:
            # a tail is of no use without its head
            if facts.parent and facts.parent in refused:
                place, outcome = NOWHERE, self._refuse(facts, Outcome.OUTRANKED)
            else:
                place, outcome = self._reserve_one(facts, now_ms)
            if place != NOWHERE:
                writing.append(Writing(self._arena.owner(place), place, facts.pin_ms))
            elif outcome not in (Outcome.PRESENT, Outcome.BUSY):
                refused.add(facts.key.hash)
            places.append(place)
            outcomes.append(outcome)
        ticket = self._begin(holder, self._leases.new_number(), writing) if writing else 0
        return Reservation(ticket, tuple(places), tuple(outcomes))

    def _begin(self, holder: int, ticket: int, writing: list[Writing]) -> int:
        self._tickets.setdefault(holder, {})[ticket] = writing
        return ticket

    def _reserve_at_once(self, entries: Sequence[EntryFacts], now_ms: int) -> list[Writing] | None:
        """What `_reserve_one` does for each; None if they are not all new, or have no room yet."""
        index, tenant = self._index, entries[0].tenant
        keys = {facts.key for facts in entries}
        if len(keys) < len(entries) or any(facts.tenant != tenant for facts in entries):
            return None
        if any(index.find(key, _WRITTEN) != NO_SLOT for key in keys):
            return None
        sizes = [facts.size_bytes for facts in entries]
        charges = list(map(charged_bytes, sizes))
        if self.reserved_bytes + sum(charges) > self._reserved_bytes_max:
            return None
        number = index.tenant(tenant)
        places = self._room.make_at_once(number, sizes, sum(charges), now_ms)
        if places is None:
            return None
        self.reserved_bytes += sum(charges)
        return self._enter(entries, number, places, charges, now_ms)

    def _enter(
        self,
        entries: Sequence[EntryFacts],
        tenant: int,
        places: Sequence[int],
        charges: Sequence[int],
        now_ms: int,
    ) -> list[Writing]:
        """New entries of `tenant` are being written to `places` from now on."""
        costs_us = list(map(_cost_us, entries))
        slots, told = self._index.enter_all(entries, tenant, costs_us, charges)
        self._policy.admit_all(slots, told, now_ms)
        self._arena.own_all(places, slots)
        return list(map(Writing, slots, places, [facts.pin_ms for facts in entries]))

    def _reserve_one(self, facts: EntryFacts, now_ms: int) -> tuple[int, Outcome]:
        there = self._there(facts, now_ms)
        if there is not None:
            return NOWHERE, there
        charge = charged_bytes(facts.size_bytes)
        record = self._record(facts)
        if not self._room.can_hold(record.tenant, charge):
            return NOWHERE, self._refuse(facts, Outcome.TOO_LARGE)
        # one entry may always be written, however small the budget is
        if self.reserved_bytes and self.reserved_bytes + charge > self._reserved_bytes_max:
            return NOWHERE, self._refuse(facts, Outcome.SKIPPED)
        slot = self._index.enter(facts.key, record, Tier.PENDING)
        self._policy.admit(slot, self._index.facts(slot, charge), now_ms)
        place = self._room.make(slot, facts.size_bytes, now_ms)
        if place is None:
            self._index.leave(slot, Tier.PENDING)
            return NOWHERE, self._refuse(facts, Outcome.OUTRANKED)
        self.reserved_bytes += charge
        return place, Outcome.KEPT

    def _there(self, facts: EntryFacts, now_ms: int) -> Outcome | None:
        """Why an entry need not be written: it is there, or on its way."""
        slot = self._index.find(facts.key, _WRITTEN)
        if slot == NO_SLOT:
            return None
        if self._index.tiers[slot] & _RAM:
            self._renew(slot, facts, now_ms)
            return Outcome.PRESENT
        return Outcome.BUSY

    def _renew(self, slot: int, facts: EntryFacts, now_ms: int) -> None:
        self._policy.renew(slot, facts.band)
        self._index.raise_band(slot, facts.band)
        if facts.pin_ms:
            self._policy.pin(slot, now_ms + facts.pin_ms)
        self._tallies.note_present(self._index, slot)

    def _record(self, facts: EntryFacts) -> Record:
        return Record(
            facts.parent,
            facts.depth,
            facts.size_bytes,
            facts.crc,
            facts.band,
            self._index.tenant(facts.tenant),
            _cost_us(facts),
            int.from_bytes(facts.layout),
        )

    def _refuse(self, facts: EntryFacts, outcome: Outcome) -> Outcome:
        tenant = self._index.tenant_name(self._index.tenant(facts.tenant))
        self._tallies.note_refused(facts.key.kind, tenant)
        return outcome

    # places ahead of their entries

    def reserve_ahead(
        self, holder: int, tenant: str, count: int, size_bytes: int, now_ms: int
    ) -> tuple[int, tuple[int, ...]]:
        """As Store.reserve_ahead."""
        left_bytes = self._reserved_bytes_max - self.reserved_bytes
        count = min(count, left_bytes // charged_bytes(size_bytes))
        ticket, number = self._leases.new_number(), self._index.tenant(tenant)
        places = self.advances.give(holder, ticket, number, count, size_bytes, now_ms)
        self.reserved_bytes += len(places) * charged_bytes(size_bytes)
        return (ticket, places) if places else (0, ())

    def name(
        self, holder: int, ticket: int, entries: Sequence[EntryFacts], now_ms: int
    ) -> Reservation:
        """`entries` are what the places of `ticket`, in order, are for.

        Those that are not wanted keep their place until the commit: it may be written to by now.
        Places that are left over are free again.
        """
        advance = self.advances.take(holder, ticket)
        if advance is None or len(entries) > len(advance.places):
            if advance is not None:
                self._give_back(advance.tenant, advance.size_bytes, advance.places)
            count = len(entries)
            return Reservation(0, (NOWHERE,) * count, (Outcome.SKIPPED,) * count)
        outcomes = self._outcomes(advance, entries, now_ms)
        kept = [outcome is Outcome.KEPT for outcome in outcomes]
        writing = iter(self._enter_ahead(advance, list(compress(entries, kept)), kept, now_ms))
        unwanted = (0, advance.tenant, advance.size_bytes)
        writings = [
            next(writing) if wanted else Writing(NO_SLOT, place, *unwanted)
            for wanted, place in zip(kept, advance.places, strict=False)
        ]
        self._give_back(advance.tenant, advance.size_bytes, advance.places[len(entries) :])
        places = tuple(each.place if each.slot != NO_SLOT else NOWHERE for each in writings)
        return Reservation(self._begin(holder, ticket, writings), places, tuple(outcomes))

    def _outcomes(
        self, advance: Advance, entries: Sequence[EntryFacts], now_ms: int
    ) -> list[Outcome]:
        """Which of `entries` are wanted in the places of `advance`."""
        index, tenant, size_bytes = self._index, advance.tenant, advance.size_bytes
        over = self._room.is_over(tenant)
        seen: set[bytes] = set()
        outcomes: list[Outcome] = []
        for facts in entries:
            outcome = self._there(facts, now_ms)
            if outcome is None and facts.key.hash in seen:
                outcome = Outcome.BUSY
            elif outcome is None:
                fits = facts.size_bytes == size_bytes and index.tenant(facts.tenant) == tenant
                outcome = Outcome.KEPT if fits and not over else Outcome.SKIPPED
                if outcome is Outcome.SKIPPED:
                    self._refuse(facts, outcome)
            seen.add(facts.key.hash)
            outcomes.append(outcome)
        return outcomes

    def _enter_ahead(
        self, advance: Advance, wanted: Sequence[EntryFacts], kept: Sequence[bool], now_ms: int
    ) -> list[Writing]:
        if not wanted:
            return []
        places = list(compress(advance.places, kept))
        charges = [charged_bytes(advance.size_bytes)] * len(wanted)
        return self._enter(wanted, advance.tenant, places, charges, now_ms)

    def _give_back(self, tenant: int, size_bytes: int, places: Sequence[int]) -> None:
        if places:
            self.reserved_bytes -= len(places) * charged_bytes(size_bytes)
            self._room.give_back(tenant, size_bytes, places)

    # the end of it

    def end(self, holder: int, ticket: int) -> None:
        """Give up what `ticket` is for, if `holder` has it."""
        for writing in self._pop(holder, ticket):
            self._give_up(writing)
        advance = self.advances.take(holder, ticket)
        if advance is not None:
            self._give_back(advance.tenant, advance.size_bytes, advance.places)

    def _pop(self, holder: int, ticket: int) -> list[Writing]:
        tickets = self._tickets.get(holder, {})
        writings = tickets.pop(ticket, [])
        if not tickets:
            self._tickets.pop(holder, None)
        return writings

    def commit(self, holder: int, ticket: int, crcs: Sequence[int]) -> list[Writing]:
        """As Store.commit; what is readable now."""
        if len(self._tickets.get(holder, {}).get(ticket, ())) != len(crcs):
            self.end(holder, ticket)
            return []
        written: list[Writing] = []
        good: list[int] = []
        for writing, crc in zip(self._pop(holder, ticket), crcs, strict=True):
            if crc < 0 or writing.slot == NO_SLOT:
                self._give_up(writing)
            else:
                written.append(writing)
                good.append(crc)
        slots, sizes = [each.slot for each in written], self._index.size_bytes
        self._index.written(slots, [each.place for each in written], good)
        self.reserved_bytes -= sum(charged_bytes(sizes[slot]) for slot in slots)
        return written

    def _give_up(self, writing: Writing) -> None:
        if writing.slot == NO_SLOT:
            self._give_back(writing.tenant, writing.size_bytes, (writing.place,))
            return
        self.reserved_bytes -= charged_bytes(self._index.size_bytes[writing.slot])
        self._room.give_up(writing.slot, writing.place)

    def owned(self) -> Iterator[tuple[int, int]]:
        """The place and the owner, an entry's slot or AHEAD, of all that may be written to."""
        for tickets in self._tickets.values():
            for writing in (each for ticket in tickets.values() for each in ticket):
                yield writing.place, AHEAD if writing.slot == NO_SLOT else writing.slot
        for advance in self.advances:
            for place in advance.places:
                yield place, AHEAD

    def check_integrity(self) -> None:
        """Assert that what is reserved adds up and that nobody reads it."""
        index, reserved = self._index, self.advances.bytes
        for tickets in self._tickets.values():
            for slot, _, _, _, size_bytes in (each for some in tickets.values() for each in some):
                if slot != NO_SLOT:
                    assert index.tiers[slot] == Tier.PENDING, "what is written is not read"
                    size_bytes = index.size_bytes[slot]
                reserved += charged_bytes(size_bytes)
        assert reserved == self.reserved_bytes, "reservations add up"
        self.advances.check_integrity()
