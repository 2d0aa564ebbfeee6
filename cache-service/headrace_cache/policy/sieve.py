"""SIEVE, among leaves, to compare with.

Source: Y. Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for
web caches", NSDI 2024. The hand passes over who has a child or a pin, and takes its mark too.
"""

from __future__ import annotations

from headrace_cache.policy.cells import NOBODY
from headrace_cache.policy.queued import MayLeave, Queued

QUEUE = 0


class Sieve(Queued):
    """One queue, a mark on what was used, and a hand that takes marks from the oldest on."""

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._marked = bytearray()
        self._hand = NOBODY

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._marked.extend(bytes(slots - len(self._marked)))

    def _entered(self, slot: int, name: int) -> None:  # noqa: ARG002  # it remembers nobody
        self._marked[slot] = 0
        self._queues.add(slot, QUEUE)

    def _used(self, slot: int) -> None:
        self._marked[slot] = 1

    def _left(self, slot: int) -> None:
        if self._hand == slot:
            self._hand = self._queues.after(slot)
        super()._left(slot)

    def _next_victim(self, may_leave: MayLeave) -> int | None:
        for _ in range(2 * self.entries + 1):  # once to take all marks, once to find one
            if self._hand == NOBODY:
                if QUEUE not in self._queues:
                    return None
                self._hand = self._queues.first(QUEUE)
            slot = self._hand
            if not self._marked[slot] and may_leave(slot):
                return slot
            self._marked[slot] = 0
            self._hand = self._queues.after(slot)
        return None
