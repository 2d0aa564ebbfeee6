"""Places that writers have ahead, before they say what for, so that they need not wait to begin.

Invariants: a place had ahead is charged to the tenant it is meant for, as an entry would be, so
that budget and quotas hold; nobody else gets it before its holder said that it is done with it, or
is gone. A holder's places take ADVANCE_SHARE_MAX of the budget at most (and ADVANCE_BYTES_MAX),
everybody's together ADVANCES_SHARE_MAX.
Rejected: places of no tenant, charged when they are named: the quota may have no room then for what
is copied already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from headrace_cache.arena import AHEAD, Arena
from headrace_cache.room import Room, charged_bytes

ADVANCE_BYTES_MAX = 16 * 1024 * 1024
ADVANCE_SHARE_MAX = 1 / 64
"""Less than what is between the watermarks, or a full cache would never have any to give."""

ADVANCES_SHARE_MAX = 1 / 8


class Advance(NamedTuple):
    """Places of `size_bytes` each, charged to `tenant`."""

    tenant: int
    size_bytes: int
    places: tuple[int, ...]
    since_ms: int

    @property
    def charge(self) -> int:
        return len(self.places) * charged_bytes(self.size_bytes)


class Advances:
    """What is had ahead, by holder and ticket."""

    def __init__(self, room: Room, arena: Arena, budget_bytes: int) -> None:
        self.bytes = 0
        """Charged for all of it."""
        self._room = room
        self._arena = arena
        self._each_bytes_max = min(ADVANCE_BYTES_MAX, int(budget_bytes * ADVANCE_SHARE_MAX))
        self._all_bytes_max = int(budget_bytes * ADVANCES_SHARE_MAX)
        self._by_holder: dict[int, dict[int, Advance]] = {}

    def give(
        self, holder: int, ticket: int, tenant: int, count: int, size_bytes: int, now_ms: int
    ) -> tuple[int, ...]:
        """Up to `count` places for entries of `tenant`, as many as the limits and memory allow."""
        charge = charged_bytes(size_bytes)
        have_bytes = sum(each.charge for each in self._by_holder.get(holder, {}).values())
        left_bytes = min(self._each_bytes_max - have_bytes, self._all_bytes_max - self.bytes)
        count = min(count, left_bytes // charge)
        if count <= 0:
            return ()
        places = self._room.make_at_once(tenant, [size_bytes] * count, count * charge, now_ms)
        if places is None:
            return ()
        self._arena.own_all(places, [AHEAD] * count)
        advance = Advance(tenant, size_bytes, tuple(places), now_ms)
        self._by_holder.setdefault(holder, {})[ticket] = advance
        self.bytes += advance.charge
        return advance.places

    def take(self, holder: int, ticket: int) -> Advance | None:
        """What `holder` has by that ticket, its caller's from now on."""
        advance = self._by_holder.get(holder, {}).pop(ticket, None)
        if advance is not None:
            self.bytes -= advance.charge
            if not self._by_holder[holder]:
                del self._by_holder[holder]
        return advance

    def tickets(self, holder: int) -> list[int]:
        return list(self._by_holder.get(holder, {}))

    def overdue(self, since_ms: int) -> list[int]:
        """Holders of what was given before `since_ms`."""
        return [
            holder
            for holder, advances in self._by_holder.items()
            if any(each.since_ms < since_ms for each in advances.values())
        ]

    def __iter__(self) -> Iterator[Advance]:
        for advances in self._by_holder.values():
            yield from advances.values()

    def check_integrity(self) -> None:
        """Assert that bytes add up, within the limits, and that places are nobody's entry."""
        assert all(self._by_holder.values()), "who has nothing is not known"
        assert self.bytes == sum(each.charge for each in self) <= self._all_bytes_max
        for advances in self._by_holder.values():
            assert sum(each.charge for each in advances.values()) <= self._each_bytes_max
        for advance in self:
            assert all(self._arena.owner(place) == AHEAD for place in advance.places)
