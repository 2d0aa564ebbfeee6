"""Keeps the dispatcher's policy in step with Redis: workers, what runs on them, blocks, counters.

Invariant: everything here repairs. Reports and finish events carry the news; what they missed (a
new term, a lost event, a report that was skipped) is read from where it is stored.
"""

from __future__ import annotations

from typing import Any

import structlog
from redis.asyncio import Redis

from headrace import keys, wire, wire_reports
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.streams import as_bytes, read_range
from headrace.types import Job
from headrace_gateway.policy.dispatch import DispatchPolicy
from headrace_gateway.roster import Roster

log = structlog.get_logger()

DISAGREEMENTS_MAX = 8
"""Refreshes in a row at which Redis and we count another number of jobs on a worker."""


class FleetWatch:
    """One term's repairs."""

    def __init__(
        self, redis: Redis, model: str, policy: DispatchPolicy, roster: Roster, clock: Clock
    ) -> None:
        self._redis = redis
        self._model = model
        self._policy = policy
        self._roster = roster
        self._clock = clock
        self._known: set[str] = set()
        self._closed: set[str] = set()
        """Those that live and take nothing new."""
        self._reports: dict[str, int] = {}
        self._snapshots_wanted: dict[str, None] = {}
        self._disagreements: dict[str, int] = {}
        self._saved: dict[str, float] = {}

    async def restore_counters(self) -> None:
        """What tenants have had, as the last term left it."""
        raw = await self._redis.hgetall(keys.service(self._model))
        counters = {}
        for tenant, value in raw.items():
            try:
                counters[as_bytes(tenant).decode()] = float(value)
            except ValueError:
                log.warning("a tenant's counter is unreadable", model=self._model)
        self._policy.queue.counters.restore(counters)
        self._saved = counters

    def save_counters(self, pipe: Any) -> None:
        """Add what has changed to `pipe`."""
        counters = self._policy.queue.counters.snapshot()
        changed = {t: v for t, v in counters.items() if self._saved.get(t) != v}
        dropped = [tenant for tenant in self._saved if tenant not in counters]
        name = keys.service(self._model)
        if changed:
            pipe.hset(name, mapping={tenant: repr(value) for tenant, value in changed.items()})
            pipe.pexpire(name, keys.SERVICE_TTL_MS)
        if dropped:
            pipe.hdel(name, *dropped)
        self._saved = counters

    def note_report(self, worker: str, sequence: int) -> None:
        """A gap in a worker's reports means that blocks came and went unseen."""
        last = self._reports.get(worker)
        self._reports[worker] = sequence
        if last is not None and sequence != last + 1:
            self._snapshots_wanted[worker] = None

    async def take_in(self) -> None:
        """Bring the policy's workers in step with the roster's. Raises what redis-py raises."""
        facts = self._roster.facts()
        self._policy.set_workers(facts, self._clock.wall_ms(), self._roster.draining)
        present = {each.worker for each in facts}
        for worker in sorted(present - self._known):
            await self._adopt(worker)
            self._snapshots_wanted[worker] = None
        closed = self._roster.live.keys() - present
        for worker in sorted(closed - self._known - self._closed):
            # it was told to stop before this term: what it still has is charged for all the same
            await self._adopt(worker)
        for worker in self._reports.keys() - self._roster.live.keys():
            del self._reports[worker]
        self._known, self._closed = present, set(closed)
        await self._read_snapshots()
        await self._compare()

    async def _adopt(self, worker: str) -> dict[str, Job]:
        """Book what stands in the worker's stream; all of it."""
        found: dict[str, Job] = {}
        async for page in read_range(self._redis, keys.jobs(self._model, worker)):
            for entry in page:
                if entry.kind != "job":
                    continue
                try:
                    job = wire.decode_job(entry.data)
                except WireError:
                    continue  # its worker drops it and says so
                found[job.id] = job
                self._policy.adopt(worker, job, self._clock.wall_ms())
        return found

    async def _read_snapshots(self) -> None:
        wanted = [worker for worker in self._snapshots_wanted if worker in self._known]
        self._snapshots_wanted.clear()
        if not wanted:
            return
        pipe = self._redis.pipeline(transaction=False)
        for worker in wanted:
            pipe.get(keys.blocks(self._model, worker))
        for worker, raw in zip(wanted, await pipe.execute(), strict=True):
            if raw is None:
                continue
            try:
                self._policy.snapshot(worker, wire_reports.decode_snapshot(as_bytes(raw)))
            except WireError as error:
                log.warning("block snapshot unreadable", worker=worker, error=error.message)

    async def _compare(self) -> None:
        streaks: dict[str, int] = {}
        for worker, view in self._roster.live.items():
            if worker not in self._policy.workload.workers:
                continue
            count = len(self._policy.jobs_on(worker))
            agrees = view.load.reserved_jobs == count
            streaks[worker] = 0 if agrees else self._disagreements.get(worker, 0) + 1
        self._disagreements = streaks
        for worker in [each for each, streak in streaks.items() if streak >= DISAGREEMENTS_MAX]:
            await self.reconcile(worker)

    async def reconcile(self, worker: str) -> None:
        """Believe the worker's stream about what it has."""
        self._disagreements[worker] = 0
        booked = self._policy.jobs_on(worker)
        found = await self._adopt(worker)
        for job_id in booked:
            if job_id not in found:
                self._policy.lost(worker, job_id)
