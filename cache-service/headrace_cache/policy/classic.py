"""Well-known policies, among leaves, to compare with: FIFO, LRU, LFU, GDSF.

None of them knows of classes. Sources: LFU with ties by last use, and GreedyDual-Size-Frequency
(L. Cherkasova, HP Labs 1998-69) with an entry's cost per byte as it was measured.
"""

from __future__ import annotations

from headrace_cache.policy.ranked import Ranked


class FirstInFirstOut(Ranked):
    """The oldest leaf leaves; use counts for nothing."""

    AGES = False

    def _score(self, slot: int) -> float:
        return float(self._ranks.sequence[slot])


class LeastRecentlyUsed(Ranked):
    """The score is the number of the last use."""

    AGES = False

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._clock = 0

    def _score(self, slot: int) -> float:  # noqa: ARG002  # recency asks nothing of the entry
        self._clock += 1
        return float(self._clock)


class LeastFrequentlyUsed(Ranked):
    """The score is the number of uses since it came in; the longest unused of those leaves."""

    AGES = False

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._clock = 0

    def _score(self, slot: int) -> float:
        self._clock += 1
        return self._uses[slot] + self._clock / (1 << 40)


class GreedyDualSizeFrequency(Ranked):
    """Aging + uses x cost / bytes; where no cost is known, entries cost the same."""

    def _score(self, slot: int) -> float:
        worth = (self._cost_us[slot] or 1) / self._size[slot]
        return self._base(slot) + self._uses[slot] * worth
