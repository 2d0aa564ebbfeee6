"""The default: keep-score = class floor + L + uses x recompute cost / bytes.

L is the highest score evicted so far: what came or was used later starts above it. Cost per byte
is taken relative to that of all residents together, so that the average entry is worth 1, whatever
the model and machine, and floors mean the same everywhere. An entry without a cost counts as
average.

Source: GreedyDual-Size-Frequency (L. Cherkasova, "Improving WWW proxies performance with
Greedy-Dual-Size-Frequency caching policy", HP Labs 1998-69), with a class floor added.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.types import Band
from headrace_cache.policy.ranked import Ranked

FLOORS: Mapping[Band, float] = {Band.INTERACTIVE: 4.0, Band.STANDARD: 1.0, Band.BATCH: 0.0}
"""Head start of a class, in turnovers of the cache that an unused entry outlives."""

WORTH_MAX = 64.0
"""Turnovers that use and cost together may earn: nothing stays for ever without being used."""


class KeepScore(Ranked):
    """See the module. Sums are of whole numbers, so that no rounding error adds up."""

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._costs_us = 0
        self._costed_bytes = 0
        self._floors = [FLOORS[band] for band in Band]

    def _account(self, slot: int, sign: int) -> None:
        if self._cost_us[slot]:
            self._costs_us += sign * self._cost_us[slot]
            self._costed_bytes += sign * self._size[slot]

    def _entered(self, slot: int, name: int) -> None:
        self._account(slot, 1)
        super()._entered(slot, name)

    def _left(self, slot: int) -> None:
        self._account(slot, -1)
        super()._left(slot)

    def _score(self, slot: int) -> float:
        worth = 1.0
        if self._cost_us[slot]:
            usual = self._costs_us / self._costed_bytes
            worth = self._cost_us[slot] / self._size[slot] / usual
        floor = self._floors[self._band[slot]]
        return floor + self._base(slot) + min(self._uses[slot] * worth, WORTH_MAX)

    def check_integrity(self) -> None:
        super().check_integrity()
        costed = [slot for slot, here in enumerate(self._resident) if here and self._cost_us[slot]]
        assert self._costs_us == sum(self._cost_us[slot] for slot in costed), "costs add up"
        assert self._costed_bytes == sum(self._size[slot] for slot in costed), "sizes add up"
