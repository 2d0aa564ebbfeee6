"""Figures: percentiles, indices, gaps, and what counts as meeting a target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.types import Band
from headrace_sim.metrics import (
    Gaps,
    Outcome,
    Records,
    Service,
    Slo,
    fairness,
    group_stats,
    jain,
    percentile,
)
from headrace_sim.workload import SimRequest


def request(at_ms: float, band: Band = Band.STANDARD, tenant: str = "a") -> SimRequest:
    return SimRequest("r", at_ms, tenant, 1.0, band, 100, 11, 11)


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([1, 2, 3, 4], p) for p in (1, 25, 50, 75, 99, 100)] == [1, 1, 2, 3, 4, 4]
    assert percentile([], 50) == 0


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30))
def test_jains_index_lies_between_one_over_n_and_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9
    assert jain([values[0]] * 5) == pytest.approx(1)


@given(st.floats(0.2, 1e5), st.floats(1, 99))
def test_gap_classes_are_narrow(gap_ms: float, percent: float) -> None:
    gaps = Gaps()
    gaps.add((0, 100, 0), gap_ms, 10)
    assert gaps.percentile(1, percent) == pytest.approx(gap_ms, rel=0.026)
    assert gaps.percentile(0, percent) == 0


def test_gap_percentiles_follow_counts() -> None:
    gaps = Gaps()
    gaps.add((9, 5, 0), 10, 10)
    gaps.add((1, 0, 0), 1_000, 10)
    assert gaps.percentile(0, 50) == pytest.approx(10, rel=0.03)
    assert gaps.percentile(0, 95) == pytest.approx(1_000, rel=0.03)


def test_who_is_refused_or_slow_does_not_count_as_met() -> None:
    records, slo = Records(), Slo((100, 100, 100), (20, 20, 20))
    done = {"wait_ms": 5, "output_tokens": 11}
    records.add(request(0), Outcome.COMPLETE, 250, ttft_ms=90, **done)  # 16 ms apart
    records.add(request(0), Outcome.COMPLETE, 250, ttft_ms=110, **done)  # late first token
    records.add(request(0), Outcome.COMPLETE, 350, ttft_ms=90, **done)  # 26 ms apart
    records.add(request(0), Outcome.REFUSED, 0)
    stats = group_stats(records, range(4), slo)
    assert (stats.requests, stats.complete, stats.refused, stats.met) == (4, 3, 1, 1)
    assert stats.met_share == 0.25
    assert stats.ttft_ms["p50"] == 90
    assert stats.itl_ms["p99"] == pytest.approx(26)


def waiting(service: Service, tenant: str, since_s: float, until_s: float, weight: float) -> None:
    service.waits(tenant, weight, since_s * 1000)
    service.goes(tenant, until_s * 1000)


def test_the_gap_counts_only_while_both_wait_without_a_pause() -> None:
    """a gets 10 a second and b 30 for its weight of 2: they drift apart by 5 a second."""
    service = Service()
    waiting(service, "a", 0, 4, 1)
    waiting(service, "a", 6, 8, 1)
    waiting(service, "b", 0, 9, 2)
    for second in range(9):
        service.add(second * 1000 + 500, [("a", 10, 0), ("b", 10, 10)])
    result = fairness(service)
    assert result.gap_max == 20
    assert result.backlogged_s == 6
    assert service.total("b") == 9 * 15


def test_an_even_service_has_an_index_of_one() -> None:
    service = Service()
    for tenant, weight in (("a", 1.0), ("b", 3.0)):
        waiting(service, tenant, 0, 30, weight)
        for second in range(30):
            service.add(second * 1000, [(tenant, int(10 * weight), 0)])
    assert fairness(service).jain == pytest.approx(1)
    assert fairness(service).gap_max == 0
    assert math.isfinite(fairness(Service()).jain)
