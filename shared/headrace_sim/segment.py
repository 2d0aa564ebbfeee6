"""A stretch of engine steps between two changes of the batch, in closed form.

Invariant: step i (from 0) of a segment takes `first_ms + i * growth_ms`, as each decoding row reads
one more token of KV than in the step before and nothing else changes. So its times are sums of an
arithmetic series, and a thousand decode steps are one event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from headrace_sim.lane import Lane
from headrace_sim.plan import Chunk


@dataclass(slots=True)
class Segment:
    """`steps` steps from `start_ms`, each of `rows` rows in `lanes`; with `chunks`, just one."""

    start_ms: float
    steps: int
    first_ms: float
    growth_ms: float
    rows: int
    lanes: list[Lane]
    chunks: list[Chunk] = field(default_factory=list)

    def elapsed_ms(self, steps: int) -> float:
        """How long its first `steps` steps take."""
        return steps * self.first_ms + self.growth_ms * (steps * (steps - 1) / 2)

    def last_ms(self, count: int) -> list[float]:
        """How long each of its last `count` steps takes, or each of all."""
        first = max(0, self.steps - count)
        return [self.first_ms + self.growth_ms * step for step in range(first, self.steps)]

    @property
    def end_ms(self) -> float:
        steps = self.steps
        return self.start_ms + (steps * self.first_ms + self.growth_ms * (steps * (steps - 1) / 2))

    def steps_until(self, now_ms: float) -> int:
        """The least number of whole steps, at least one, after which `now_ms` is reached."""
        return max(1, self._count(now_ms, ended=False))

    def steps_ended(self, now_ms: float) -> int:
        """How many steps have ended by `now_ms`."""
        count = self._count(now_ms, ended=True)
        return count if count < self.steps else self.steps

    def _count(self, now_ms: float, *, ended: bool) -> int:
        start, first, growth = self.start_ms, self.first_ms, self.growth_ms
        span = now_ms - start
        if span <= 0:
            return 0
        half = growth / 2
        slope = first - half
        if half > 0:
            count = int((math.sqrt(slope * slope + 4 * half * span) - slope) / growth)
        else:
            count = int(span / first)
        # rounding may have missed by one; the sums are `elapsed_ms`
        while start + (count * first + growth * (count * (count - 1) / 2)) < now_ms:
            count += 1
        while count:
            before = count - 1
            if start + (before * first + growth * (before * (before - 1) / 2)) < now_ms:
                break
            count = before
        if ended and start + (count * first + growth * (count * (count - 1) / 2)) > now_ms:
            count -= 1
        return count
