"""What each worker was given lately: sums of work that fade by half in HALF_LIFE_MS.

Invariant: all sums fade alike, so their order and their parts of the total change only when work is
given. They are kept in units that grow instead: what is added at a later time counts for more, and
nothing has to be touched as time goes (forward decay). Now and then all are brought back to a unit
of one. Since sums only grow, the heap by which the least is found may be out of date as long as its
entries are too low: one is renewed when it surfaces.
Source: Cormode et al., "Forward Decay" (ICDE 2009).
Rejected: windows of fixed length, at whose edges a worker's share jumps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from math import exp2

HALF_LIFE_MS = 120_000
_HALF_LIVES_MAX = 64
"""Between two adjustments of the unit."""


class Given:
    """Work by worker. `unit(now)` is what one token given now counts."""

    def __init__(self, half_life_ms: int = HALF_LIFE_MS) -> None:
        self._half_life_ms = half_life_ms
        self._epoch_ms: int | None = None
        self._unit: tuple[int | None, float] = (None, 1.0)
        self.sums: dict[str, float] = {}
        """By worker, in units of the epoch: comparable with each other and multiples of `unit`. Not
        to be changed by others."""
        self._heap: list[tuple[float, str]] = []
        self.total = 0.0

    def set_workers(self, workers: Iterable[str]) -> None:
        """Those that count; new ones have been given nothing."""
        kept = {worker: self.sums.get(worker, 0.0) for worker in workers}
        if kept.keys() != self.sums.keys():
            self.sums = kept
            self._sort()

    def least(self) -> str:
        """Who was given least, the first by name of equal ones; '' if there is nobody."""
        heap = self._heap
        while heap:
            known, worker = heap[0]
            given = self.sums[worker]
            if known == given:
                return worker
            heapq.heapreplace(heap, (given, worker))
        return ""

    def unit(self, now_ms: int) -> float:
        at_ms, unit = self._unit
        if at_ms != now_ms:
            unit = self._unit_at(now_ms)
            self._unit = now_ms, unit
        return unit

    def _unit_at(self, now_ms: int) -> float:
        if self._epoch_ms is None:
            self._epoch_ms = now_ms
        half_lives = (now_ms - self._epoch_ms) / self._half_life_ms
        if half_lives > _HALF_LIVES_MAX:
            fade = 0.5 ** min(half_lives, 1_000.0)
            self.sums = {worker: each * fade for worker, each in self.sums.items()}
            self._sort()
            self._epoch_ms, half_lives = now_ms, 0.0
        # a clock that was set back makes what is given now count little, for a while
        return exp2(max(half_lives, -1_000.0))

    def add(self, worker: str, tokens: float, now_ms: int) -> None:
        """`worker` was given `tokens` of work."""
        assert tokens >= 0, "what was given is not taken back"
        more = tokens * self.unit(now_ms)
        before = self.sums.get(worker)
        if before is not None:
            self.sums[worker] = before + more
            self.total += more

    def check_integrity(self) -> None:
        assert sorted(worker for _, worker in self._heap) == sorted(self.sums), "one entry each"
        assert all(known <= self.sums[worker] for known, worker in self._heap), "never too high"
        total = sum(self.sums.values())
        assert abs(total - self.total) <= 1e-6 * (1 + total), "sums add up"

    def _sort(self) -> None:
        self._heap = sorted((each, worker) for worker, each in self.sums.items())
        self.total = sum(self.sums.values())
