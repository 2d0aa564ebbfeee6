"""The dispatcher of one model: one gateway leads, the others stand by.

Invariant: a job leaves the queue only through the hand-off script, which checks in one step that
we still lead, that the worker lives and has room, and that the job was not cancelled or taken; so
two gateways that both believe they lead can slow each other down but never run a job twice. All
state here can be lost: the intake stream and the worker streams are the queue, a new term reads
them from the start. What is decided is decided in `policy/dispatch.py`.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from redis.asyncio import Redis

from headrace.clock import Clock
from headrace.keys import LEADER_LEASE_MS
from headrace.streams import REDIS_DOWN, Scripts
from headrace.types import Job
from headrace_gateway.leadership import Deposed, Lease
from headrace_gateway.term import Term

log = structlog.get_logger()

STAND_BY_MS = 400


class Dispatcher:
    """Runs for election, and leads while elected."""

    def __init__(self, url: str, redis: Redis, model: str, gateway_id: str, clock: Clock) -> None:
        self._url = url
        self._redis = redis
        self._lua = Scripts(redis)
        self._model = model
        self._lease = Lease(redis, self._lua, model, gateway_id)
        self._clock = clock
        self.term: Term | None = None

    async def run(self) -> None:
        """Lead whenever the lease is free. Runs until cancelled."""
        try:
            while True:
                try:
                    if await self._lease.take():
                        await self._lead()
                except REDIS_DOWN as error:
                    log.warning("dispatcher lost redis", model=self._model, error=str(error))
                await asyncio.sleep(STAND_BY_MS / 1000)
        finally:
            with contextlib.suppress(*REDIS_DOWN):
                await self._lease.release()

    async def place(self, job: Job) -> str:
        """As Term.place, where this gateway leads; '' where another one does."""
        term = self.term
        return "" if term is None else await term.place(job)

    async def _lead(self) -> None:
        log.info("dispatcher leads", model=self._model)
        self.term = Term(
            self._url, self._redis, self._lua, self._model, self._lease.token, self._clock
        )
        # a task of its own: a cancel that arrives as a task group fails would be lost with it
        leading = asyncio.create_task(self._run_term(self.term))
        try:
            await asyncio.wait({leading})
        finally:
            leading.cancel()
            await asyncio.wait({leading})
            if not leading.cancelled():
                leading.exception()  # seen, also where a stop ends this and nobody asks for it
            await self.term.close()
            self.term = None
        try:
            leading.result()
        except* Deposed:
            log.info("dispatcher deposed", model=self._model)
        except* REDIS_DOWN as group:
            log.warning("dispatcher steps down", model=self._model, error=str(group.exceptions[0]))

    async def _run_term(self, term: Term) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew())
            await term.open()
            for part in term.parts():
                tasks.create_task(part)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEADER_LEASE_MS / 4000)
            if not await self._lease.renew():
                raise Deposed
