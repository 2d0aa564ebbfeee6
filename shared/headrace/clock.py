"""Time, as an argument. Wall-clock milliseconds may cross processes; monotonic ones never do."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from; tests hand in one that they move by hand."""

    def now_ms(self) -> int:
        """Milliseconds on a clock that never steps back, comparable in this process only."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, comparable between machines to within their skew."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch, for the start and end of spans."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def wall_ns(self) -> int:
        return time.time_ns()


class ManualClock:
    """A clock that stands still until told otherwise."""

    def __init__(self, now_ms: int = 0, wall_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._wall_ms = wall_ms

    def now_ms(self) -> int:
        return self._now_ms

    def wall_ms(self) -> int:
        return self._wall_ms

    def wall_ns(self) -> int:
        return self._wall_ms * 1_000_000

    def advance(self, milliseconds: int) -> None:
        assert milliseconds >= 0, "time does not run backwards"
        self._now_ms += milliseconds
        self._wall_ms += milliseconds
