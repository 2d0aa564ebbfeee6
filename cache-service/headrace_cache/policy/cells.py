"""Slots in queues by cell: all slots of a cell rank alike, first come, first out.

Invariant: a slot stands in at most one cell; a cell exists while a slot stands in it. Queues are
linked through arrays: 12 bytes a slot, every operation O(1).
Rejected: a heap of slots, which would have to move each of them as it ages.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

NOBODY = -1
NO_CELL = -1


class Cells:
    """Queues of slots, named by numbers."""

    def __init__(self) -> None:
        self._next = array("i")
        self._previous = array("i")
        self._cell = array("i")
        self._ends: dict[int, tuple[int, int]] = {}
        self.cell_of: Callable[[int], int] = self._cell.__getitem__
        """Where a slot stands; NO_CELL if nowhere."""

    def grow(self, slots: int) -> None:
        """Make room for slots up to `slots` - 1."""
        more = [NOBODY] * (slots - len(self._cell))
        for column in (self._next, self._previous, self._cell):
            column.extend(more)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[int]:
        """The cells that somebody stands in, in the order in which they began."""
        return iter(self._ends)

    def __contains__(self, cell: int) -> bool:
        return cell in self._ends

    def first(self, cell: int) -> int:
        """Who stands longest in `cell`, which exists."""
        return self._ends[cell][0]

    def after(self, slot: int) -> int:
        """Who stands behind `slot`; NOBODY if it is the last."""
        return self._next[slot]

    def add(self, slot: int, cell: int) -> None:
        """`slot`, which stands nowhere, stands in `cell` now, last."""
        assert self._cell[slot] == NO_CELL, "a slot stands in one cell"
        self._cell[slot] = cell
        first, last = self._ends.get(cell, (slot, NOBODY))
        self._next[slot], self._previous[slot] = NOBODY, last
        if last != NOBODY:
            self._next[last] = slot
        self._ends[cell] = (first, slot)

    def remove(self, slot: int) -> None:
        """`slot` stands nowhere from now on."""
        cell, self._cell[slot] = self._cell[slot], NO_CELL
        before, behind = self._previous[slot], self._next[slot]
        if before != NOBODY:
            self._next[before] = behind
        if behind != NOBODY:
            self._previous[behind] = before
        first, last = self._ends[cell]
        if first == last:
            del self._ends[cell]
        elif slot == first:
            self._ends[cell] = (behind, last)
        elif slot == last:
            self._ends[cell] = (first, before)

    def standing(self, cell: int) -> Iterator[int]:
        """The slots of `cell` in order."""
        slot = self._ends[cell][0]
        while slot != NOBODY:
            yield slot
            slot = self._next[slot]

    def check_integrity(self) -> None:
        """Assert that queues are whole and hold who claims to stand in them."""
        claimed = {slot for slot, cell in enumerate(self._cell) if cell != NO_CELL}
        for cell, (_, last) in self._ends.items():
            before = NOBODY
            for slot in self.standing(cell):
                assert self._cell[slot] == cell and self._previous[slot] == before
                claimed.discard(slot)
                before = slot
            assert before == last, "the last stands last"
        assert not claimed, "nobody claims to stand where nobody finds him"
