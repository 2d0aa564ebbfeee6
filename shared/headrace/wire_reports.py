"""What workers and the dispatcher tell about the fleet, as bytes: board, reports, block snapshots.

Invariant: all of it is a hint. Events may be lost or come late, so each is whole in itself, and a
reader that cannot decode one skips it. Kept apart from `wire.py`, whose messages may not be lost.
"""

from __future__ import annotations

from typing import Any

from headrace.errors import WireError
from headrace.types import (
    BLOCK_KEY_BYTES,
    Band,
    BlockSnapshot,
    Board,
    FinishReason,
    JobDone,
    JobMoved,
    JobProgress,
    Positions,
    Progress,
    WorkerRole,
    WorkerState,
    WorkerStatus,
)
from headrace.wire import Fields, pack, unpack


def encode_board(board: Board) -> bytes:
    return pack(
        {
            "leader": board.leader,
            "published": board.published_ms,
            "queued": list(board.queued),
            "work": list(board.queued_work),
            "waits": list(board.waits_ms),
            "capacity": board.capacity_tokens,
            "reserved": board.reserved_tokens,
            "workers": board.workers,
            "rate": board.work_per_s,
            "prefill": board.prefill_per_s,
            "band_rates": list(board.band_work_per_s),
            "free": board.free_jobs,
            "fetched": board.fetched_per_s,
        }
    )


def decode_board(data: bytes) -> Board:
    f = Fields("board", data)
    rates = f.numbers("band_rates")
    if len(rates) != len(Band):
        raise WireError(f"board.band_rates: expected {len(Band)} numbers, got {len(rates)}")
    return Board(
        leader=f.get("leader", str),
        published_ms=f.get("published", int),
        queued=_per_band(f, "queued"),
        queued_work=_per_band(f, "work"),
        waits_ms=_per_band(f, "waits"),
        capacity_tokens=f.get("capacity", int),
        reserved_tokens=f.get("reserved", int),
        workers=f.get("workers", int),
        work_per_s=f.number("rate"),
        prefill_per_s=f.number("prefill"),
        band_work_per_s=(rates[0], rates[1], rates[2]),
        free_jobs=f.get("free", int),
        fetched_per_s=f.number("fetched"),
    )


def _per_band(f: Fields, key: str) -> tuple[int, int, int]:
    values = f.integers(key)
    if len(values) != len(Band):
        raise WireError(f"board.{key}: expected {len(Band)} numbers, got {len(values)}")
    return values[0], values[1], values[2]


Event = Progress | JobDone | JobMoved | str
"""What stands in the events stream; a string is news whose kind alone matters."""


def encode_progress(report: Progress) -> bytes:
    jobs = [[j.job, j.computed, j.cached, j.output] for j in report.jobs]
    return pack(
        [
            "progress",
            report.worker,
            report.sequence,
            jobs,
            report.stored,
            report.removed,
            report.busy_ms,
            report.prefill_tokens,
            report.output_tokens,
            report.fetched_tokens,
            report.fetch_ms,
        ]
    )


def encode_done(done: JobDone) -> bytes:
    p = done.progress
    return pack(["done", done.worker, p.job, p.computed, p.cached, p.output, done.reason.value])


def encode_moved(moved: JobMoved) -> bytes:
    p = moved.progress
    return pack(["moved", moved.worker, moved.to, p.job, p.computed, p.cached, p.output])


def encode_news(kind: str, subject: str) -> bytes:
    """`kind` is one word: "join", "leave", "ended"."""
    return pack([kind, subject])


def decode_event(data: bytes) -> Event:
    """Raises WireError."""
    match unpack(data):
        case ["progress", str(worker), int(sequence), list(jobs), bytes(stored), bytes(removed),
              int(busy), int(prefill), int(output), int(fetched), int(fetching)]:  # fmt: skip
            _check_keys(stored, removed)
            return Progress(
                worker, sequence, tuple(map(_job, jobs)), stored, removed, busy, prefill, output,
                fetched, fetching,
            )  # fmt: skip
        case ["done", str(worker), *facts, str(reason)] if reason in set(FinishReason):
            return JobDone(worker, _job(facts), FinishReason(reason))
        case ["moved", str(worker), str(to), *facts]:
            return JobMoved(worker, to, _job(facts))
        case [str(kind), str(_)]:
            return kind
    raise WireError("event: not of a known form")


_JOB_KINDS = [str, int, int, int]


def _job(facts: Any) -> JobProgress:
    if isinstance(facts, list) and list(map(type, facts)) == _JOB_KINDS:
        return JobProgress(*facts)
    raise WireError("event: a job's progress is not of a known form")


def _check_keys(*keys: bytes) -> None:
    if any(len(each) % BLOCK_KEY_BYTES for each in keys):
        raise WireError(f"event: block keys have {BLOCK_KEY_BYTES} bytes each")


def encode_snapshot(snapshot: BlockSnapshot) -> bytes:
    return pack([snapshot.sequence, snapshot.blocks])


def decode_snapshot(data: bytes) -> BlockSnapshot:
    """Raises WireError."""
    match unpack(data):
        case [int(sequence), bytes(blocks)]:
            _check_keys(blocks)
            return BlockSnapshot(sequence, blocks)
    raise WireError("snapshot: not of a known form")


def encode_positions(positions: Positions) -> bytes:
    return pack([[job, place, start] for job, (place, start) in positions.items()])


def decode_positions(data: bytes) -> Positions:
    """Raises WireError."""
    rows = unpack(data)
    if not isinstance(rows, list):
        raise WireError(f"positions: expected a list, got {type(rows).__name__}")
    found: Positions = {}
    for row in rows:
        match row:
            case [str(job), int(place), int(start)]:
                found[job] = (place, start)
            case _:
                raise WireError("positions: a row is not of a known form")
    return found


def encode_status(status: WorkerStatus) -> bytes:
    return pack(
        {
            "state": status.state.value,
            "running": status.running,
            "waiting": status.waiting,
            "free_tokens": status.free_tokens,
            "steps": status.steps,
            "role": status.role.value,
        }
    )


def decode_status(data: bytes) -> WorkerStatus:
    f = Fields("status", data)
    return WorkerStatus(
        state=f.one_of("state", WorkerState),
        running=f.get("running", int),
        waiting=f.get("waiting", int),
        free_tokens=f.get("free_tokens", int),
        steps=f.get("steps", int),
        role=f.one_of("role", WorkerRole),
    )
