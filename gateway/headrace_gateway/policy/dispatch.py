"""Everything a model's dispatcher decides, as one pure object: who is next, who gets it, who pays.

Invariant: the dispatcher and the simulator drive this very object with the same calls, so what one
shows holds for the other. A decision is carried out in three steps: `next` looks, `handed_off`
books it, and `refused` takes the booking back when Redis knew better. Nothing here is the truth
about a job (the streams are), so losing all of it costs order and affinity, never a job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.policy.priority import is_late
from headrace.types import (
    BLOCK_TOKENS,
    Band,
    BlockSnapshot,
    FinishReason,
    Job,
    JobDone,
    JobMoved,
    Positions,
    Progress,
    WorkerRole,
)
from headrace_gateway.policy.breaker import Breakers
from headrace_gateway.policy.fair_queue import BAND_SHARES, FairQueue, Queued
from headrace_gateway.policy.fetching import Fetching
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.policy.outlook import Outlook, Throughput
from headrace_gateway.policy.pairing import (
    ALONE,
    Pairing,
    PairingConfig,
    Pairs,
    PairScore,
    Promise,
    first_part,
)
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.roles import RoleChange, RolePolicy, RolesConfig, SideFacts
from headrace_gateway.policy.route import Route
from headrace_gateway.policy.routing import Allows, Router, RoutingConfig
from headrace_gateway.policy.workload import WorkerFacts, Workload

# asking an enum for a member costs as much as ten look-ups of a name
_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
_ERROR = FinishReason.ERROR
_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """What can be tuned. `shares` are the bands' guaranteed minimum shares of the service."""

    shares: tuple[float, float, float] = BAND_SHARES
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)


class Decision(NamedTuple):
    """`item` goes to `route.worker`, and on from there as `pairing` says. `virtual` is its tenant's
    virtual counter, which the job carries from now on."""

    item: Queued
    route: Route
    virtual: float
    pairing: Pairing = ALONE

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the worker is expected to compute, or fetch in that time."""
        job, route = self.item.job, self.route
        known = len(job.prompt) + len(job.logged)
        return max(1, known - route.cached_blocks * BLOCK_TOKENS - route.spared.tokens)


class _Among(NamedTuple):
    """The breakers, as far as workers of some roles are concerned."""

    breakers: Breakers
    workers: frozenset[str]

    def allows(self, worker: str, now_ms: int) -> bool:
        return worker in self.workers and self.breakers.allows(worker, now_ms)


class DispatchPolicy:
    """One model's queue, workload, prefix index, breakers and what has been learned.

    `workload` is of those that compute prompts, `decoding` of those that only decode.
    """

    def __init__(self, config: DispatchConfig | None = None, *, explains: bool = True) -> None:
        """`explains`: routes are read for their scores, those of who cannot win as well."""
        config = config or DispatchConfig()
        self.lengths = Lengths()
        self.queue = FairQueue(config.shares)
        self.workload = Workload(self.lengths.expect)
        self.decoding = Workload(self.lengths.expect)
        self.pairs = Pairs(self.decoding, config.pairing)
        self.roles = RolePolicy(config.roles)
        self.index = PrefixIndex()
        self.breakers = Breakers(self._running)
        self.throughput = Throughput(config.shares)
        self._explains = explains
        self._router = Router(config.routing, explains=explains)
        self.shared = Fetching()
        self._prefilling: frozenset[str] = frozenset()
        self._single: frozenset[str] = frozenset()

    def set_workers(
        self, facts: Sequence[WorkerFacts], now_ms: int, draining: Collection[str] = ()
    ) -> None:
        """The workers that live and take jobs; what is known of vanished ones is forgotten.

        Those that are `draining` live and take no jobs: what is booked there is kept to its end, so
        that it is charged for. Their blocks are of no use to anybody any more.
        """
        known = {*self.workload.workers, *self.decoding.workers}
        left = known - {each.worker for each in facts}
        decoding = [each for each in facts if each.role is WorkerRole.DECODE]
        if len(decoding) == len(facts):
            decoding = []  # nobody else is left: they compute prompts as well
        self.workload.set_workers([each for each in facts if each not in decoding])
        self.decoding.set_workers(decoding)
        self._prefilling = _of_role(facts, WorkerRole.PREFILL)
        self._single = _of_role(facts, WorkerRole.BOTH)
        for worker in sorted(left):
            if worker in draining:
                for promise in self.pairs.forget(worker):
                    self._stays(promise)
                self.index.forget_worker(worker)
                self.breakers.forget(worker)
            else:
                self.forget(worker)
        for each in facts:
            self.index.limit(each.worker, each.kv_tokens // BLOCK_TOKENS)
        self.throughput.set_workers(len(facts), now_ms)

    def forget(self, worker: str) -> None:
        for promise in self.pairs.forget(worker):
            self._stays(promise)
        self.workload.forget(worker)
        self.decoding.forget(worker)
        self.index.forget_worker(worker)
        self.breakers.forget(worker)

    def _takes_jobs(self, worker: str) -> bool:
        return self.workload.takes_jobs(worker) or self.decoding.takes_jobs(worker)

    def adopt(self, worker: str, job: Job, now_ms: int) -> None:
        """A job was found on `worker` that this object has not sent there."""
        promise = self.pairs.get(job.id)
        if promise is not None and promise.decode == worker:
            # that it moved was not heard of
            self.pairs.end(job.id)
            self.workload.cancel(promise.prefill, job.id)
        here = self.decoding if worker in self.decoding.open_workers else self.workload
        if not (self.workload.booked(worker, job.id) or self.decoding.booked(worker, job.id)):
            here.book(worker, job, len(job.prompt), now_ms, found=True)
            if self._takes_jobs(worker):
                self.breakers.dispatched(worker, now_ms)

    def jobs_on(self, worker: str) -> list[str]:
        """Ids of the jobs that are on `worker`, those left out that are only promised to it."""
        promised = self.pairs.promised_to(worker)
        here = (*self.workload.jobs_on(worker), *self.decoding.jobs_on(worker))
        return [job for job in here if job not in promised]

    def lost(self, worker: str, job_id: str) -> None:
        """A job that was booked on `worker` is not there."""
        self.pairs.end(job_id)
        self.workload.cancel(worker, job_id)
        self.decoding.cancel(worker, job_id)

    def _running(self, worker: str) -> int:
        known = self.workload.bookings.get(worker)
        booked = 0 if known is None else len(known.jobs)
        if self.decoding.workers:
            booked += self.decoding.count_on(worker) - len(self.pairs.promised_to(worker))
        return booked

    def push(self, item: Queued) -> bool:
        self.pairs.end(item.job.id)  # whoever was to go on with it, it begins again
        return self.queue.push(item)

    def cancel(self, job_id: str) -> Queued | None:
        return self.queue.remove(job_id)

    def next(self, now_ms: int) -> Decision | None:
        """The next job that can go somewhere; None when none can now."""
        for item in self.queue.heads():
            job = item.job
            route, pairing = self._way(job, now_ms)
            if route.worker:
                virtual = self.queue.counters.value(job.tenant, job.band)
                return _tuple(Decision, (item, route, virtual, pairing))
        return None

    def next_alone(self, item: Queued, now_ms: int) -> Decision | None:
        """What `next` would say of `item`, pushed while nobody waits; None where it has to wait.

        Nothing is changed: the decision can be carried out before `placed_alone` books it.
        """
        assert not len(self.queue), "whoever waits goes first"
        job = item.job
        route, pairing = self._way(job, now_ms)
        if not route.worker:
            return None
        virtual = self.queue.counters.lifted(job.tenant, job.band)
        return _tuple(Decision, (item, route, virtual, pairing))

    def placed_alone(self, decision: Decision, now_ms: int) -> None:
        """`next_alone` decided so: as if it had been pushed, decided on and handed off."""
        self.push(decision.item)
        self.queue.heads()  # who looks moves on where strangers begin
        self.handed_off(decision, now_ms)

    def _way(self, job: Job, now_ms: int) -> tuple[Route, Pairing]:
        if self._prefilling:
            return self._choose(job, now_ms)
        return self._route(job, self.breakers, now_ms), ALONE

    def _choose(self, job: Job, now_ms: int) -> tuple[Route, Pairing]:
        """One worker, or two, where some only compute prompts."""
        demand = self.workload.demand(job, now_ms)
        decode, load, why = self.pairs.decoder(
            demand, lambda worker: self.breakers.allows(worker, now_ms)
        )
        alone = Pairing(reason=why)
        ways: list[tuple[PairScore, Route]] = []
        if decode:
            among = _Among(self.breakers, self._prefilling)
            route = self._route(first_part(job), among, now_ms)
            if route.worker:
                ways.append((self.pairs.pair_score(job, route, decode, load), route))
        if self._single or not decode:
            among = _Among(self.breakers, self._single if decode else self._all_open)
            route = self._route(job, among, now_ms)
            if route.worker:
                streams = self._running(route.worker)
                ways.append((self.pairs.single_score(job, route, streams), route))
        if not ways:
            return Route("", "no worker has room"), alone
        best, route = min(ways, key=lambda way: way[0])
        scores = tuple(score for score, _ in ways)
        if not best.decode:
            cheaper = "cheaper than a pair" if decode else why
            return route, Pairing("", cheaper, scores)
        return route, Pairing(best.decode, why, scores)

    def _route(self, job: Job, breakers: Allows, now_ms: int) -> Route:
        priced = self._explains or bool(self._prefilling)
        return self._router.choose(
            job, self.workload, self.index, breakers, now_ms, self.shared, priced=priced
        )

    @property
    def _all_open(self) -> frozenset[str]:
        return self._prefilling | self._single

    def handed_off(self, decision: Decision, now_ms: int) -> None:
        """Book `decision`: it leaves the queue, its tenant pays for the prompt."""
        item, uncached = decision.item, decision.uncached_tokens
        job, booked, worker = item.job, item.job, decision.route.worker
        self.queue.take(job.id, _to_pay(item, uncached))
        decode = decision.pairing.decode
        if decode:
            self.pairs.promise(job, worker, decode, now_ms)
            booked = first_part(job)
        self.workload.book(worker, booked, uncached, now_ms)
        self.index.expect(worker, job.blocks, now_ms)
        self.breakers.dispatched(worker, now_ms)
        self.throughput.dispatched(job.band, uncached + job.expected_output)

    def refused(self, decision: Decision, *, again: bool) -> None:
        """The hand-off did not happen; with `again` the job waits on, else it is gone."""
        item, job = decision.item, decision.item.job
        self.pairs.end(job.id)
        self.workload.cancel(decision.route.worker, job.id)
        self.queue.put_back(item, _to_pay(item, decision.uncached_tokens))
        if not again:
            self.queue.remove(job.id)

    def progress(self, report: Progress, now_ms: int) -> None:
        """What a worker said of its running jobs, its blocks and its speed."""
        for told in report.jobs if self._prefilling else ():
            promise = self.pairs.kept(report.worker, told)
            if promise is not None:
                self._stays(promise, now_ms)
        self.queue.charge_all(self.workload.progress(report))
        if self.decoding.workers:
            self.queue.charge_all(self.decoding.progress(report))
        if self._takes_jobs(report.worker):
            self.index.removed(report.worker, report.removed)
            self.index.stored(report.worker, report.stored)
        tokens = report.prefill_tokens + report.output_tokens
        self.breakers.progress(report.worker, now_ms, tokens)
        self.throughput.served(tokens)
        self.shared.note(report.fetched_tokens, report.fetch_ms)

    def _stays(self, promise: Promise, now_ms: int = 0) -> None:
        """Nobody takes a job over: whoever computes its prompt will have all of it."""
        if self.workload.booked(promise.prefill, promise.job.id):
            self.workload.cancel(promise.prefill, promise.job.id)
            self.workload.book(promise.prefill, promise.job, 1, now_ms, found=True)

    def moved(self, moved: JobMoved, now_ms: int) -> None:
        """A job has its first token and goes on elsewhere."""
        promise = self.pairs.moved(moved, now_ms)
        end = JobDone(moved.worker, moved.progress, FinishReason.LENGTH)
        charge = self.workload.done(end)
        self.breakers.succeeded(moved.worker, now_ms)
        if charge is not None:
            self.queue.charge_all((charge,))
        if promise is not None:
            self.breakers.dispatched(moved.to, now_ms)

    def done(self, done: JobDone, now_ms: int) -> None:
        """A job ended on a worker: room is free, its tenant pays, its length is learned."""
        worker, reason = done.worker, done.reason
        job_id, computed, cached, output = done.progress
        promise = self.pairs.get(job_id)
        if promise is not None and promise.prefill == worker:
            self.pairs.end(job_id)
        charge = self.workload.done(done) or self.decoding.done(done)
        self.queue.finished(job_id, output)
        complete = reason in _COMPLETE
        if reason is _ERROR:
            # one that nothing was computed of was refused: its caller's fault, whoever has it
            if computed and self._takes_jobs(worker):
                self.breakers.failed(worker, now_ms)
        elif complete:
            self.breakers.succeeded(worker, now_ms)
        if charge is not None:
            self.queue.charge_all((charge,))
            if complete:
                self.lengths.note(charge.tenant, output, computed + cached, cached)

    def snapshot(self, worker: str, snapshot: BlockSnapshot) -> None:
        """All blocks that `worker` holds."""
        self.index.replace(worker, snapshot.blocks)

    def late(self, now_ms: int) -> list[Queued]:
        """Waiting jobs whose deadline has passed; they stay until they are cancelled."""
        return [item for item in self.queue.late(now_ms) if is_late(item.job, now_ms)]

    def outlook(self, now_ms: int) -> Outlook:
        """What a request that arrives now has to expect."""
        free = any(
            self.workload.has_slot(worker) and self.breakers.allows(worker, now_ms)
            for worker in self.workload.workers
        )
        return self.throughput.outlook(
            self.queue.counts, self.queue.work, self.workload.prefill_per_s, free, now_ms
        )

    def places(self, limit: int, now_ms: int) -> dict[str, Positions]:
        """Place and predicted start of the first `limit` waiting jobs, for each gateway its own."""
        rate = self.throughput.work_per_s
        found: dict[str, Positions] = {}
        for place, (item, ahead) in enumerate(self.queue.order(limit), 1):
            start_ms = int(now_ms + 1000 * ahead / rate) if rate else 0
            found.setdefault(item.job.gateway, {})[item.job.id] = (place, start_ms)
        return found

    def rebalance(self, now_ms: int) -> RoleChange | None:
        """Which worker changes sides now, if one does."""
        if not self._prefilling or not self.decoding.open_workers:
            return None
        facts = [
            SideFacts(
                worker,
                role,
                self._running(worker),
                here.waiting_tokens(worker),
                here.used(worker),
            )
            for role, here, workers in (
                (WorkerRole.PREFILL, self.workload, sorted(self._prefilling)),
                (WorkerRole.DECODE, self.decoding, self.decoding.open_workers),
            )
            for worker in workers
        ]
        queued = sum(self.queue.work) if len(self.queue) else 0
        return self.roles.decide(facts, queued, self.workload.prefill_per_s, now_ms)

    def check_integrity(self) -> None:
        self.queue.check_integrity()
        self.workload.check_integrity()
        self.decoding.check_integrity()
        self.pairs.check_integrity()
        self.index.check_integrity()
        self.shared.check_integrity()


def _of_role(facts: Sequence[WorkerFacts], role: WorkerRole) -> frozenset[str]:
    return frozenset(each.worker for each in facts if each.role is role)


def _to_pay(item: Queued, uncached_tokens: int) -> int:
    """Prompt tokens that the tenant pays for: a job whose worker died has been paid for."""
    return 0 if item.rescued_from else uncached_tokens


def reason_of_lateness(item: Queued, now_ms: int) -> str:
    """What a caller is told whose job expired in the queue."""
    waited_ms = now_ms - item.job.arrived_ms
    band = Band(item.job.band).label
    return f"the deadline passed while the job waited for a worker ({waited_ms} ms, band {band})"
