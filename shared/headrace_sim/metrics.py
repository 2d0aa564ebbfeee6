"""What is counted while a simulation runs, and what comes of it.

Invariant: every request ends in exactly one Outcome, and every figure is computed from records that
the fleet fills in, never from a policy's own books: a policy cannot flatter itself. Service is
counted as virtual token counters do (uncached prompt tokens, output tokens twice).
Sources: Sheng et al., OSDI 2024 (service, backlogged clients); Jain, Chiu and Hawe 1984 (index).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from headrace.types import Band
from headrace_gateway.policy.virtual_counters import INPUT_WEIGHT, OUTPUT_WEIGHT
from headrace_sim.workload import SimRequest

BUCKET_MS = 1_000.0
GAP_GROWTH = 1.05
"""Gaps between tokens fall into classes, each so much wider than the one before."""
GAP_MS_MIN = 0.1
GAP_CLASSES = 300
_CLASSES_PER_E = 1 / math.log(GAP_GROWTH)
PERCENTILES = (50, 90, 99)


class Outcome(IntEnum):
    """How a request ended."""

    COMPLETE = 0
    REFUSED = 1
    LATE = 2
    TOO_LONG = 3


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets per Band in ms: first token, and the mean gap between a request's tokens."""

    ttft_ms: tuple[float, float, float] = (2_000.0, 10_000.0, 60_000.0)
    itl_ms: tuple[float, float, float] = (100.0, 150.0, 300.0)

    def met(self, band: int, ttft_ms: float, itl_ms: float) -> bool:
        return ttft_ms <= self.ttft_ms[band] and itl_ms <= self.itl_ms[band]


class Gaps:
    """Gaps between tokens, in classes 5 % apart."""

    def __init__(self) -> None:
        self._counts = [[0] * GAP_CLASSES for _ in Band]
        self._last = (-1.0, 0)

    def add(self, rows: Sequence[int], gap_ms: float, steps: int) -> None:
        """In each of `steps` steps, `rows` tokens per Band came `gap_ms` after those before."""
        known_ms, place = self._last
        if gap_ms != known_ms:
            place = int(math.log(max(gap_ms, GAP_MS_MIN) / GAP_MS_MIN) * _CLASSES_PER_E + 0.5)
            place = min(place, GAP_CLASSES - 1)
            self._last = (gap_ms, place)
        for band, count in enumerate(rows):
            if count:
                self._counts[band][place] += count * steps

    def percentile(self, band: int, percent: float) -> float:
        """In ms, right within 2.5 %; 0 where there are none."""
        counts = self._counts[band]
        left = percent / 100 * sum(counts)
        for place, count in enumerate(counts):
            left -= count
            if count and left <= 0:
                return GAP_MS_MIN * GAP_GROWTH**place
        return 0.0


class Records:
    """A row for each request, in columns."""

    def __init__(self) -> None:
        self.tenants: dict[str, int] = {}
        self.tenant = array("H")
        self.band = array("B")
        self.outcome = array("B")
        self.arrived_ms = array("d")
        self.wait_ms = array("d")
        self.ttft_ms = array("d")
        self.end_ms = array("d")
        self.prompt_tokens = array("L")
        self.cached_tokens = array("L")
        self.output_tokens = array("L")

    def __len__(self) -> int:
        return len(self.band)

    def add(
        self,
        request: SimRequest,
        outcome: Outcome,
        end_ms: float,
        wait_ms: float = 0.0,
        ttft_ms: float = math.inf,
        cached_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """`request` ended; `wait_ms` it waited for a worker."""
        self.tenant.append(self.tenants.setdefault(request.tenant, len(self.tenants)))
        self.band.append(request.band)
        self.outcome.append(outcome)
        self.arrived_ms.append(request.at_ms)
        self.wait_ms.append(wait_ms)
        self.ttft_ms.append(ttft_ms)
        self.end_ms.append(end_ms)
        self.prompt_tokens.append(request.input_tokens)
        self.cached_tokens.append(cached_tokens)
        self.output_tokens.append(output_tokens)

    def itl_ms(self, row: int) -> float:
        """Mean gap between the tokens of a complete request, 0 for a single token."""
        gaps = self.output_tokens[row] - 1
        began = self.arrived_ms[row] + self.ttft_ms[row]
        return (self.end_ms[row] - began) / gaps if gaps > 0 else 0.0


Served = tuple[str, int, int]
"""(tenant, prompt tokens computed, output tokens)."""


class Service:
    """What each tenant got, and when it was waiting, by the second."""

    def __init__(self) -> None:
        self._served: dict[str, array[float]] = {}
        self._waiting: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._busy: dict[str, set[int]] = {}
        self.weights: dict[str, float] = {}

    def add(self, now_ms: float, served: Iterable[Served]) -> None:
        """What is told of at `now_ms`."""
        bucket, known = int(now_ms / BUCKET_MS), self._served
        for tenant, input_tokens, output_tokens in served:
            row = known.get(tenant)
            if row is None:
                row = known[tenant] = array("d")
            if len(row) <= bucket:
                row.extend([0.0] * (bucket + 1 - len(row)))
            row[bucket] += INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens

    def waits(self, tenant: str, weight: float, now_ms: float) -> None:
        """One more job of `tenant` waits for a worker."""
        self.weights[tenant] = weight
        count = self._waiting.get(tenant, 0)
        if not count:
            self._since[tenant] = now_ms
        self._waiting[tenant] = count + 1

    def goes(self, tenant: str, now_ms: float) -> None:
        """One job less of `tenant` waits."""
        count = self._waiting[tenant] = self._waiting[tenant] - 1
        if not count:
            first = math.ceil(self._since.pop(tenant) / BUCKET_MS)
            after = int(now_ms / BUCKET_MS)
            if first < after:
                self._busy.setdefault(tenant, set()).update(range(first, after))

    def total(self, tenant: str) -> float:
        """Service of `tenant` over its weight."""
        return sum(self._served.get(tenant, ())) / self.weights.get(tenant, 1.0)

    @property
    def tenants(self) -> list[str]:
        return list(self.weights)

    def busy_buckets(self, tenant: str) -> set[int]:
        """Seconds through all of which `tenant` had something waiting."""
        return self._busy.get(tenant, set())

    def served(self, tenant: str, bucket: int) -> float:
        """Service per weight in one second."""
        row = self._served.get(tenant, array("d"))
        return row[bucket] / self.weights[tenant] if bucket < len(row) else 0.0


@dataclass(frozen=True, slots=True)
class Fairness:
    """Over times in which two tenants or more had something waiting.

    `gap_max`: the most by which the service per weight of two of them drifted apart while both
    waited without a pause. `jain`: of their service per weight in windows of ten seconds, 1 is
    even, averaged. `backlogged_s`: how many seconds that were.
    """

    gap_max: float
    jain: float
    backlogged_s: int


def fairness(service: Service, tenants_max: int = 32) -> Fairness:
    """Of the `tenants_max` tenants that waited longest."""
    busy = {tenant: service.busy_buckets(tenant) for tenant in service.tenants}
    tenants = sorted(busy, key=lambda t: (-len(busy[t]), t))[:tenants_max]
    gap = 0.0
    for i, one in enumerate(tenants):
        for other in tenants[i + 1 :]:
            gap = max(gap, _gap(service, one, other, sorted(busy[one] & busy[other])))
    shared = sorted(
        bucket
        for bucket in set().union(*(busy[t] for t in tenants))
        if sum(bucket in busy[t] for t in tenants) > 1
    )
    return Fairness(gap, _jain_over(service, tenants, busy, shared), len(shared))


def _gap(service: Service, one: str, other: str, buckets: Sequence[int]) -> float:
    """The widest drift of two tenants over runs of seconds in which both waited."""
    widest = drift = low = high = 0.0
    before = -2
    for bucket in buckets:
        if bucket != before + 1:
            drift = low = high = 0.0
        drift += service.served(one, bucket) - service.served(other, bucket)
        low, high, before = min(low, drift), max(high, drift), bucket
        widest = max(widest, high - low)
    return widest


def _jain_over(
    service: Service, tenants: list[str], busy: dict[str, set[int]], shared: list[int]
) -> float:
    windows: dict[int, dict[str, list[float]]] = {}
    for bucket in shared:
        window = windows.setdefault(bucket // 10, {})
        for tenant in tenants:
            if bucket in busy[tenant]:
                window.setdefault(tenant, []).append(service.served(tenant, bucket))
    indices = []
    for window in windows.values():
        # rates, as not everybody waited for all of the window
        rates = [sum(served) / len(served) for served in window.values() if len(served) >= 5]
        if len(rates) > 1 and sum(rates) > 0:
            indices.append(jain(rates))
    return sum(indices) / len(indices) if indices else 1.0


def jain(values: Sequence[float]) -> float:
    """1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, the nearest rank; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class GroupStats:
    """One band's or tenant's requests; times in ms. `met`: complete and within the targets."""

    requests: int
    complete: int
    refused: int
    late: int
    met: int
    met_share: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    wait_ms: dict[str, float]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's figures, as they are printed and written as JSON.

    `work_max_over_mean`: of the tokens that workers computed; `busy_…`: of the time they did.
    `refusals`: how often gateways refused for which reason, numbers left out; most frequent first.
    """

    name: str
    workers: int
    requests: int
    span_s: float
    complete: int
    refused: int
    late: int
    too_long: int
    goodput_per_s: float
    met_share: float
    output_per_s: float
    input_per_s: float
    hit_ratio: float
    utilisation: float
    work_max_over_mean: float
    busy_max_over_mean: float
    preemptions: int
    fairness: Fairness
    bands: dict[str, GroupStats]
    tenants: dict[str, GroupStats]
    itl_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)


def group_stats(records: Records, rows: Iterable[int], slo: Slo) -> GroupStats:
    """Figures of some requests. What never got a first token has no TTFT but is not `met`."""
    counts = [0] * len(Outcome)
    ttfts: list[float] = []
    itls: list[float] = []
    waits: list[float] = []
    met = output = 0
    for row in rows:
        counts[records.outcome[row]] += 1
        output += records.output_tokens[row]
        if records.outcome[row] != Outcome.COMPLETE:
            continue
        ttft, itl = records.ttft_ms[row], records.itl_ms(row)
        ttfts.append(ttft)
        waits.append(records.wait_ms[row])
        if records.output_tokens[row] > 1:
            itls.append(itl)
        met += slo.met(records.band[row], ttft, itl)
    requests = sum(counts)
    return GroupStats(
        requests=requests,
        complete=counts[Outcome.COMPLETE],
        refused=counts[Outcome.REFUSED],
        late=counts[Outcome.LATE],
        met=met,
        met_share=met / requests if requests else 1.0,
        ttft_ms=spread(ttfts),
        itl_ms=spread(itls),
        wait_ms=spread(waits),
        output_tokens=output,
    )


def spread(values: list[float]) -> dict[str, float]:
    """Mean and percentiles."""
    values.sort()
    found = {"mean": sum(values) / len(values) if values else 0.0}
    found.update({f"p{p}": percentile(values, p) for p in PERCENTILES})
    return found


def by_group(keys: Iterable[int]) -> dict[int, list[int]]:
    """Rows by the value in their column."""
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return groups
