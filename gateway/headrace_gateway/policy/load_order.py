"""Workers by load, least first, brought up to date when somebody asks.

Invariant: `places` is sorted and holds the last place that each worker was put at. A place is one
number, the load and behind it the worker's own, which stands for its name among equals: numbers
are compared in a fraction of the time that pairs take. A change costs an entry in a table; sorting
in waits until the order is read, and many changes then cost one sort.
The least one alone is found by a heap, whose outdated entries go when they surface.
Rejected: moving a worker at each change, which in a full fleet, where hardly anybody asks for the
order, costs more than finding the one free room.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable

_BITS = 20
NUMBER = (1 << _BITS) - 1
"""The part of a place that is the worker's number, and the most workers there can be."""
DEAD_MIN = 64
"""Outdated entries that may lie in the heap however few workers there are."""
SORTED_PART = 8
"""Where more than one in so many has moved, all are sorted at once."""


def place_of(load: int, number: int) -> int:
    """Where the worker `number` stands with `load`; `place & NUMBER` is the number again."""
    return load << _BITS | number


class LoadOrder:
    """Places of workers, each of which stands once."""

    def __init__(self) -> None:
        self._sorted: list[int] = []
        self._stands: dict[int, int] = {}
        """Where each number stands in `_sorted`."""
        self._moved: dict[int, int] = {}
        self._heap: list[int] = []
        self._fresh: dict[int, int] = {}
        """Places by number that are not in the heap yet; it is built anew where they are many."""

    def set_places(self, places: Iterable[int]) -> None:
        """Replace all of them: numbers may mean others now."""
        self._moved.clear()
        self._sorted = sorted(places)
        self._stands = {place & NUMBER: place for place in self._sorted}
        self._heap = self._sorted.copy()
        self._fresh.clear()

    def put(self, place: int) -> None:
        """A worker stands at `place` from now on."""
        number = place & NUMBER
        self._moved[number] = self._fresh[number] = place

    def drop(self, number: int) -> None:
        """The worker `number` does not stand here any more, if it did."""
        self._moved.pop(number, None)
        self._fresh.pop(number, None)
        stood = self._stands.pop(number, None)
        if stood is not None:
            del self._sorted[bisect_left(self._sorted, stood)]

    def places(self) -> list[int]:
        """All of them in order; not to be changed, and valid until something is."""
        if self._moved:
            self._settle()
        return self._sorted

    def least(self) -> int:
        """The first of `places`; there is one."""
        moved, stands = self._moved, self._stands
        if not moved:
            return self._sorted[0]
        fresh, heap = self._fresh, self._heap
        if len(fresh) > len(stands) // SORTED_PART or len(heap) > 2 * len(stands) + DEAD_MIN:
            self._heap = heap = self.places().copy()
        else:
            for place in fresh.values():
                heapq.heappush(heap, place)
        fresh.clear()
        while True:
            place = heap[0]
            number = place & NUMBER
            if moved.get(number, stands.get(number)) == place:
                return place
            heapq.heappop(heap)

    def check_integrity(self) -> None:
        """Both views hold the same places. Raises AssertionError."""
        assert self._sorted == sorted(self._stands.values()), "in order, and each stands once"
        for places in (self._stands, self._moved):
            assert all(number == place & NUMBER for number, place in places.items())
        order = self.places()
        assert not order or self.least() == order[0], "the heap knows the first one"

    def _settle(self) -> None:
        moved, stands, order = self._moved, self._stands, self._sorted
        if SORTED_PART * len(moved) > len(order):
            stands.update(moved)
            self._sorted = sorted(stands.values())
        else:
            for number, place in moved.items():
                stood = stands.get(number)
                if stood != place:
                    if stood is not None:
                        del order[bisect_left(order, stood)]
                    stands[number] = place
                    insort(order, place)
        moved.clear()
