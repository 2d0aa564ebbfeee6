"""The dispatcher's whole policy, driven as the dispatcher and the simulator drive it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import pytest

from headrace.types import (
    BLOCK_KEY_BYTES,
    BLOCK_TOKENS,
    Band,
    BlockSnapshot,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    Progress,
    Sampling,
    pack_tokens,
)
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy
from headrace_gateway.policy.fair_queue import Queued
from headrace_gateway.policy.workload import WorkerFacts

NOW = 1_700_000_000_000


def a_job(
    name: str,
    *,
    band: Band = Band.STANDARD,
    tenant: str = "t",
    weight: float = 1.0,
    prompt: int = 64,
    tokens: int = 32,
    prefix: str = "",
    ttft_by_ms: int = 0,
    gateway: str = "g",
) -> Job:
    keys = [
        hashlib.sha256(f"{prefix or name}{at}".encode()).digest()[:BLOCK_KEY_BYTES]
        for at in range(prompt // BLOCK_TOKENS)
    ]
    return Job(
        id=name,
        model="m",
        tenant=tenant,
        band=band,
        arrived_ms=NOW,
        gateway=gateway,
        prompt=pack_tokens(range(prompt)),
        sampling=Sampling(max_tokens=tokens),
        affinity=(prefix or name).encode(),
        weight=weight,
        ttft_by_ms=ttft_by_ms,
        blocks=b"".join(keys),
    )


def queued(job: Job, **facts: str) -> Queued:
    return Queued(job, "intake", "1-0", NOW * 1_000_000, **facts)


def a_policy(workers: int = 2, *, max_jobs: int = 4, kv_tokens: int = 16_000) -> DispatchPolicy:
    policy = DispatchPolicy()
    policy.set_workers([WorkerFacts(f"w{i}", kv_tokens, max_jobs) for i in range(workers)], NOW)
    return policy


def go(policy: DispatchPolicy, now_ms: int = NOW) -> Decision | None:
    decision = policy.next(now_ms)
    if decision is not None:
        policy.handed_off(decision, now_ms)
    return decision


def gone(policy: DispatchPolicy, now_ms: int = NOW) -> list[Decision]:
    """Everything that can go now."""
    found = []
    while (decision := go(policy, now_ms)) is not None:
        found.append(decision)
    return found


def ended(worker: str, job: Job, output: int = 32) -> JobDone:
    return JobDone(worker, JobProgress(job.id, len(job.prompt), 0, output), FinishReason.LENGTH)


def failed(worker: str, job: Job, computed: int) -> JobDone:
    return JobDone(worker, JobProgress(job.id, computed, 0, 0), FinishReason.ERROR)


def test_jobs_that_a_worker_refuses_do_not_take_it_out() -> None:
    """Whoever sends jobs that no worker can take harms nobody else; failed computing is another
    matter."""
    policy = a_policy(workers=1, max_jobs=8)
    for number in range(8):
        policy.push(queued(a_job(f"j{number}")))
    sent = [decision.item.job for decision in gone(policy)]
    for job in sent[:4]:
        policy.done(failed("w0", job, computed=0), NOW)
    assert policy.breakers.allows("w0", NOW)
    for job in sent[4:]:
        policy.done(failed("w0", job, computed=16), NOW)
    assert not policy.breakers.allows("w0", NOW)


def test_jobs_fill_the_fleet_and_the_rest_waits() -> None:
    policy = a_policy(workers=2, max_jobs=4)
    for number in range(20):
        assert policy.push(queued(a_job(f"j{number}")))
    sent = gone(policy)
    assert len(sent) == 8
    assert policy.queue.counts == (0, 12, 0)
    policy.done(ended(sent[0].route.worker, sent[0].item.job), NOW)
    assert go(policy) is not None
    assert go(policy) is None
    policy.check_integrity()


def test_an_interactive_job_goes_where_only_lower_bands_are_in_its_way() -> None:
    """The engine preempts; a job of the same band waits."""
    policy = a_policy(workers=1, max_jobs=4)
    for number in range(6):
        policy.push(queued(a_job(f"b{number}", band=Band.BATCH)))
    assert len(gone(policy)) == 4
    policy.push(queued(a_job("s", band=Band.STANDARD)))
    policy.push(queued(a_job("i", band=Band.INTERACTIVE)))
    assert [decision.item.job.id for decision in gone(policy)] == ["i"]
    # half of the standard job's time is over: now batch work gives way to it too
    decision = policy.next(NOW + 2_500)
    assert decision is not None and decision.item.job.id == "s"
    policy.handed_off(decision, NOW + 2_500)
    assert policy.queue.counts == (0, 0, 2)


def test_a_refused_hand_off_waits_again_and_costs_its_tenant_nothing() -> None:
    policy = a_policy(workers=1)
    policy.push(queued(a_job("j")))
    before = policy.queue.counters.value("t", Band.STANDARD)
    decision = go(policy)
    assert decision is not None
    assert policy.queue.counters.value("t", Band.STANDARD) > before
    policy.refused(decision, again=True)
    assert policy.queue.counters.value("t", Band.STANDARD) == before
    assert "j" in policy.queue
    policy.check_integrity()
    decision = go(policy)
    assert decision is not None
    policy.refused(decision, again=False)
    assert len(policy.queue) == 0 and policy.workload.reserved_tokens("w0") == 0


def test_a_prefix_that_a_worker_reported_is_found_again_and_forgotten_with_it() -> None:
    policy = a_policy(workers=4)
    one = a_job("one", prompt=640, prefix="p")
    policy.progress(Progress("w2", 1, stored=one.blocks), NOW)
    policy.push(queued(one))
    decision = go(policy)
    assert decision is not None
    assert decision.route.worker == "w2"
    assert decision.uncached_tokens == 1, "the last token is always computed"
    policy.done(ended("w2", one), NOW)
    policy.progress(Progress("w2", 2, removed=one.blocks), NOW)
    two = a_job("two", prompt=640, prefix="p")
    policy.push(queued(two))
    decision = go(policy, NOW + 3_600_000)
    assert decision is not None
    assert decision.uncached_tokens == 640
    policy.check_integrity()


def test_a_snapshot_replaces_what_was_believed() -> None:
    policy = a_policy(workers=2)
    held, lost = a_job("held", prompt=320), a_job("lost", prompt=320)
    policy.progress(Progress("w1", 1, stored=lost.blocks), NOW)
    policy.snapshot("w1", BlockSnapshot(5, held.blocks))
    assert policy.index.match(held.blocks) == {"w1": 20}
    assert policy.index.match(lost.blocks) == {}


def test_tenants_pay_for_output_as_it_appears() -> None:
    """The one whose jobs run long is behind, although both were sent equally many."""
    policy = a_policy(workers=1, max_jobs=2)
    for number in range(4):
        policy.push(queued(a_job(f"a{number}", tenant="a")))
        policy.push(queued(a_job(f"b{number}", tenant="b")))
    first = gone(policy)
    assert sorted(decision.item.job.tenant for decision in first) == ["a", "b"]
    names = {decision.item.job.tenant: decision.item.job for decision in first}
    jobs = (JobProgress(names["a"].id, 64, 0, 500), JobProgress(names["b"].id, 64, 0, 5))
    policy.progress(Progress("w0", 1, jobs, output_tokens=505), NOW)
    for job in names.values():
        output = 500 if job.tenant == "a" else 5
        policy.done(JobDone("w0", JobProgress(job.id, 64, 0, output), FinishReason.STOP), NOW)
    assert [d.item.job.tenant for d in gone(policy)] == ["b", "b"]
    counters = policy.queue.counters
    assert counters.value("a", Band.STANDARD) > counters.value("b", Band.STANDARD)


def test_a_rescued_job_is_not_paid_twice() -> None:
    policy = a_policy(workers=1)
    policy.push(queued(a_job("j")))
    decision = go(policy)
    assert decision is not None
    paid = policy.queue.counters.value("t", Band.STANDARD)
    policy.set_workers([WorkerFacts("w9", 16_000, 4)], NOW)
    policy.push(queued(a_job("j"), rescued_from="w0"))
    assert go(policy) is not None
    assert policy.queue.counters.value("t", Band.STANDARD) <= paid + 1, "a hand-off is never free"


def test_a_worker_that_makes_no_progress_is_left_out() -> None:
    policy = a_policy(workers=2, max_jobs=100)
    policy.push(queued(a_job("first")))
    stuck = go(policy)
    assert stuck is not None
    later = NOW + 60_000
    other = "w1" if stuck.route.worker == "w0" else "w0"
    for number in range(6):
        policy.push(queued(a_job(f"j{number}")))
    sent = gone(policy, later)
    # at most one goes to the silent one: the probe that finds out whether it still works
    assert sum(decision.route.worker != other for decision in sent) <= 1
    policy.check_integrity()


def test_expired_jobs_are_named_and_nothing_else() -> None:
    policy = a_policy(workers=1, max_jobs=1)
    policy.push(queued(a_job("runs")))
    gone(policy)
    policy.push(queued(a_job("late", ttft_by_ms=NOW + 100, band=Band.INTERACTIVE, prompt=20_000)))
    policy.push(queued(a_job("patient")))
    assert policy.late(NOW + 99) == []
    assert [item.job.id for item in policy.late(NOW + 100)] == ["late"]


def test_places_go_to_the_gateway_that_asked_and_count_over_all() -> None:
    policy = a_policy(workers=1, max_jobs=1)
    policy.push(queued(a_job("runs")))
    gone(policy)
    for number in range(6):
        policy.push(queued(a_job(f"j{number}", gateway=f"g{number % 2}", tenant=f"t{number}")))
    places = policy.places(4, NOW)
    assert set(places) == {"g0", "g1"}
    assert sorted(place for each in places.values() for place, _ in each.values()) == [1, 2, 3, 4]


def test_a_new_term_books_what_it_finds_on_workers() -> None:
    policy = a_policy(workers=1, max_jobs=2)
    found = a_job("found")
    policy.adopt("w0", found, NOW)
    policy.adopt("w0", found, NOW)
    policy.push(queued(a_job("one")))
    policy.push(queued(a_job("two")))
    assert len(gone(policy)) == 1
    policy.done(ended("w0", found), NOW)
    assert len(gone(policy)) == 1


def test_what_runs_on_a_draining_worker_is_charged_to_its_end() -> None:
    """A worker that takes no new jobs still makes output of those it has; when the last has ended,
    or it is gone, nothing of it is left."""
    policy = a_policy(workers=2, max_jobs=1)
    for number in range(2):
        policy.push(queued(a_job(f"j{number}", tenant=f"t{number}")))
    by_worker = {decision.route.worker: decision.item.job for decision in gone(policy)}
    counters, staying = policy.queue.counters, WorkerFacts("w1", 16_000, 1)
    leaving, paid = by_worker["w0"], counters.value(by_worker["w0"].tenant, Band.STANDARD)
    policy.set_workers([staying], NOW, draining=["w0"])
    policy.push(queued(a_job("waits")))
    assert go(policy) is None, "the draining worker gets no more"
    policy.progress(Progress("w0", 1, (JobProgress(leaving.id, 64, 0, 10),), output_tokens=10), NOW)
    assert counters.value(leaving.tenant, Band.STANDARD) == paid + 2 * 10
    policy.set_workers([staying], NOW, draining=["w0"])
    policy.done(ended("w0", leaving), NOW)
    assert counters.value(leaving.tenant, Band.STANDARD) == paid + 2 * 32
    assert list(policy.workload.workers) == ["w1"]
    assert set(policy.index.bits) <= {"w1"}, "its blocks serve nobody"
    policy.check_integrity()


def test_a_draining_worker_that_vanishes_is_forgotten() -> None:
    policy = a_policy(workers=1)
    policy.push(queued(a_job("j")))
    gone(policy)
    policy.set_workers([], NOW, draining=["w0"])
    assert list(policy.workload.jobs_on("w0")) == ["j"]
    policy.set_workers([], NOW)
    assert not policy.workload.workers
    policy.check_integrity()


@dataclass
class Machine:
    """A fleet of the simplest kind, to drive random programs: every job makes a token a round."""

    policy: DispatchPolicy
    running: dict[str, tuple[str, Job, int]] = field(default_factory=dict)
    sequence: dict[str, int] = field(default_factory=dict)

    def round(self, now_ms: int) -> None:
        for decision in gone(self.policy, now_ms):
            job = decision.item.job
            assert job.id not in self.running, "sent twice"
            self.running[job.id] = (decision.route.worker, job, 0)
        by_worker: dict[str, list[JobProgress]] = {}
        for job_id, (worker, job, made) in list(self.running.items()):
            self.running[job_id] = (worker, job, made + 1)
            by_worker.setdefault(worker, []).append(
                JobProgress(job_id, len(job.prompt), 0, made + 1)
            )
        for worker, jobs in by_worker.items():
            self.sequence[worker] = self.sequence.get(worker, 0) + 1
            report = Progress(worker, self.sequence[worker], tuple(jobs), output_tokens=len(jobs))
            self.policy.progress(report, now_ms)
        for job_id, (worker, job, made) in list(self.running.items()):
            if made >= job.sampling.max_tokens:
                del self.running[job_id]
                self.policy.done(ended(worker, job, made), now_ms)


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_lose_nothing_and_end(seed: int) -> None:
    """Pushes, cancels, refusals, workers that come and go: each job ends once, sums return to 0."""
    dice = random.Random(seed)
    policy = DispatchPolicy()
    machine = Machine(policy)
    alive = ["w0", "w1"]
    open_jobs: set[str] = set()
    made, now = 0, NOW

    def announce() -> None:
        policy.set_workers([WorkerFacts(w, 4_000, 3) for w in alive], now)

    announce()
    for step in range(300):
        now += 100
        for _ in range(dice.randrange(3) if step < 200 else 0):
            made += 1
            job = a_job(
                f"j{made}",
                band=dice.choice(list(Band)),
                tenant=f"t{dice.randrange(4)}",
                prompt=dice.choice([16, 64, 512]),
                tokens=dice.choice([1, 5, 20]),
                prefix=dice.choice(["", "p", "q"]),
            )
            policy.push(queued(job))
            open_jobs.add(job.id)
        if dice.random() < 0.1 and open_jobs:
            name = dice.choice(sorted(open_jobs))
            policy.cancel(name)
        if dice.random() < 0.1 and (decision := go(policy, now)) is not None:
            policy.refused(decision, again=True)
        if dice.random() < 0.05:
            lost = alive.pop(0)
            alive.append(f"w{step + 2}")
            announce()
            for worker, job, _ in [r for r in machine.running.values() if r[0] == lost]:
                del machine.running[job.id]
                policy.push(queued(job, rescued_from=worker))
        machine.round(now)
        policy.check_integrity()
    for _ in range(5_000):
        if not len(policy.queue) and not machine.running:
            break
        now += 100
        machine.round(now)
    assert not machine.running and len(policy.queue) == 0
    assert all(policy.workload.reserved_tokens(worker) == 0 for worker in alive)


def a_busy_story(running_max: int, *, explains: bool) -> tuple[list[tuple[str, str, str]], int]:
    """Who went where and why in a fleet that is nearly always full and knows its speeds; and how
    many were scored."""
    dice, policy = random.Random(5), DispatchPolicy(explains=explains)
    policy.set_workers([WorkerFacts(f"w{i}", 16_000, 3) for i in range(12)], NOW)
    running: list[tuple[str, Job]] = []
    told, scored = [], 0
    for number in range(600):
        now_ms = NOW + 20 * number
        band, prefix = Band(dice.choice((0, 1, 1, 2))), f"p{dice.randrange(4)}"
        policy.push(queued(a_job(f"j{number}", band=band, prefix=prefix)))
        if number % 40 == 39:
            for worker in policy.workload.open_workers:
                report = Progress(worker, 1, (), busy_ms=600, prefill_tokens=300)
                policy.progress(report, now_ms)
        while (decision := go(policy, now_ms)) is not None:
            route, job = decision.route, decision.item.job
            running.append((route.worker, job))
            told.append((job.id, route.worker, route.reason))
            scored += len(route.scores)
        if len(running) > running_max:
            policy.done(ended(*running.pop(dice.randrange(len(running)))), now_ms)
    policy.check_integrity()
    return told, scored


@pytest.mark.parametrize("running_max", [34, 35])
def test_nobody_goes_elsewhere_because_scores_are_not_read(running_max: int) -> None:
    """The same jobs go to the same workers for the same reasons; some of those who cannot win are
    left out."""
    told, scored = a_busy_story(running_max, explains=True)
    told_alike, scored_of_them = a_busy_story(running_max, explains=False)
    assert told == told_alike and len(told) > 500
    alone = sum(reason == "the only free room" for _, _, reason in told)
    assert alone > 100 or running_max < 35, "many had one worker to go to"
    assert scored_of_them < scored


@pytest.mark.parametrize("seed", range(8))
def test_a_job_that_nobody_waits_before_goes_as_if_it_had_been_queued(seed: int) -> None:
    """Decided on before it is pushed or after: the same worker, the same counters ever after.

    Jobs of several tenants and bands come one by one, and in bursts that have to wait; some end,
    some are refused.
    """
    dice = random.Random(seed)
    queueing, placing = a_policy(max_jobs=3), a_policy(max_jobs=3)
    both = (queueing, placing)
    running: list[tuple[str, Job]] = []
    placed = waited = 0
    for number in range(400):
        now = NOW + number * dice.choice((0, 5, 400))
        job = a_job(
            f"j{number}",
            band=dice.choice(list(Band)),
            tenant=dice.choice("abcd"),
            weight=dice.choice((0.5, 1.0, 4.0)),
            prompt=dice.choice((5, 64, 200)),
            prefix=dice.choice(("", "shared")),
        )
        went: list[Decision] = []
        alone = None if len(placing.queue) else placing.next_alone(queued(job), now)
        if alone is None:
            placing.push(queued(job))
        else:
            placing.placed_alone(alone, now)
            went.append(alone)
            placed += 1
        queueing.push(queued(job))
        went += gone(placing, now)
        assert gone(queueing, now) == went
        waited += not went
        for decision in went:
            if dice.random() < 0.1:
                for policy in both:
                    policy.refused(decision, again=False)
            else:
                running.append((decision.route.worker, decision.item.job))
        while running and dice.random() < 0.55:
            worker, done = running.pop(dice.randrange(len(running)))
            for policy in both:
                policy.done(ended(worker, done), now)
        assert queueing.queue.counters.snapshot() == placing.queue.counters.snapshot()
    assert placed > 50 and waited > 5, (placed, waited)
    for policy in both:
        policy.check_integrity()
