"""Virtual token counters: what each tenant has had, for its weight, in each band.

Invariant: a counter only grows, but for a correction, which never takes back more than was charged
since its tenant last came back from idle. Whoever comes back starts no lower than the least of
those that wait (or, where nobody waits, than the last that left), so idleness saves up nothing;
nobody is punished for what it took while nobody else asked. Then two tenants of equal weight that
both wait all the time differ in service by at most 2 * max(INPUT_WEIGHT * longest input,
OUTPUT_WEIGHT * tokens that run at once), and no scheduler that keeps the machine busy halves that.
A counter belongs to a tenant in one band. Rejected: one counter over all bands. A tenant whose
interactive jobs never wait would then never see its batch jobs run, and a backlog in batch, where
service is rare, would be credit to spend among interactive jobs.
Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.types import Band

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
TENANTS_MAX = 16_384
"""Idle tenants remembered per band; beyond it those that had least are forgotten."""
KEPT_SHARE = 0.75
"""The part of TENANTS_MAX that is left after some were forgotten."""


def virtual_tokens(weight: float, input_tokens: int, output_tokens: int) -> float:
    """What so many tokens add to the counter of a tenant of `weight`."""
    assert weight > 0, "a tenant's weight is positive"
    return (INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens) / weight


@dataclass(slots=True, eq=False)
class Counter:
    """`floor` is its value when its tenant last came back from idle."""

    value: float
    floor: float
    waits: bool = False


class VirtualCounters:
    """The counters of one model's tenants. The queue says who waits; this says who had how much."""

    def __init__(self, tenants_max: int = TENANTS_MAX) -> None:
        self._tenants_max = tenants_max
        self._counters: tuple[dict[str, Counter], ...] = tuple({} for _ in Band)
        self.by_band: Sequence[Mapping[str, Counter]] = self._counters
        """For who charges many at once: a counter's value may grow, nothing else is changed."""
        self._last_left: list[str | None] = [None for _ in Band]
        self._base = [0.0 for _ in Band]
        self._idle = [0 for _ in Band]

    def value(self, tenant: str, band: int) -> float:
        """Virtual tokens that `tenant` has had in `band`; a stranger's is where it would start."""
        counter = self._counters[band].get(tenant)
        return self._base[band] if counter is None else counter.value

    def charge(
        self, tenant: str, weight: float, band: int, input_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Add tokens that `tenant` has been served; negative ones correct an earlier charge."""
        assert weight > 0, "a tenant's weight is positive"
        counter = self._counters[band].get(tenant) or self._counter(tenant, band)
        # virtual_tokens, written out: each job is charged several times
        tokens = INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens
        value = counter.value + tokens / weight
        counter.value = value if value > counter.floor else counter.floor

    def lift(self, tenant: str, band: int, least: float | None) -> Counter:
        """`tenant` begins to wait in `band`, where the least counter of those that wait is `least`.

        None: nobody waits there. The counter answered is the tenant's until it leaves.
        """
        if least is None:
            least = self._start(band)
        counter = self._counter(tenant, band)
        counter.value = counter.floor = max(counter.value, least)
        self._set_waits(counter, band, True)
        return counter

    def lifted(self, tenant: str, band: int) -> float:
        """Where `lift` would put `tenant` while nobody waits in `band`."""
        return max(self.value(tenant, band), self._start(band))

    def _start(self, band: int) -> float:
        """Where whoever comes begins while nobody waits."""
        last = self._last_left[band]
        return self._base[band] if last is None else self.value(last, band)

    def keep(self, tenant: str, band: int) -> Counter:
        """As `lift`, as if it had never left: what it was given was taken back."""
        counter = self._counter(tenant, band)
        self._set_waits(counter, band, True)
        return counter

    def leave(self, tenant: str, band: int) -> None:
        """`tenant` waits in `band` no more."""
        self._set_waits(self._counter(tenant, band), band, False)
        self._last_left[band] = tenant
        if self._idle[band] > self._tenants_max:
            self._forget_some(band)

    def advance(self, band: int, least: float) -> None:
        """The least counter of those that wait in `band` is `least` now: where strangers start."""
        self._base[band] = least

    def snapshot(self) -> dict[str, float]:
        """What a later term needs, by opaque names: bases, and who is above its band's base."""
        saved: dict[str, float] = {}
        for band, counters in enumerate(self._counters):
            base = self._base[band]
            saved[f"{band}"] = base
            for tenant, counter in counters.items():
                if counter.value > base:
                    saved[f"{band}:{tenant}"] = counter.value
        return saved

    def restore(self, saved: Mapping[str, float]) -> None:
        """Take over a snapshot; what was charged since stays if it is more. Unknown names and
        values that no snapshot holds are passed over."""
        bands = {str(int(band)): int(band) for band in Band}
        for name, value in saved.items():
            label, colon, tenant = name.partition(":")
            band = bands.get(label)
            if band is None or not (math.isfinite(value) and value >= 0):
                continue
            if colon:
                self._raise(self._counter(tenant, band), value)
            else:
                self._base[band] = max(self._base[band], value)
        for base, counters in zip(self._base, self._counters, strict=True):
            for counter in counters.values():
                self._raise(counter, base)

    def check_integrity(self) -> None:
        """Assert that no counter is below its floor and that few enough are kept."""
        for band, counters in enumerate(self._counters):
            assert all(math.isfinite(c.value) for c in counters.values()), "counters are finite"
            assert all(c.value >= c.floor for c in counters.values()), "none is below its floor"
            idle = sum(not c.waits for c in counters.values())
            assert idle == self._idle[band] <= self._tenants_max, f"band {band}: {idle} are idle"

    @staticmethod
    def _raise(counter: Counter, value: float) -> None:
        if counter.value < value:
            counter.value = counter.floor = value

    def _counter(self, tenant: str, band: int) -> Counter:
        counters = self._counters[band]
        counter = counters.get(tenant)
        if counter is None:
            if self._idle[band] >= self._tenants_max:
                self._forget_some(band)
            counter = counters[tenant] = Counter(self._base[band], self._base[band])
            self._idle[band] += 1
        return counter

    def _set_waits(self, counter: Counter, band: int, waits: bool) -> None:
        self._idle[band] += counter.waits - waits
        counter.waits = waits

    def _forget_some(self, band: int) -> None:
        """Those that had least lose nothing and gain least by it: a return lifts them anyway."""
        counters = self._counters[band]
        idle = [t for t, c in counters.items() if not c.waits and t != self._last_left[band]]
        idle.sort(key=lambda tenant: counters[tenant].value)
        surplus = self._idle[band] - int(self._tenants_max * KEPT_SHARE)
        for tenant in idle[:surplus]:
            del counters[tenant]
            self._idle[band] -= 1
