"""The fleet: deterministic, nothing lost, nothing left, nobody idle beside a queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.types import Band
from headrace_gateway.policy.admission import AdmissionLimits
from headrace_sim.alternatives import ALTERNATIVES
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.gateway import GatewayConfig
from headrace_sim.metrics import Outcome, Slo
from headrace_sim.options import enough_gateways
from headrace_sim.simulation import summarize
from headrace_sim.workload import (
    ClosedLoop,
    Lengths,
    Mix,
    Shape,
    SimTenant,
    Together,
)
from simulation.builders import ROOMY, SMALL, simulate, stream

WAYS = list(ALTERNATIVES)


def rows(fleet: Fleet) -> list[tuple[object, ...]]:
    """Everything that was recorded."""
    r = fleet.records
    columns = (r.outcome, r.arrived_ms, r.wait_ms, r.ttft_ms, r.end_ms, r.cached_tokens)
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_same_run_and_another_seed_another(way: str) -> None:
    once, again, other = (simulate(stream(seed), way, seed=seed, check=False) for seed in (1, 1, 2))
    assert rows(once) == rows(again)
    assert once.events == again.events
    assert rows(once) != rows(other)


@pytest.mark.parametrize("way", WAYS)
def test_every_request_ends_once_and_nothing_is_left(way: str) -> None:
    """With little KV, so that jobs are preempted; integrity is looked at after every event."""
    fleet = simulate(stream(3, requests=120, per_s=40), way, cost=SMALL, workers=2)
    assert len(fleet.records) == 120
    assert fleet.live == 0
    complete = [n for n, o in enumerate(fleet.records.outcome) if o == Outcome.COMPLETE]
    assert len(complete) > 60
    computed = sum(worker.output_tokens for worker in fleet.workers.values())
    assert computed == sum(fleet.records.output_tokens[n] for n in complete)
    for tenant, n in fleet.records.tenants.items():
        rows_of = [row for row in complete if fleet.records.tenant[row] == n]
        prompt, cached, output = (
            sum(column[row] for row in rows_of)
            for column in (
                fleet.records.prompt_tokens,
                fleet.records.cached_tokens,
                fleet.records.output_tokens,
            )
        )
        served = fleet.service.total(tenant) * fleet.service.weights[tenant]
        assert served == pytest.approx(prompt - cached + 2 * output), "all service is counted"
    for worker in fleet.workers.values():
        assert worker.scheduler.cache.private == worker.scheduler.cache.shared == 0
        assert worker.scheduler.running == 0
    assert all(gateway.live == 0 for gateway in fleet.gateways)


def test_ours_keeps_no_books_on_what_is_gone() -> None:
    fleet = simulate(stream(4, requests=100, per_s=40), cost=SMALL, workers=2)
    policy = fleet.policy
    assert len(policy.queue) == 0
    assert policy.queue.work == (0, 0, 0)
    for worker in fleet.workers:
        assert policy.workload.reserved_tokens(worker) == 0
        assert not policy.workload.jobs_on(worker)


def test_no_worker_idles_while_a_job_waits() -> None:
    """Work conservation, looked at after every event: an idle worker takes any job."""

    class Watched(Fleet):
        waited = 0

        def check_integrity(self) -> None:
            waits = len(self.policy.queue)
            self.waited += waits > 0
            if waits:
                for name, worker in self.workers.items():
                    on_the_way = self.policy.workload.count_on(name)
                    assert worker.scheduler.running or worker.scheduler.waiting or on_the_way

    config = FleetConfig(3, SMALL, gateways=2, check=True)
    fleet = Watched(config, stream(5, requests=200, per_s=80)).run()
    assert fleet.waited > 50, "the story needs a queue"


def test_there_are_gateways_enough_for_the_streams_of_all_workers() -> None:
    """A fleet that is full refuses nobody for want of streams, whatever the band."""
    limits = AdmissionLimits(live_jobs_max=100, shares=(100, 80, 50))
    assert enough_gateways(1, limits) == 2
    assert enough_gateways(100, limits) == 2
    assert enough_gateways(101, limits) == 3
    assert enough_gateways(10**9, limits) == 1_000


def test_overload_is_refused_to_batch_first_and_interactive_last() -> None:
    limits = AdmissionLimits(queue_jobs_max=30)
    fleet = simulate(
        stream(6, requests=400, per_s=100, bands=(20, 50, 30)),
        workers=1,
        gateway=GatewayConfig(limits=limits),
        check=False,
    )
    summary = summarize(fleet, Slo())
    bands = summary.bands
    refused = [bands[b.label].refused / bands[b.label].requests for b in Band]
    assert 0 < refused[1] < refused[2]
    assert sum(summary.refusals.values()) == summary.refused
    assert all("N jobs" in reason or "N tokens" in reason for reason in summary.refusals)
    assert refused[0] < refused[1]
    ttft = [bands[b.label].ttft_ms["p99"] for b in Band]
    assert ttft[0] < ttft[1] < ttft[2]


def test_who_cannot_make_its_deadline_is_not_served_late() -> None:
    """Refused at the door, dropped in the queue or on the worker, but never late and complete."""
    fleet = simulate(
        stream(7, requests=300, per_s=60, ttft_ms=(400, 400, 400), total_ms=(0, 3_000, 0)),
        workers=1,
    )
    r = fleet.records
    counts = [list(r.outcome).count(outcome) for outcome in Outcome]
    assert counts[Outcome.LATE] + counts[Outcome.REFUSED] > 50
    assert counts[Outcome.COMPLETE] > 20
    step_ms = 120
    for n in range(len(r)):
        if r.outcome[n] == Outcome.COMPLETE:
            assert r.ttft_ms[n] <= 400 + step_ms
            assert r.band[n] != Band.STANDARD or r.end_ms[n] - r.arrived_ms[n] <= 3_000 + step_ms


def test_what_fits_no_worker_is_said_at_once() -> None:
    shape = Shape(Lengths(SMALL.kv_tokens), Lengths(10))
    loop = ClosedLoop(Mix(), shape, clients=1, until_ms=3_000, seed=0)
    fleet = simulate(loop, cost=SMALL)
    assert set(fleet.records.outcome) == {Outcome.TOO_LONG}
    assert len(fleet.records) == 3, "its client takes a second before it tries again"


def test_closed_loops_send_one_after_the_other() -> None:
    """Two clients of each of two tenants: never more than four requests at a time."""
    tenants = (SimTenant("a"), SimTenant("b"))
    shape = Shape(Lengths(50), Lengths(20))
    loop = ClosedLoop(Mix(tenants), shape, clients=2, until_ms=5_000, think_ms=100, seed=1)
    fleet = simulate(Together([loop]), workers=1)
    r = fleet.records
    edges = sorted([(at, 1) for at in r.arrived_ms] + [(at, -1) for at in r.end_ms])
    alive = peak = 0
    for _, change in edges:
        alive += change
        peak = max(peak, alive)
    assert peak == 4
    assert len(r) > 30


def test_tenants_of_weight_four_and_one_share_a_full_fleet_accordingly() -> None:
    """Both wait all the time, behind two gateways, one of which has all of the heavy one's jobs."""
    tenants = (SimTenant("light"), SimTenant("heavy", weight=4))
    shape = Shape(Lengths(100, 0.5, 400), Lengths(30, 0.5, 100))
    loop = ClosedLoop(
        Mix(tenants, gateways=2), shape, clients=60, until_ms=40_000, think_ms=1, seed=2
    )
    gateway = GatewayConfig(refuses=False)
    fleet = simulate(loop, workers=1, cost=SMALL, gateway=gateway, check=False)
    busy = fleet.service.busy_buckets("light") & fleet.service.busy_buckets("heavy")
    served = [
        sum(fleet.service.served(tenant, bucket) for bucket in busy if bucket >= 5)
        for tenant in ("light", "heavy")
    ]
    assert len(busy) > 20
    assert served[0] == pytest.approx(served[1], rel=0.1), "service per weight"


def test_reports_reach_the_dispatcher_and_tell_it_where_prefixes_are() -> None:
    fleet = simulate(stream(8, requests=150), check=False)
    policy = fleet.policy
    assert len(policy.index) > 0
    assert policy.workload.prefill_per_s > 0
    assert policy.throughput.work_per_s > 0
    hits = summarize(fleet, Slo()).hit_ratio
    assert hits > 0.3
    slow = simulate(stream(8, requests=150), check=False, cost=replace(ROOMY, step_ms=50.0))
    assert summarize(slow, Slo()).bands["standard"].itl_ms["p50"] > 50
