"""What policies share whose entries stand in queues, leaves and others, and are looked at in turn.

Invariant: every resident entry stands in a queue; who may not leave is passed over where it
stands, so that a chain leaves from its tail and in the order in which chains came.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from headrace_cache.policy.cells import NO_CELL, Cells
from headrace_cache.policy.chains import REASON, Chains
from headrace_cache.policy.eviction import Spare, Victim

MayLeave = Callable[[int], bool]

NEXT = "its turn in the queue: " + REASON


class Queued(Chains):
    """Subclasses find the next victim; for comparison, as finding it may take O(n)."""

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._queues = Cells()

    @abstractmethod
    def _next_victim(self, may_leave: MayLeave) -> int | None:
        """Who leaves next; None if nobody may."""

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._queues.grow(slots)

    def _left(self, slot: int) -> None:
        self._queues.remove(slot)

    def _freed(self, slot: int) -> None:
        """Nothing: it stands where it stood."""

    def _bound(self, slot: int) -> None:
        """Nothing: it stands where it stood."""

    def _first(self, queue: int, may_leave: MayLeave) -> int | None:
        """The first in `queue` that may leave."""
        if queue not in self._queues:
            return None
        return next(filter(may_leave, self._queues.standing(queue)), None)

    def _choose(
        self, size_bytes: int, now_ms: int, allowed: Callable[[int], bool], spare: Spare | None
    ) -> list[Victim]:
        def may_leave(slot: int) -> bool:
            return (
                self._is_free(slot)
                and (spare is None or spare.get(self._tenant[slot], 0) > 0)
                and allowed(slot)
            )

        chosen: list[Victim] = []
        freed_bytes = 0
        while freed_bytes < size_bytes and (slot := self._next_victim(may_leave)) is not None:
            if spare is not None:
                spare[self._tenant[slot]] -= self._size[slot]
            values = self._reason(slot, now_ms)
            chosen.append(Victim(slot, self._size[slot], 0.0, NEXT, values))
            freed_bytes += self._size[slot]
            self.remove(slot)
        return chosen

    def check_integrity(self) -> None:
        super().check_integrity()
        self._queues.check_integrity()
        for slot, here in enumerate(self._resident):
            assert bool(here) == (self._queues.cell_of(slot) != NO_CELL), "residents are queued"
