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
    Positions,
    Progress,
)
from headrace_gateway.policy.breaker import Breakers
from headrace_gateway.policy.fair_queue import BAND_SHARES, FairQueue, Queued
from headrace_gateway.policy.fetching import Fetching
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.policy.outlook import Outlook, Throughput
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.routing import Route, Router, RoutingConfig
from headrace_gateway.policy.workload import WorkerFacts, Workload

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """What can be tuned. `shares` are the bands' guaranteed minimum shares of the service."""

    shares: tuple[float, float, float] = BAND_SHARES
    routing: RoutingConfig = field(default_factory=RoutingConfig)


class Decision(NamedTuple):
    """`item` goes to `route.worker`. `virtual` is its tenant's virtual counter, which the job
    carries from now on."""

    item: Queued
    route: Route
    virtual: float

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the worker is expected to compute, or fetch in that time."""
        job, route = self.item.job, self.route
        known = len(job.prompt) + len(job.logged)
        return max(1, known - route.cached_blocks * BLOCK_TOKENS - route.spared.tokens)


class DispatchPolicy:
    """One model's queue, workload, prefix index, breakers and what has been learned."""

    def __init__(self, config: DispatchConfig | None = None) -> None:
        config = config or DispatchConfig()
        self.lengths = Lengths()
        self.queue = FairQueue(config.shares)
        self.workload = Workload(self.lengths.expect)
        self.index = PrefixIndex()
        self.breakers = Breakers(self.workload.count_on)
        self.throughput = Throughput(config.shares)
        self._router = Router(config.routing)
        self.shared = Fetching()

    def set_workers(
        self, facts: Sequence[WorkerFacts], now_ms: int, draining: Collection[str] = ()
    ) -> None:
        """The workers that live and take jobs; what is known of vanished ones is forgotten.

        Those that are `draining` live and take no jobs: what is booked there is kept to its end, so
        that it is charged for. Their blocks are of no use to anybody any more.
        """
        left = set(self.workload.workers) - {each.worker for each in facts}
        self.workload.set_workers(facts)
        for worker in sorted(left):
            if worker in draining:
                self.index.forget_worker(worker)
                self.breakers.forget(worker)
            else:
                self.forget(worker)
        for each in facts:
            self.index.limit(each.worker, each.kv_tokens // BLOCK_TOKENS)
        self.throughput.set_workers(len(facts), now_ms)

    def forget(self, worker: str) -> None:
        self.workload.forget(worker)
        self.index.forget_worker(worker)
        self.breakers.forget(worker)

    def adopt(self, worker: str, job: Job, now_ms: int) -> None:
        """A job was found on `worker` that this object has not sent there."""
        if not self.workload.booked(worker, job.id):
            self.workload.book(worker, job, len(job.prompt), now_ms, found=True)
            if self.workload.takes_jobs(worker):
                self.breakers.dispatched(worker, now_ms)

    def push(self, item: Queued) -> bool:
        return self.queue.push(item)

    def cancel(self, job_id: str) -> Queued | None:
        return self.queue.remove(job_id)

    def next(self, now_ms: int) -> Decision | None:
        """The next job that can go somewhere; None when none can now."""
        for item in self.queue.heads():
            route = self._router.choose(
                item.job, self.workload, self.index, self.breakers, now_ms, self.shared
            )
            if route.worker:
                job = item.job
                return Decision(item, route, self.queue.counters.value(job.tenant, job.band))
        return None

    def handed_off(self, decision: Decision, now_ms: int) -> None:
        """Book `decision`: it leaves the queue, its tenant pays for the prompt."""
        item, worker, uncached = decision.item, decision.route.worker, decision.uncached_tokens
        job = item.job
        self.queue.take(job.id, _to_pay(item, uncached))
        self.workload.book(worker, job, uncached, now_ms)
        self.index.expect(worker, job.blocks, now_ms)
        self.breakers.dispatched(worker, now_ms)
        self.throughput.dispatched(job.band, uncached + job.expected_output)

    def refused(self, decision: Decision, *, again: bool) -> None:
        """The hand-off did not happen; with `again` the job waits on, else it is gone."""
        item, job = decision.item, decision.item.job
        self.workload.cancel(decision.route.worker, job.id)
        self.queue.put_back(item, _to_pay(item, decision.uncached_tokens))
        if not again:
            self.queue.remove(job.id)

    def progress(self, report: Progress, now_ms: int) -> None:
        """What a worker said of its running jobs, its blocks and its speed."""
        self.queue.charge_all(self.workload.progress(report))
        if self.workload.takes_jobs(report.worker):
            self.index.removed(report.worker, report.removed)
            self.index.stored(report.worker, report.stored)
        tokens = report.prefill_tokens + report.output_tokens
        self.breakers.progress(report.worker, now_ms, tokens)
        self.throughput.served(tokens)
        self.shared.note(report.fetched_tokens, report.fetch_ms)

    def done(self, done: JobDone, now_ms: int) -> None:
        """A job ended on a worker: room is free, its tenant pays, its length is learned."""
        charge = self.workload.done(done)
        p = done.progress
        self.queue.finished(p.job, p.output)
        complete = done.reason in _COMPLETE
        if done.reason is FinishReason.ERROR:
            # one that nothing was computed of was refused: its caller's fault, whoever has it
            if p.computed and self.workload.takes_jobs(done.worker):
                self.breakers.failed(done.worker, now_ms)
        elif complete:
            self.breakers.succeeded(done.worker, now_ms)
        if charge is not None:
            self.queue.charge_all((charge,))
            if complete:
                self.lengths.note(charge.tenant, p.output, p.computed + p.cached, p.cached)

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

    def check_integrity(self) -> None:
        self.queue.check_integrity()
        self.workload.check_integrity()
        self.index.check_integrity()
        self.shared.check_integrity()


def _to_pay(item: Queued, uncached_tokens: int) -> int:
    """Prompt tokens that the tenant pays for: a job whose worker died has been paid for."""
    return 0 if item.rescued_from else uncached_tokens


def reason_of_lateness(item: Queued, now_ms: int) -> str:
    """What a caller is told whose job expired in the queue."""
    waited_ms = now_ms - item.job.arrived_ms
    band = Band(item.job.band).label
    return f"the deadline passed while the job waited for a worker ({waited_ms} ms, band {band})"
