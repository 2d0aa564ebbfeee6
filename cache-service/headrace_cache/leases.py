"""Who holds which places of the arena, and until when.

Invariant: a place that anybody holds is not free, whatever becomes of its entry: it is handed back
to whoever frees it when its last holder lets go. Holders are connections; what one held is ended
with it, unless it may still have the arena mapped.
Rejected: counting by entry. A place may be read on after its entry is gone and its key put anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """Places that one holder was given at a time."""

    places: tuple[int, ...]
    size_bytes: int
    since_ms: int


class Leases:
    """Leases by holder and number."""

    def __init__(self) -> None:
        self._by_holder: dict[int, dict[int, Lease]] = {}
        self._holders: dict[int, int] = {}  # by place
        self._bytes: dict[int, int] = {}  # by holder
        self._numbers = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_holder.values()))

    def new_number(self) -> int:
        """A number that no lease had before: never 0."""
        self._numbers += 1
        return self._numbers

    def begin(
        self, holder: int, number: int, places: Sequence[int], size_bytes: int, now_ms: int
    ) -> None:
        """Note that `holder` was given `places`."""
        leases = self._by_holder.setdefault(holder, {})
        assert number not in leases, "numbers are used once"
        leases[number] = Lease(tuple(places), size_bytes, now_ms)
        self._bytes[holder] = self._bytes.get(holder, 0) + size_bytes
        for place in places:
            self._holders[place] = self._holders.get(place, 0) + 1

    def end(self, holder: int, number: int) -> list[int]:
        """The places that nobody holds any more now that this lease is over, if there is one."""
        lease = self._by_holder.get(holder, {}).pop(number, None)
        if lease is None:
            return []
        self._bytes[holder] -= lease.size_bytes
        if not self._by_holder[holder]:
            del self._by_holder[holder], self._bytes[holder]
        let_go = []
        for place in lease.places:
            self._holders[place] -= 1
            if not self._holders[place]:
                del self._holders[place]
                let_go.append(place)
        return let_go

    def numbers(self, holder: int) -> list[int]:
        """Of the leases that `holder` has."""
        return list(self._by_holder.get(holder, {}))

    def held_bytes(self, holder: int) -> int:
        return self._bytes.get(holder, 0)

    def is_held(self, place: int) -> bool:
        return place in self._holders

    def overdue(self, since_ms: int) -> list[int]:
        """Holders of a lease that began before `since_ms`."""
        return [
            holder
            for holder, leases in self._by_holder.items()
            if any(lease.since_ms < since_ms for lease in leases.values())
        ]

    def check_integrity(self) -> None:
        """Assert that counts by place and by holder are those of the leases."""
        holders: dict[int, int] = {}
        for holder, leases in self._by_holder.items():
            assert leases, "who holds nothing is not known"
            assert self._bytes[holder] == sum(each.size_bytes for each in leases.values())
            for lease in leases.values():
                for place in lease.places:
                    holders[place] = holders.get(place, 0) + 1
        assert holders == self._holders, "holders are counted by place"
        assert set(self._bytes) == set(self._by_holder)
