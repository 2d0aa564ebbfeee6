"""A binary heap of slots, lowest rank first, that can move or drop any of them.

Invariant: `Ranks.place[slot]` is where the slot stands in the one heap that holds it, -1 if none
does. Arrays of machine numbers, not objects: 16 bytes a slot for rank and place, 4 in the heap.
Rejected: `heapq` with stale items left in it; at a million entries its tuples take 150 to 300 bytes
each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

NOWHERE = -1


class Ranks:
    """What heaps order slots by: score, then sequence. Shared by all heaps of one policy."""

    __slots__ = ("place", "score", "sequence")

    def __init__(self) -> None:
        self.score = array("d")
        self.sequence = array("Q")
        self.place = array("i")

    def grow(self, slots: int) -> None:
        """Make room for slots up to `slots` - 1."""
        more = slots - len(self.score)
        self.score.extend([0.0] * more)
        self.sequence.extend([0] * more)
        self.place.extend([NOWHERE] * more)


class SlotHeap:
    """Slots by rank. Each operation takes O(log n)."""

    __slots__ = ("_ranks", "_slots")

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._slots = array("i")

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots)

    def first(self) -> int:
        """The slot of the lowest rank; the heap must not be empty."""
        return self._slots[0]

    def push(self, slot: int) -> None:
        assert self._ranks.place[slot] == NOWHERE, "a slot stands in one heap, once"
        self._slots.append(slot)
        self._rise(slot, len(self._slots) - 1)

    def remove(self, slot: int) -> None:
        place = self._ranks.place[slot]
        self._ranks.place[slot] = NOWHERE
        last = self._slots.pop()
        if last != slot:
            self._settle(last, place)

    def moved(self, slot: int) -> None:
        """The rank of `slot`, which is in here, has changed."""
        self._settle(slot, self._ranks.place[slot])

    def _settle(self, slot: int, place: int) -> None:
        if place and self._before(slot, self._slots[(place - 1) >> 1]):
            self._rise(slot, place)
        else:
            self._sink(slot, place)

    def _before(self, one: int, other: int) -> bool:
        score, ranks = self._ranks.score, self._ranks
        if score[one] != score[other]:
            return score[one] < score[other]
        return ranks.sequence[one] < ranks.sequence[other]

    def _rise(self, slot: int, place: int) -> None:
        slots, places = self._slots, self._ranks.place
        while place:
            above = (place - 1) >> 1
            if not self._before(slot, slots[above]):
                break
            slots[place] = slots[above]
            places[slots[place]] = place
            place = above
        slots[place] = slot
        places[slot] = place

    def _sink(self, slot: int, place: int) -> None:
        slots, places, count = self._slots, self._ranks.place, len(self._slots)
        below = 2 * place + 1
        while below < count:
            if below + 1 < count and self._before(slots[below + 1], slots[below]):
                below += 1
            if not self._before(slots[below], slot):
                break
            slots[place] = slots[below]
            places[slots[place]] = place
            place, below = below, 2 * below + 1
        slots[place] = slot
        places[slot] = place

    def check_integrity(self) -> None:
        """Assert that places are right and no slot ranks before the one above it."""
        for place, slot in enumerate(self._slots):
            assert self._ranks.place[slot] == place, "each slot knows its place"
            above = self._slots[(place - 1) >> 1] if place else slot
            assert not self._before(slot, above), "lower ranks stand above"
