"""The dispatcher's picture of a model's workers: who lives, and what Redis says is reserved there.

Invariant: Redis decides. The picture is refreshed from the registry; where it is wrong the hand-off
script says so and the worker's line is read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from headrace import keys, wire, wire_reports
from headrace.errors import WireError
from headrace.streams import as_bytes
from headrace.types import WorkerLoad, WorkerRecord, WorkerRole, WorkerState, WorkerStatus
from headrace_gateway.policy.workload import WorkerFacts

log = structlog.get_logger()

UNREADABLE_TOLD_MAX = 256
"""Worker records that could not be read and were spoken of, by id and what they said."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker."""

    record: WorkerRecord
    load: WorkerLoad
    status: WorkerStatus | None

    @property
    def role(self) -> WorkerRole:
        """What it does now."""
        return self.record.role if self.status is None else self.status.role

    @property
    def is_ready(self) -> bool:
        """Whether it gets jobs, from the queue or from another worker."""
        ready = self.status is not None and self.status.state is WorkerState.READY
        return ready and (self.role is not WorkerRole.DECODE or bool(self.record.kv_address))

    @property
    def takes_jobs(self) -> bool:
        """Whether it gets jobs from the queue."""
        return self.is_ready and self.role is not WorkerRole.DECODE


class Roster:
    """Live and dead workers of one model."""

    def __init__(self, redis: Redis, model: str) -> None:
        self._redis = redis
        self._model = model
        self.live: dict[str, WorkerView] = {}
        self.dead: list[str] = []
        self._told: dict[tuple[bytes, bytes], None] = {}

    async def refresh(self) -> None:
        """Read registry, leases, loads and states. Raises what redis-py raises."""
        registry = await self._redis.hgetall(keys.workers(self._model))
        read = (self._decode(as_bytes(name), as_bytes(raw)) for name, raw in registry.items())
        records = [record for record in read if record is not None]
        pipe = self._redis.pipeline(transaction=False)
        for record in records:
            pipe.exists(keys.lease(self._model, record.id))
            pipe.hmget(keys.load(self._model, record.id), "tokens", "jobs")
            pipe.get(keys.status(self._model, record.id))
        rows = await pipe.execute() if records else []
        live, dead = {}, []
        for index, record in enumerate(records):
            alive, held, raw_status = rows[3 * index : 3 * index + 3]
            if not alive:
                dead.append(record.id)
                continue
            load = WorkerLoad(int(held[0] or 0), int(held[1] or 0))
            live[record.id] = WorkerView(record, load, self._decode_status(raw_status))
        self.live, self.dead = live, dead

    def _decode(self, name: bytes, raw: bytes) -> WorkerRecord | None:
        """None where it cannot be read, as one that another version wrote into the same Redis.

        It stands there until its worker is buried, and is read four times a second: it is spoken
        of once.
        """
        try:
            return wire.decode_worker(raw)
        except WireError as error:
            if (name, raw) not in self._told:
                if len(self._told) >= UNREADABLE_TOLD_MAX:
                    self._told.clear()
                self._told[name, raw] = None
                log.warning(
                    "worker record unreadable",
                    model=self._model,
                    worker=name.decode(errors="replace"),
                    error=error.message,
                )
            return None

    def _decode_status(self, raw: bytes | None) -> WorkerStatus | None:
        """None, which means no jobs for it, where the status is missing or unreadable."""
        try:
            return wire_reports.decode_status(raw) if raw else None
        except WireError as error:
            log.warning("worker status unreadable", model=self._model, error=error.message)
            return None

    async def refresh_load(self, worker: str) -> None:
        view = self.live.get(worker)
        if view is not None:
            held = await self._redis.hmget(keys.load(self._model, worker), "tokens", "jobs")
            load = WorkerLoad(int(held[0] or 0), int(held[1] or 0))
            self.live[worker] = WorkerView(view.record, load, view.status)

    def adjust(self, worker: str, tokens: int, jobs: int) -> None:
        """Add to what `worker` has reserved, as a hand-off told."""
        view = self.live.get(worker)
        if view is not None:
            load = WorkerLoad(
                max(0, view.load.reserved_tokens + tokens), max(0, view.load.reserved_jobs + jobs)
            )
            self.live[worker] = WorkerView(view.record, load, view.status)

    def kv_address(self, worker: str) -> str:
        """Where `worker` takes KV; '' where that is not known."""
        view = self.live.get(worker)
        return "" if view is None else view.record.kv_address

    def forget(self, worker: str) -> None:
        self.live.pop(worker, None)

    def facts(self) -> list[WorkerFacts]:
        """The workers that may get a new job."""
        return [
            WorkerFacts(view.record.id, view.record.kv_tokens, view.record.max_jobs, view.role)
            for view in self.live.values()
            if view.is_ready
        ]

    @property
    def draining(self) -> list[str]:
        """Those that live and get no new job."""
        return [worker for worker, view in self.live.items() if not view.takes_jobs]

    @property
    def capacity_tokens(self) -> int:
        return sum(view.record.kv_tokens for view in self.live.values() if view.is_ready)

    @property
    def reserved_tokens(self) -> int:
        return sum(view.load.reserved_tokens for view in self.live.values() if view.is_ready)

    @property
    def ready_count(self) -> int:
        """Workers that get jobs from the queue; where there are no others, those that decode."""
        ready = [view for view in self.live.values() if view.is_ready]
        return sum(view.takes_jobs for view in ready) or len(ready)
