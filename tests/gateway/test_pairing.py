"""One worker or two for a job: what costs less, what is promised, what becomes of promises."""

from __future__ import annotations

import random
from dataclasses import replace

from gateway.test_dispatch_policy import NOW, a_job, ended, go, gone, queued
from headrace.types import FinishReason, Job, JobDone, JobMoved, JobProgress, Progress, WorkerRole
from headrace_gateway.hops import pairing_attributes
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy
from headrace_gateway.policy.workload import WorkerFacts

ROLES = {"p": WorkerRole.PREFILL, "d": WorkerRole.DECODE, "b": WorkerRole.BOTH}


def a_fleet(*names: str, max_jobs: int = 4, kv_tokens: int = 16_000) -> DispatchPolicy:
    """Workers whose names begin with their role's letter."""
    policy = DispatchPolicy()
    facts = [WorkerFacts(name, kv_tokens, max_jobs, ROLES[name[0]]) for name in names]
    policy.set_workers(facts, NOW)
    return policy


def sent(policy: DispatchPolicy, job: Job) -> Decision:
    policy.push(queued(job))
    decision = go(policy)
    assert decision is not None and decision.item.job.id == job.id
    policy.check_integrity()
    return decision


def moved(decision: Decision, output: int = 1) -> JobMoved:
    job = decision.item.job
    progress = JobProgress(job.id, len(job.prompt), 0, output)
    return JobMoved(decision.route.worker, decision.pairing.decode, progress)


def test_a_job_goes_to_a_pair_and_each_side_is_booked_for_its_part() -> None:
    policy = a_fleet("p0", "d0", "d1")
    first = sent(policy, a_job("one", prompt=640))
    second = sent(policy, a_job("two", prompt=640))
    assert (first.route.worker, second.route.worker) == ("p0", "p0")
    assert {first.pairing.decode, second.pairing.decode} == {"d0", "d1"}, "the one with least to do"
    assert policy.jobs_on("p0") == ["one", "two"]
    assert policy.jobs_on("d0") == policy.jobs_on("d1") == [], "promised, not there yet"
    policy.moved(moved(first), NOW)
    policy.check_integrity()
    assert policy.jobs_on("p0") == ["two"]
    assert policy.jobs_on(first.pairing.decode) == ["one"]
    done = JobProgress("one", 640, 0, 32)
    policy.done(JobDone(first.pairing.decode, done, FinishReason.LENGTH), NOW)
    policy.check_integrity()
    assert policy.jobs_on(first.pairing.decode) == []


def test_tenants_pay_once_for_a_job_that_moves() -> None:
    """The same counters as for a job that stays: prompt and output, each token once."""
    counters = []
    for names in (("b0",), ("p0", "d0")):
        policy = a_fleet(*names)
        decision = sent(policy, a_job("one", prompt=640))
        worker = "b0"
        if decision.pairing.decode:
            policy.moved(moved(decision), NOW)
            worker = decision.pairing.decode
            told = (JobProgress("one", 640, 0, 20),)
            policy.progress(Progress(worker, 1, told, busy_ms=10, output_tokens=19), NOW)
        policy.done(JobDone(worker, JobProgress("one", 640, 0, 32), FinishReason.LENGTH), NOW)
        counters.append(policy.queue.counters.snapshot())
    assert counters[0] == counters[1]


def test_short_prompts_go_to_one_worker_and_long_ones_to_a_pair_when_others_stream_there() -> None:
    policy = a_fleet("p0", "d0", "b0", max_jobs=16)
    idle = sent(policy, a_job("idle", prompt=320))
    assert (idle.route.worker, idle.pairing.decode) == ("b0", ""), "nobody would wait for it"
    sent(policy, a_job("more", prompt=16))
    long = sent(policy, a_job("long", prompt=3_200))
    assert (long.route.worker, long.pairing.decode) == ("p0", "d0")
    short = sent(policy, a_job("short", prompt=4))
    assert (short.route.worker, short.pairing.decode) == ("b0", ""), "not worth the step"
    told = pairing_attributes(long.pairing)
    assert told["headrace.pair.decode_worker"] == "d0"
    assert any("streams wait" in words for words in told["headrace.pair.scores"])
    assert any("transfer 64" in words for words in told["headrace.pair.scores"])


def test_where_nobody_can_decode_the_worker_of_the_prompt_does() -> None:
    policy = a_fleet("p0", "d0", max_jobs=1)
    first = sent(policy, a_job("one", prompt=64))
    assert first.pairing.decode == "d0"
    policy.moved(moved(first), NOW)
    second = sent(policy, a_job("two", prompt=64))
    assert (second.route.worker, second.pairing.decode) == ("p0", "")
    assert second.pairing.reason == "no decoding worker has room"
    alone = sent(a_fleet("p0"), a_job("three"))
    assert (alone.pairing.decode, alone.pairing.reason) == ("", "no worker only decodes")


def test_workers_that_only_decode_do_all_of_it_when_they_are_left_alone() -> None:
    """The last worker of prompts may die: jobs go on, and it is as before when one is back."""
    policy = a_fleet("p0", "d0")
    first = sent(policy, a_job("one", prompt=64))
    policy.moved(moved(first), NOW)
    facts = [WorkerFacts("d0", 16_000, 4, WorkerRole.DECODE)]
    policy.set_workers(facts, NOW)
    second = sent(policy, a_job("two", prompt=64))
    assert (second.route.worker, second.pairing.decode) == ("d0", "")
    assert sorted(policy.jobs_on("d0")) == ["one", "two"]
    policy.set_workers([WorkerFacts("p1", 16_000, 4, WorkerRole.PREFILL), *facts], NOW)
    policy.check_integrity()
    assert sorted(policy.jobs_on("d0")) == ["one", "two"], "what it has it keeps"
    third = sent(policy, a_job("three", prompt=64))
    assert (third.route.worker, third.pairing.decode) == ("p1", "d0")
    for decision in (first, second):
        policy.done(ended("d0", decision.item.job), NOW)
    policy.check_integrity()
    assert policy.jobs_on("d0") == []


def test_a_job_that_stays_is_seen_by_its_output() -> None:
    """Nobody says that a move was refused: what its first worker reports does."""
    policy = a_fleet("p0", "d0")
    decision = sent(policy, a_job("one", prompt=64))
    told = (JobProgress("one", 64, 0, 3),)
    policy.progress(Progress("p0", 1, told, busy_ms=10, output_tokens=3), NOW)
    policy.check_integrity()
    assert policy.decoding.count_on("d0") == 0
    assert policy.jobs_on("p0") == ["one"]
    policy.done(ended("p0", decision.item.job), NOW)
    policy.check_integrity()
    assert policy.jobs_on("p0") == []


def test_either_side_may_go() -> None:
    policy = a_fleet("p0", "d0", "d1")
    decision = sent(policy, a_job("one", prompt=64))
    policy.forget(decision.pairing.decode)
    policy.check_integrity()
    assert policy.jobs_on("p0") == ["one"], "it stays where it is"
    again = sent(a_fleet("p0", "d0"), a_job("two", prompt=64))
    policy = a_fleet("p0", "p1", "d0")
    decision = sent(policy, again.item.job)
    policy.forget(decision.route.worker)
    assert policy.decoding.count_on("d0") == 0, "nothing is promised any more"
    policy.push(queued(replace(decision.item.job, attempt=2), rescued_from="p0"))
    assert [each.item.job.attempt for each in gone(policy)] == [2]
    policy.check_integrity()


def test_a_move_that_was_not_heard_of_is_found_in_the_stream() -> None:
    policy = a_fleet("p0", "d0")
    decision = sent(policy, a_job("one", prompt=64))
    policy.adopt("d0", replace(decision.item.job, attempt=2), NOW)
    policy.check_integrity()
    assert (policy.jobs_on("p0"), policy.jobs_on("d0")) == ([], ["one"])
    policy.moved(moved(decision), NOW)  # late, and of no use
    policy.check_integrity()
    assert (policy.jobs_on("p0"), policy.jobs_on("d0")) == ([], ["one"])


def test_a_worker_that_changes_sides_keeps_what_it_has() -> None:
    policy = a_fleet("p0", "d0", "d1")
    decision = sent(policy, a_job("one", prompt=64))
    policy.moved(moved(decision), NOW)
    other = decision.pairing.decode
    facts = [
        WorkerFacts("p0", 16_000, 4, WorkerRole.PREFILL),
        WorkerFacts("d0", 16_000, 4, WorkerRole.DECODE),
        WorkerFacts("d1", 16_000, 4, WorkerRole.DECODE),
    ]
    changed = [
        replace(each, role=WorkerRole.PREFILL) if each.worker == other else each for each in facts
    ]
    policy.set_workers(changed, NOW)
    assert policy.jobs_on(other) == ["one"]
    policy.done(ended(other, decision.item.job), NOW)
    assert policy.jobs_on(other) == []
    policy.check_integrity()


def test_whatever_happens_bookings_and_promises_agree() -> None:
    """A random walk over everything that can be heard of a job."""
    rng = random.Random(7)
    policy = a_fleet("p0", "p1", "d0", "d1", "b0", max_jobs=3)
    live: dict[str, Decision] = {}
    at: dict[str, str] = {}
    for step in range(600):
        now = NOW + step
        name = f"j{step}"
        policy.push(queued(a_job(name, prompt=rng.choice([16, 160, 1_600]))))
        while (decision := go(policy, now)) is not None:
            live[decision.item.job.id], at[decision.item.job.id] = decision, decision.route.worker
        for job, decision in rng.sample(sorted(live.items()), k=min(3, len(live))):
            match rng.randrange(5):
                case 0 if decision.pairing.decode and at[job] == decision.route.worker:
                    policy.moved(moved(decision), now)
                    at[job] = decision.pairing.decode
                case 1:
                    told = (JobProgress(job, 16, 0, 2),)
                    policy.progress(Progress(at[job], step, told, busy_ms=5), now)
                    if at[job] == decision.route.worker:
                        live[job] = decision._replace(pairing=decision.pairing._replace(decode=""))
                case 2:
                    policy.refused(decision, again=False)
                    policy.lost(at[job], job)
                    del live[job]
                case _:
                    policy.done(ended(at[job], decision.item.job), now)
                    del live[job]
        policy.check_integrity()
    for job, decision in live.items():
        policy.done(ended(at[job], decision.item.job), NOW)
    while policy.next(NOW) is not None:
        decision = go(policy)
        assert decision is not None
        policy.done(ended(decision.route.worker, decision.item.job), NOW)
    for worker in ("p0", "p1", "d0", "d1", "b0"):
        assert policy.jobs_on(worker) == []
    policy.check_integrity()
