"""The fleet as Redis tells it: what `status` shows and `up` waits for.

Invariant: reading changes nothing, and a record that cannot be read is reported, never fatal: this
is what people look at when something is wrong.
"""

from __future__ import annotations

import time
from typing import Any

from redis.asyncio import Redis

from headrace import keys, wire, wire_reports
from headrace.errors import WireError
from headrace.types import Band, WorkerState

GATEWAYS_MAX = 1_000


async def worker_ready(redis: Redis, model: str, worker_id: str) -> bool:
    """Whether that worker says that it takes jobs."""
    data: Any = await redis.get(keys.status(model, worker_id))
    return data is not None and wire_reports.decode_status(data).state is WorkerState.READY


async def read_fleet(redis: Redis) -> dict[str, Any]:
    """Models (queue, leader), workers and gateways, as plain values ready for JSON.

    Raises what redis-py raises.
    """
    fields: Any = await redis.hkeys(keys.MODELS)
    names = sorted(name.decode() for name in fields)
    problems: list[str] = []
    fleet: dict[str, Any] = {"models": [], "workers": [], "gateways": [], "problems": problems}
    for name in names:
        fleet["models"].append(await _model(redis, name, problems))
        fleet["workers"] += await _workers(redis, name, problems)
    fleet["gateways"] = await _gateways(redis, problems)
    return fleet


async def _model(redis: Redis, name: str, problems: list[str]) -> dict[str, Any]:
    pipe = redis.pipeline(transaction=False)
    pipe.get(keys.leader(name))
    pipe.get(keys.board(name))
    pipe.xlen(keys.intake(name))
    leader, data, intake = await pipe.execute()
    facts: dict[str, Any] = {
        "name": name,
        "leader": leader.decode() if leader else None,
        "intake": intake,
        "queue": None,
    }
    if data is None:
        return facts
    try:
        board = wire_reports.decode_board(data)
    except WireError as error:
        problems.append(f"board of {name}: {error.message}")
        return facts
    return facts | {
        "queue": {band.label: board.queued[band] for band in Band},
        "queued_tokens": board.queued_tokens,
        "capacity_tokens": board.capacity_tokens,
        "reserved_tokens": board.reserved_tokens,
        "waits_ms": {band.label: board.waits_ms[band] for band in Band},
        "work_per_s": round(board.work_per_s, 1),
        "board_age_ms": max(0, time.time_ns() // 1_000_000 - board.published_ms),
    }


async def _workers(redis: Redis, model: str, problems: list[str]) -> list[dict[str, Any]]:
    rows: Any = await redis.hgetall(keys.workers(model))
    workers = []
    for raw_id, data in sorted(rows.items()):
        worker_id = raw_id.decode(errors="replace")
        try:
            workers.append(await _worker(redis, model, worker_id, data))
        except WireError as error:
            problems.append(f"worker {worker_id} of {model}: {error.message}")
    return workers


async def _worker(redis: Redis, model: str, worker_id: str, data: bytes) -> dict[str, Any]:
    record = wire.decode_worker(data)
    pipe = redis.pipeline(transaction=False)
    pipe.get(keys.status(model, worker_id))
    pipe.pttl(keys.lease(model, worker_id))
    pipe.hmget(keys.load(model, worker_id), "tokens", "jobs")
    status_data, lease_ms, (tokens, jobs) = await pipe.execute()
    status = wire_reports.decode_status(status_data) if status_data else None
    # without its lease a worker's last words about itself no longer hold
    state = "gone" if lease_ms <= 0 else status.state.value if status else "starting"
    return {
        "id": record.id,
        "model": record.model,
        "host": record.host,
        "pid": record.pid,
        "role": (status.role if status else record.role).value,
        "state": state,
        "running": status.running if status else 0,
        "waiting": status.waiting if status else 0,
        "free_kv_tokens": status.free_tokens if status else 0,
        "kv_tokens": record.kv_tokens,
        "reserved_tokens": int(tokens or 0),
        "reserved_jobs": int(jobs or 0),
        "max_jobs": record.max_jobs,
        "steps": status.steps if status else 0,
        "lease_ms": max(lease_ms, 0),
        "started_ms": record.started_ms,
        "kernels": record.kernels,
        "precision": record.precision,
    }


async def _gateways(redis: Redis, problems: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async for key in redis.scan_iter(match=keys.gateway("*"), count=500):
        if len(found) >= GATEWAYS_MAX:
            problems.append(f"more than {GATEWAYS_MAX} gateways: the rest is not shown")
            break
        data: Any = await redis.get(key)
        if data is None:  # left between the scan and now
            continue
        try:
            f = wire.Fields("gateway", data)
            found.append(
                {
                    "id": f.get("id", str),
                    "pid": f.get("pid", int),
                    "host": f.get("host", str),
                    "port": f.get("port", int),
                    "started_ms": f.get("started", int),
                }
            )
        except WireError as error:
            problems.append(f"{key.decode(errors='replace')}: {error.message}")
    return sorted(found, key=lambda gateway: str(gateway["id"]))
