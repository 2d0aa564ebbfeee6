"""Workloads: seeded, mixed as asked, and in order of time."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest

from headrace.errors import SettingsError
from headrace.types import Band
from headrace_sim.trace import Trace, TraceRequest
from headrace_sim.workload import (
    BLOCK_ID_SPAN,
    ClosedLoop,
    Lengths,
    Mix,
    PoissonStream,
    Shape,
    SimTenant,
    Surge,
    Together,
    TraceStream,
)

TRACE = Trace(
    "t",
    512,
    tuple(TraceRequest(100.0 * n, 1_024 + n, 10 + n, (0, 1 + n % 7)) for n in range(100)),
)
MIX = Mix((SimTenant("a", share=3), SimTenant("b", weight=2)), (10, 60, 30), 3, (500, 0, 0))


def test_a_trace_is_replayed_faster_and_over_again() -> None:
    """Each repetition follows one mean gap after the last and shares no prefix with it."""
    made = list(TraceStream(TRACE, MIX, seed=1, rate=4, requests=250).start())
    assert len(made) == 250
    assert [r.at_ms for r in made[:3]] == [0, 25, 50]
    assert made[100].at_ms == pytest.approx(TRACE.span_ms / 4) == 2_500
    assert all(a.at_ms <= b.at_ms for a, b in pairwise(made))
    assert len({r.id for r in made}) == 250
    first, second = (
        {block for r in part for block, _ in r.blocks} for part in (made[:100], made[100:200])
    )
    assert not first & second


def test_a_conversation_belongs_to_one_tenant_and_tenants_share_no_blocks() -> None:
    made = list(TraceStream(TRACE, MIX, seed=1).start())
    owners: dict[int, set[str]] = {}
    for r in made:
        owners.setdefault(r.blocks[1][0] % BLOCK_ID_SPAN, set()).add(r.tenant)
    assert all(len(names) == 1 for names in owners.values())
    spans = {r.tenant: r.blocks[0][0] // BLOCK_ID_SPAN for r in made}
    assert len(set(spans.values())) == len(spans) == 2
    assert {r.weight for r in made if r.tenant == "b"} == {2}


def test_bands_and_tenants_come_in_the_parts_asked_for() -> None:
    shape = Shape(Lengths(100, 0.5, 1_000), Lengths(20))
    made = list(PoissonStream(MIX, shape, per_s=10, requests=8_000, seed=3).start())
    bands = Counter(r.band for r in made)
    assert bands[Band.INTERACTIVE] / 8_000 == pytest.approx(0.1, abs=0.02)
    assert bands[Band.STANDARD] / 8_000 == pytest.approx(0.6, abs=0.02)
    assert Counter(r.tenant for r in made)["a"] / 8_000 == pytest.approx(0.75, abs=0.02)
    assert {r.ttft_ms for r in made if r.band is Band.INTERACTIVE} == {500}
    assert sum(r.input_tokens for r in made) / 8_000 == pytest.approx(100, rel=0.05)
    assert made[-1].at_ms == pytest.approx(800_000, rel=0.05)
    assert {r.gateway for r in made} == {0, 1, 2}


def test_surges_bring_more_requests_while_they_last() -> None:
    surges = (Surge(10_000, 20_000, 5),)
    made = PoissonStream(Mix(), Shape(), per_s=20, requests=2_000, surges=surges, seed=4).start()
    seconds = Counter(int(r.at_ms // 10_000) for r in made)
    assert seconds[0] == pytest.approx(200, rel=0.25)
    assert seconds[1] == pytest.approx(1_000, rel=0.15)
    assert seconds[2] == pytest.approx(200, rel=0.25)


def test_popular_prefixes_come_more_often_and_belong_to_a_tenant() -> None:
    shape = Shape(prefixes=4, prefix_tokens=256, block_tokens=128)
    made = list(PoissonStream(MIX, shape, per_s=10, requests=2_000, seed=5).start())
    assert all(sum(size for _, size in r.blocks) == 256 for r in made)
    of_a = Counter(r.blocks for r in made if r.tenant == "a")
    of_b = Counter(r.blocks for r in made if r.tenant == "b")
    assert len(of_a) == len(of_b) == 4
    assert not of_a.keys() & of_b.keys()
    ranked = [count for _, count in of_a.most_common()]
    assert ranked[0] > 1.6 * ranked[1]


def test_the_same_seed_draws_the_same() -> None:
    def draw(seed: int) -> list[object]:
        poisson = PoissonStream(
            MIX, Shape(prefixes=3, prefix_tokens=128), per_s=5, requests=50, seed=seed
        )
        return [*poisson.start(), *TraceStream(TRACE, MIX, seed=seed).start()]

    assert draw(1) == draw(1) != draw(2)


def test_streams_together_keep_their_order_and_their_loops() -> None:
    loop = ClosedLoop(Mix(), Shape(), clients=2, until_ms=1_000, seed=0, stream=0)
    both = Together([loop, PoissonStream(Mix(), Shape(), per_s=100, requests=20, seed=1)])
    made = list(islice(both.start(), 30))
    assert len(made) == 22
    assert all(a.at_ms <= b.at_ms for a, b in pairwise(made))
    of_loop = next(r for r in made if r.stream == 0)
    following = both.ended(of_loop, 500.0)
    assert following is not None
    assert (following.stream, following.at_ms) == (0, 500.0)
    assert following.id not in {r.id for r in made}
    assert both.ended(of_loop, 1_500.0) is None
    assert both.ended(next(r for r in made if r.stream == 1), 500.0) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mix(bands=(0, 0, 0)),
        lambda: Mix(tenants=()),
        lambda: Mix((SimTenant("a", weight=0),)),
        lambda: TraceStream(TRACE, MIX, seed=0, rate=0),
        lambda: PoissonStream(MIX, Shape(), per_s=0, requests=1, seed=0),
        lambda: Shape(block_tokens=24),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(SettingsError):
        make()
