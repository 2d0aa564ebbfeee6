"""Builders for tests of the queue: a scripted worker and a model record, on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis

from headrace import keys, scripts, wire
from headrace.clock import SystemClock
from headrace.streams import Scripts, parse_entries
from headrace.types import (
    Band,
    Delta,
    Finish,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    ModelRecord,
    Sampling,
    WorkerRole,
    WorkerState,
    WorkerStatus,
    pack_tokens,
)
from headrace.wire_reports import encode_done
from headrace_worker.membership import Capacity, Membership

MODEL = ModelRecord(
    name="m",
    fingerprint="f",
    architecture="llama",
    context_tokens=1_000,
    vocab_size=100,
    eos_token_ids=(2,),
    add_bos=False,
    bos_token_id=None,
    chat_template="",
    template_tokens={},
    tokenizer_json=b"{}",
)


def a_job(name: str, gateway: str, *, tokens: int = 10, band: Band = Band.STANDARD) -> Job:
    return Job(
        id=name,
        model=MODEL.name,
        tenant="t",
        band=band,
        arrived_ms=SystemClock().wall_ms(),
        gateway=gateway,
        prompt=pack_tokens(range(5)),
        sampling=Sampling(max_tokens=tokens),
        affinity=name.encode(),
    )


class ScriptedWorker:
    """A worker without an engine: the test says which tokens it writes and when."""

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        max_jobs: int = 4,
        lease_ms: int = 60_000,
        model: ModelRecord = MODEL,
        tokens: int = 1_000,
        role: WorkerRole = WorkerRole.BOTH,
    ) -> None:
        self.redis = redis
        self.name = name
        self.model = model.name
        self.tokens = tokens
        self.role = role
        address = "" if role is WorkerRole.BOTH else f"tcp://{name}:1"
        capacity = Capacity(tokens, max_jobs, role, kv_address=address)
        self.member = Membership(redis, model, name, capacity, lease_ms, SystemClock())

    def _status(self) -> WorkerStatus:
        return WorkerStatus(WorkerState.READY, 0, 0, self.tokens, 0, self.role)

    async def join(self) -> None:
        assert await self.member.join(self._status())

    async def become(self, role: WorkerRole) -> None:
        """What it does when the dispatcher tells it to change sides."""
        self.role = role
        assert await self.member.beat(self._status())

    async def entries(self, kind: str = "job") -> list[tuple[str, bytes]]:
        rows = await self.redis.xrange(keys.jobs(self.model, self.name))
        return [(e.id, e.data) for e in parse_entries(rows) if e.kind == kind]

    async def jobs(self) -> list[tuple[str, Job]]:
        return [(entry, wire.decode_job(data)) for entry, data in await self.entries()]

    async def write(self, job: Job, first: int, *tokens: int) -> None:
        """Tokens as an engine step would publish them."""
        frame = wire.encode_deltas([Delta(job.id, job.attempt, first, tokens)])
        await self.redis.xadd(keys.replies(self.model, job.gateway), {"d": frame})

    async def finish(
        self,
        entry: str,
        job: Job,
        first: int,
        *tokens: int,
        reason: FinishReason = FinishReason.LENGTH,
    ) -> bool:
        """End the job; False when another attempt has the job by now."""
        m = self.model
        delta = Delta(job.id, job.attempt, first, tokens, Finish(reason))
        progress = JobProgress(job.id, len(job.prompt), 0, first + len(tokens))
        answer = await Scripts(self.redis).call(
            scripts.FINISH,
            [
                keys.job(m, job.id),
                keys.jobs(m, self.name),
                keys.load(m, self.name),
                keys.replies(m, job.gateway),
                keys.events(m),
                keys.lease(m, self.name),
            ],
            [
                job.attempt,
                entry,
                wire.encode_deltas([delta]),
                job.cost_tokens,
                keys.JOB_LINGER_MS,
                keys.REPLIES_TTL_MS,
                encode_done(JobDone(self.name, progress, reason)),
            ],
        )
        return bool(answer == 1)

    async def die(self) -> None:
        """As kill -9 and an ended lease: nothing else is tidied up."""
        await self.redis.delete(keys.lease(self.model, self.name))


async def eventually(check: Callable[[], object], limit_s: float = 10.0) -> None:
    """Wait until `check` (which may be a coroutine function) is true."""
    async with asyncio.timeout(limit_s):
        while True:
            found = check()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)
