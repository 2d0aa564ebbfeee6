"""A worker's place in the fleet: registration, lease, heartbeats, leaving.

Invariant: a worker id names one incarnation. A worker whose lease ran out (it was paused, or Redis
was away) never renews it: its jobs belong to others by then. It drops what it has and registers
under a new id.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass

from redis.asyncio import Redis

from headrace import keys, wire
from headrace.clock import Clock
from headrace.streams import as_bytes
from headrace.types import ModelRecord, WorkerRecord, WorkerRole, WorkerStatus
from headrace.wire_reports import encode_news, encode_status


def new_worker_id() -> str:
    return f"w-{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What this worker offers, and what it computes with (see WorkerRecord)."""

    kv_tokens: int
    max_jobs: int
    role: WorkerRole = WorkerRole.BOTH
    kv_address: str = ""
    kernels: str = ""
    precision: str = ""


class Membership:
    """One incarnation of a worker."""

    def __init__(
        self,
        redis: Redis,
        record: ModelRecord,
        worker_id: str,
        capacity: Capacity,
        lease_ms: int,
        clock: Clock,
    ) -> None:
        self._redis = redis
        self._model = record
        self._lease_ms = lease_ms
        self.id = worker_id
        self.card = WorkerRecord(
            id=worker_id,
            model=record.name,
            role=capacity.role,
            host=socket.gethostname(),
            pid=os.getpid(),
            kv_tokens=capacity.kv_tokens,
            max_jobs=capacity.max_jobs,
            started_ms=clock.wall_ms(),
            kernels=capacity.kernels,
            kv_address=capacity.kv_address,
            precision=capacity.precision,
        )

    async def join(self, status: WorkerStatus) -> bool:
        """Announce the model and this worker, in one transaction; False when the id was used.

        A process that was started again with the id it was given before must not take over what
        its predecessor had: those jobs are handed on behind a fence. Raises what redis-py raises.
        """
        m, w = self._model.name, self.id
        if await self._redis.exists(keys.lease(m, w), keys.jobs(m, w), keys.load(m, w)):
            return False
        pipe = self._redis.pipeline(transaction=True)
        pipe.set(keys.record(m), wire.encode_model(self._model))
        pipe.hset(keys.workers(m), w, as_bytes(wire.encode_worker(self.card)))
        pipe.set(keys.status(m, w), encode_status(status), px=self._lease_ms * 3)
        pipe.set(keys.lease(m, w), self.card.pid, px=self._lease_ms)
        pipe.xadd(
            keys.events(m),
            {"e": encode_news("join", w)},
            maxlen=keys.EVENTS_MAX,
            approximate=True,
        )
        await pipe.execute()
        # the list of models lies outside the model's hash slot
        await self._redis.hset(keys.MODELS, m, self._model.fingerprint)
        return True

    async def beat(self, status: WorkerStatus) -> bool:
        """Renew the lease; False when it had run out and may not be renewed."""
        m, w = self._model.name, self.id
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(keys.lease(m, w), self.card.pid, px=self._lease_ms, xx=True)
        pipe.set(keys.status(m, w), encode_status(status), px=self._lease_ms * 3)
        renewed, _ = await pipe.execute()
        return bool(renewed)

    async def leave(self) -> None:
        """Let the lease go, and what was told of blocks.

        The dispatcher hands on whatever still stands in the job stream.
        """
        m, w = self._model.name, self.id
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(keys.lease(m, w), keys.blocks(m, w))
        pipe.xadd(
            keys.events(m),
            {"e": encode_news("leave", w)},
            maxlen=keys.EVENTS_MAX,
            approximate=True,
        )
        await pipe.execute()
