"""S3-FIFO, among leaves, to compare with.

Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: a small queue
for a tenth of the bytes, a main queue, and names of what the small one lost.
"""

from __future__ import annotations

from array import array

from headrace_cache.policy.queued import MayLeave, Queued

SMALL, MAIN = 0, 1
SMALL_SHARE = 0.1
COUNT_MAX = 3
MOVES_PER_ENTRY = COUNT_MAX + 2


class S3Fifo(Queued):
    """Counts are of uses since an entry came or was passed over."""

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._count = bytearray()
        self._name = array("Q")
        self._small_bytes = 0
        self._ghosts: dict[int, None] = {}
        self._entries_most = 1

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._count.extend(bytes(slots - len(self._count)))
        self._name.extend([0] * (slots - len(self._name)))

    def _entered(self, slot: int, name: int) -> None:
        self._count[slot] = 0
        self._name[slot] = name
        self._entries_most = max(self._entries_most, self.entries)
        known = name in self._ghosts
        self._ghosts.pop(name, None)
        self._queues.add(slot, MAIN if known else SMALL)
        self._small_bytes += 0 if known else self._size[slot]

    def _used(self, slot: int) -> None:
        self._count[slot] = min(self._count[slot] + 1, COUNT_MAX)

    def _left(self, slot: int) -> None:
        if self._queues.cell_of(slot) == SMALL:
            self._small_bytes -= self._size[slot]
            self._ghosts[self._name[slot]] = None
            if len(self._ghosts) > self._entries_most:
                del self._ghosts[next(iter(self._ghosts))]
        super()._left(slot)

    def _next_victim(self, may_leave: MayLeave) -> int | None:
        for _ in range(MOVES_PER_ENTRY * self.entries + 1):
            small = self._first(SMALL, may_leave)
            main = None
            if small is None or self._small_bytes < SMALL_SHARE * self.used_bytes:
                main = self._first(MAIN, may_leave)
            if main is not None:
                if not self._count[main]:
                    return main
                self._count[main] -= 1
                self._requeue(main, MAIN)
            elif small is None or self._count[small] <= 1:
                return small
            else:
                self._count[small] = 0
                self._requeue(small, MAIN)
        return None

    def _requeue(self, slot: int, queue: int) -> None:
        if self._queues.cell_of(slot) == SMALL:
            self._small_bytes -= self._size[slot]
        self._queues.remove(slot)
        self._queues.add(slot, queue)

    def check_integrity(self) -> None:
        super().check_integrity()
        small = self._queues.standing(SMALL) if SMALL in self._queues else ()
        assert self._small_bytes == sum(self._size[slot] for slot in small), "sizes add up"
        assert len(self._ghosts) <= self._entries_most, "ghosts are bounded"
