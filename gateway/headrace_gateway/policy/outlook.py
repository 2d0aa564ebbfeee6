"""How fast the fleet works, and how long who arrives now will wait.

Invariant: rates are measured only while something waits, since an idle fleet's rate says nothing
of what it could do; an idle one only raises them. A band's wait is what stands before it over the
rate at which such work has been leaving: the better bands' share is in that rate (Little's law), so
it holds under a steady overload too. Work is counted in tokens: uncached prompt plus output. Where
jobs leave seldom, rates are averaged over so many of them that one more or less changes little.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.types import Band

INTERVAL_MS = 500
HALF_LIFE_MS = 8_000
HALF_LIFE_MS_MAX = 60_000
HALF_LIFE_EVENTS = 16
"""A half-life has at least so many events: of ten, a rate is off by a third now and then."""
WAIT_MS_MAX = 24 * 3_600_000
FLOOR_SHARE = 0.02
"""Of the total rate: the least at which a band with a smaller guaranteed share is taken to move."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The changing part of a Board; tuples have a value per Band."""

    queued: tuple[int, int, int]
    queued_work: tuple[int, int, int]
    waits_ms: tuple[int, int, int]
    work_per_s: float
    band_work_per_s: tuple[float, float, float]
    prefill_per_s: float


class _Rate:
    """Work per second, averaged with a half-life over the intervals that count."""

    def __init__(self, events_min: int = HALF_LIFE_EVENTS) -> None:
        """`events_min`: how many a half-life has at least; 0 where the latest is what counts."""
        self.per_s = 0.0
        self._events_min = events_min
        self._sum = 0.0
        self._events = 0
        self._events_per_ms = 0.0

    def add(self, work: float) -> None:
        self._sum += work
        self._events += 1

    def settle(self, elapsed_ms: int, *, counts: bool) -> None:
        """Close an interval; one that does not count may only raise the rate."""
        measured, self._sum = 1000 * self._sum / elapsed_ms, 0.0
        events, self._events = self._events / elapsed_ms, 0
        keep = 0.5 ** (elapsed_ms / self._half_life_ms())
        if not self._events_per_ms:
            self._events_per_ms = events
        elif counts or events > self._events_per_ms:
            self._events_per_ms = keep * self._events_per_ms + (1 - keep) * events
        if self.per_s == 0 and measured > 0:
            self.per_s = measured
        elif counts or measured > self.per_s:
            self.per_s = keep * self.per_s + (1 - keep) * measured

    def _half_life_ms(self) -> float:
        if not self._events_per_ms:
            return HALF_LIFE_MS
        longer = self._events_min / self._events_per_ms
        return min(HALF_LIFE_MS_MAX, max(HALF_LIFE_MS, longer))


class Throughput:
    """What has been served and dispatched lately."""

    def __init__(self, shares: tuple[float, float, float]) -> None:
        # the best band has whatever is not guaranteed to the others
        self._floors = (1 - sum(shares[1:]), *(max(each, FLOOR_SHARE) for each in shares[1:]))
        self._served = _Rate()
        self._bands = tuple(_Rate() for _ in Band)
        self._recent = tuple(_Rate(events_min=0) for _ in Band)
        self._backlogged = [False] * len(Band)
        self._workers = 0
        self._settled_ms = -1

    @property
    def work_per_s(self) -> float:
        """Of the fleet when it is busy; 0 before anything was measured."""
        return self._served.per_s

    def set_workers(self, count: int, now_ms: int) -> None:
        """A fleet that grew or shrank is taken to be faster or slower by as much."""
        if self._workers and count and count != self._workers:
            for rate in (self._served, *self._bands, *self._recent):
                rate.per_s *= count / self._workers
        self._workers = count
        if self._settled_ms < 0:
            self._settled_ms = now_ms

    def served(self, work: int) -> None:
        self._served.add(work)

    def dispatched(self, band: Band, work: int) -> None:
        self._bands[band].add(work)
        self._recent[band].add(work)

    def outlook(
        self,
        queued: tuple[int, int, int],
        work: tuple[int, int, int],
        prefill_per_s: float,
        free: bool,
        now_ms: int,
    ) -> Outlook:
        """`free`: some worker has a slot, so that nobody behind an empty queue waits."""
        self._settle(queued, now_ms)
        waits = [self._wait_ms(band, work, free) for band in Band]
        return Outlook(
            queued,
            work,
            (waits[0], waits[1], waits[2]),
            self.work_per_s,
            (self._band_rate(0, work), self._band_rate(1, work), self._band_rate(2, work)),
            prefill_per_s,
        )

    def _settle(self, queued: tuple[int, int, int], now_ms: int) -> None:
        elapsed = now_ms - self._settled_ms
        backlogged = [count > 0 for count in queued]
        if elapsed >= INTERVAL_MS:
            # both ends of the interval have to be busy for it to say what the fleet can do
            both = [was and now for was, now in zip(self._backlogged, backlogged, strict=True)]
            self._served.settle(elapsed, counts=any(both))
            for rate, counts in zip(self._bands, both, strict=True):
                rate.settle(elapsed, counts=counts)
            for rate in self._recent:
                rate.settle(elapsed, counts=True)
            self._settled_ms, self._backlogged = now_ms, backlogged

    def _band_rate(self, band: int, work: tuple[int, int, int]) -> float:
        """How fast `band` moves: as it has lately, or by all that better bands leave to it.

        The latter where none of them waits: once an overload is over, nobody stands in its way.
        """
        rate = max(self._floors[band] * self.work_per_s, self._bands[band].per_s)
        if band and not any(work[:band]):
            promised = self.work_per_s * sum(self._floors[band + 1 :])
            taken = sum(recent.per_s for recent in self._recent[:band])
            rate = max(rate, self.work_per_s - promised - taken)
        return min(self.work_per_s, rate)

    def _wait_ms(self, band: int, work: tuple[int, int, int], free: bool) -> int:
        ahead = sum(work[: band + 1])
        if self.work_per_s <= 0 or (free and not ahead):
            return 0
        wait_s = ahead / self.work_per_s
        if self._backlogged[band]:
            wait_s = max(wait_s, work[band] / self._band_rate(band, work))
        return min(WAIT_MS_MAX, int(1000 * wait_s))
