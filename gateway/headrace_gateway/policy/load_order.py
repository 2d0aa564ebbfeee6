"""Workers by load, least first, brought up to date when somebody asks.

Invariant: `places` is sorted and holds the last place that each worker was put at. A change costs an
entry in a table; sorting in waits until the order is read, and many changes then cost one sort.
Rejected: moving a worker at each change, which in a full fleet, where hardly anybody asks for the
order, costs more than finding the one free room.
"""

from __future__ import annotations

from bisect import bisect_left, insort

Place = tuple[int, str]
"""Load, and the worker's name among equals."""
SORTED_PART = 8
"""Where more than one in so many has moved, all are sorted at once."""


class LoadOrder:
    """Places of workers, each of which stands once."""

    def __init__(self) -> None:
        self._sorted: list[Place] = []
        self._stands: dict[str, Place] = {}
        """Where each worker stands in `_sorted`."""
        self._moved: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self.places())

    def put(self, place: Place) -> None:
        """A worker stands at `place` from now on."""
        self._moved[place[1]] = place

    def drop(self, worker: str) -> None:
        """`worker` does not stand here any more, if it did."""
        self._moved.pop(worker, None)
        stood = self._stands.pop(worker, None)
        if stood is not None:
            del self._sorted[bisect_left(self._sorted, stood)]

    def places(self) -> list[Place]:
        """All of them in order; not to be changed, and valid until something is."""
        if self._moved:
            self._settle()
        return self._sorted

    def check_integrity(self) -> None:
        """Both views hold the same places. Raises AssertionError."""
        assert self._sorted == sorted(self._stands.values()), "in order, and each stands once"
        assert all(worker == place[1] for worker, place in self._stands.items())
        assert all(worker == place[1] for worker, place in self._moved.items())

    def _settle(self) -> None:
        moved, stands, order = self._moved, self._stands, self._sorted
        if SORTED_PART * len(moved) > len(order):
            stands.update(moved)
            self._sorted = sorted(stands.values())
        else:
            for worker, place in moved.items():
                stood = stands.get(worker)
                if stood == place:
                    continue
                if stood is not None:
                    del order[bisect_left(order, stood)]
                stands[worker] = place
                insort(order, place)
        moved.clear()
