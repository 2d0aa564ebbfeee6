"""What becomes of a dead worker's jobs: fence, read the log, queue again.

Invariant: the fence is written before the log is read, in the same stream that carries the tokens.
Everything the dead (or only paused) worker wrote before the fence counts, nothing after it does,
for the gateway and for us alike; so the next worker continues after exactly what clients have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from headrace import keys, scripts, wire
from headrace.errors import WireError
from headrace.policy.reply_log import ReplyLog
from headrace.streams import Entry, Scripts, as_bytes, read_range
from headrace.types import Delta, Job, pack_tokens
from headrace_gateway.leadership import Deposed

log = structlog.get_logger()

FRUITLESS_ATTEMPTS_MAX = 5
"""Attempts in a row that may die without one new token, before the job itself is the suspect."""


@dataclass(frozen=True, slots=True)
class Rescued:
    """A job to queue again, or to fail when `failure` says why. It still stands at `entry`."""

    job: Job
    stream: str
    entry: str
    failure: str = ""


class Rescuer:
    """Takes over the streams of dead workers for one leader's term."""

    def __init__(self, redis: Redis, lua: Scripts, model: str, leader_token: str) -> None:
        self._redis = redis
        self._lua = lua
        self._model = model
        self._token = leader_token
        self._seen: set[tuple[str, str]] = set()

    async def rescue(self, worker: str) -> list[Rescued]:
        """The jobs of `worker` that this term has not taken over yet. Raises Deposed."""
        stream = keys.jobs(self._model, worker)
        rescued = []
        async for page in read_range(self._redis, stream):
            for entry in page:
                if (stream, entry.id) in self._seen:
                    continue
                self._seen.add((stream, entry.id))
                item = await self._take_over(stream, entry)
                if item is not None:
                    rescued.append(item)
        return rescued

    async def bury(self, worker: str) -> bool:
        """Forget `worker` if nothing of it is left; True when it is gone."""
        m = self._model
        answer = await self._lua.call(
            scripts.BURY,
            [
                keys.leader(m),
                keys.workers(m),
                keys.jobs(m, worker),
                keys.load(m, worker),
                keys.lease(m, worker),
                keys.status(m, worker),
                keys.blocks(m, worker),
            ],
            [self._token, worker],
        )
        if answer == b"ok":
            stream = keys.jobs(m, worker)
            self._seen = {seen for seen in self._seen if seen[0] != stream}
        return bool(answer == b"ok")

    async def _take_over(self, stream: str, entry: Entry) -> Rescued | None:
        try:
            job = wire.decode_job(entry.data) if entry.kind == "job" else None
        except WireError as error:
            log.error("job unreadable, dropped", stream=stream, entry=entry.id, error=error.message)
            job = None
        if job is None:
            # a cancel nudge has no reader any more; the flag in the job's record still stands
            await self._redis.xdel(stream, entry.id)
            return None
        facts = await self._redis.hmget(keys.job(self._model, job.id), "attempt", "intake")
        if facts[0] is None or facts[1] is None:
            await self._redis.xdel(stream, entry.id)
            return None
        seen, accepted_id = int(facts[0]), as_bytes(facts[1]).decode()
        fence_id = await self._fence(job, seen, stream, entry.id)
        if fence_id is None:
            await self._redis.xdel(stream, entry.id)
            return None
        attempt = seen + 1
        reply_log = await self._read_log(job, accepted_id, fence_id)
        fresh = replace(job, attempt=attempt, logged=pack_tokens(reply_log.tokens))
        # an attempt that was fenced before had no worker yet: nobody died of it
        died = seen == job.attempt
        progress = len(reply_log.tokens) > len(job.logged)
        fruitless = await self._count_fruitless(job, progress) if died else 0
        failure = ""
        if fruitless >= FRUITLESS_ATTEMPTS_MAX:
            failure = f"{fruitless} workers in a row died without producing a token of this job"
        log.info("job moves on", job=job.id, attempt=attempt, logged=len(reply_log.tokens))
        return Rescued(fresh, stream, entry.id, failure)

    async def _fence(self, job: Job, seen: int, stream: str, entry: str) -> str | None:
        """End attempt `seen`; the id of the fence, None if the job is over or elsewhere."""
        answer = await self._lua.call(
            scripts.FENCE,
            [
                keys.leader(self._model),
                keys.job(self._model, job.id),
                keys.replies(self._model, job.gateway),
                stream,
            ],
            [
                self._token,
                seen,
                wire.encode_deltas([Delta(job.id, seen + 1, 0)]),
                keys.REPLIES_TTL_MS,
                entry,
            ],
        )
        if answer == b"deposed":
            raise Deposed
        if answer == b"stale":
            return None
        return str(answer.decode())

    async def _read_log(self, job: Job, accepted_id: str, fence_id: str) -> ReplyLog:
        """What clients have of `job`, from its acceptance up to the fence.

        Stream ids are Redis' own clock, the same for both streams.
        """
        reply_log = ReplyLog(job.attempt, job.logged)
        stream = keys.replies(self._model, job.gateway)
        start = f"{accepted_id.partition('-')[0]}-0"
        async for page in read_range(self._redis, stream, start, fence_id):
            for entry in page:
                for delta in _deltas_of(entry):
                    if delta.job == job.id:
                        reply_log.accept(delta)
        return reply_log

    async def _count_fruitless(self, job: Job, progress: bool) -> int:
        key = keys.job(self._model, job.id)
        if progress:
            await self._redis.hset(key, "fruitless", 0)
            return 0
        return int(await self._redis.hincrby(key, "fruitless", 1))


def _deltas_of(entry: Entry) -> list[Delta]:
    """The entry's deltas; none of an unreadable one, which the gateway skips as well."""
    try:
        return wire.decode_deltas(entry.data)
    except WireError as error:
        log.error("reply entry unreadable, skipped", entry=entry.id, error=error.message)
        return []
