"""Waiting jobs by an instant: which of them has it behind it.

Invariant: asking costs O(k log n) for the k jobs that it names; these are named again each time
until they are dropped. Rejected: looking at all jobs a few times a second, which with 10,000 of
them costs more than the decisions in between.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")
DEAD_MIN = 64
"""Dropped entries that may lie in the heap however small it is."""
_BITS = 48
_NUMBER = (1 << _BITS) - 1
"""The part of an entry that is a thing's number, behind its instant: one number is compared in a
fraction of the time that a pair takes, and the garbage collector never looks at it."""


class Timeline(Generic[T]):
    """Things by an instant, each known by the number that its owner gave it."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._things: dict[int, T] = {}
        self._passed: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._things)

    def add(self, instant: int, number: int, thing: T) -> None:
        """Keep `thing` under `number`, which was never used here before and has 48 bits."""
        self._things[number] = thing
        heapq.heappush(self._heap, instant << _BITS | number)

    def drop(self, number: int) -> None:
        """Forget what stands under `number`, if anything does."""
        if self._things.pop(number, None) is None or self._passed.pop(number, None) is not None:
            return
        if len(self._heap) > 2 * len(self._things) + DEAD_MIN:
            self._heap = [entry for entry in self._heap if entry & _NUMBER in self._things]
            heapq.heapify(self._heap)

    def passed(self, instant: int) -> list[T]:
        """The things whose instant is at or before `instant`, the earliest first."""
        while self._heap and self._heap[0] >> _BITS <= instant:
            entry = heapq.heappop(self._heap)
            if entry & _NUMBER in self._things:
                self._passed[entry & _NUMBER] = entry >> _BITS
        order = sorted((at, number) for number, at in self._passed.items() if at <= instant)
        return [self._things[number] for _, number in order]

    def check_integrity(self) -> None:
        waiting = [each & _NUMBER for each in self._heap if each & _NUMBER in self._things]
        assert sorted(waiting + list(self._passed)) == sorted(self._things), "each stands once"
