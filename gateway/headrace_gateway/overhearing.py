"""Another gateway's reply stream, read for the jobs that are followed here.

Invariant: reading changes nothing there. A job's log is read from its beginning: what was written
before the stream's reader got there is fetched while what comes is put aside, and by their
positions no token counts twice. Places in the queue are read where that gateway finds them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.clock import Clock
from headrace.errors import DependencyError, WireError
from headrace.streams import Entry, Tail, read_range
from headrace.types import Board, Delta
from headrace_gateway.generation import Generation
from headrace_gateway.places import Places

log = structlog.get_logger()

IDLE_MS = 10_000
"""So long a stream is read on in which nothing is followed."""
CATCH_UP_ENTRIES_MAX = 50_000
"""A log that begins further back is not followed."""


class Overheard:
    """One gateway's replies. `live`: what is followed there, by job."""

    def __init__(
        self,
        url: str,
        redis: Redis,
        model: str,
        gateway_id: str,
        board: Callable[[], Board | None],
        clock: Clock,
    ) -> None:
        self.live: dict[str, Generation] = {}
        self._redis = redis
        self._clock = clock
        self._stream = keys.replies(model, gateway_id)
        self._url = url
        self._tail: Tail | None = None
        self._aside: dict[str, list[Delta]] = {}
        self._used_ms = clock.now_ms()
        self._places = Places(redis, model, gateway_id, self.live, board, clock)
        self._tasks: list[asyncio.Task[None]] = []

    async def listen(self, generation: Generation, since_ms: int) -> None:
        """Follow its job, whose log begins at `since_ms` of the stream's clock.

        Raises what redis-py raises.
        """
        job = generation.job.id
        generation.accepted_id = f"{since_ms}-0"
        self.live[job] = generation
        if self._tail is None:
            self._tail = Tail(self._url, self._stream, f"{max(0, since_ms - 1)}-0")
            self._tasks = [
                asyncio.create_task(self._read(self._tail)),
                asyncio.create_task(self._places.run()),
            ]
            return
        self._aside[job] = []
        try:
            await self._catch_up(generation)
        finally:
            for delta in self._aside.pop(job):
                generation.offer(delta)
            if generation.ended:
                self.live.pop(job, None)

    async def _catch_up(self, generation: Generation) -> None:
        entries = 0
        async for page in read_range(self._redis, self._stream, generation.accepted_id):
            entries += len(page)
            if entries > CATCH_UP_ENTRIES_MAX:
                generation.fail(DependencyError("its log is too long to catch up with"))
                return
            for entry in page:
                for delta in _deltas_of(entry):
                    if delta.job == generation.job.id:
                        generation.offer(delta)

    async def _read(self, tail: Tail) -> None:
        async for entries in tail:
            for entry in entries:
                for delta in _deltas_of(entry) if self.live else ():
                    self._hand_out(delta)

    def _hand_out(self, delta: Delta) -> None:
        generation = self.live.get(delta.job)
        if generation is None:
            return
        if delta.job in self._aside:
            self._aside[delta.job].append(delta)
            return
        generation.offer(delta)
        if generation.ended:
            del self.live[delta.job]

    def idle(self) -> bool:
        """Whether nothing was followed here for a while."""
        now_ms = self._clock.now_ms()
        if self.live or self._aside:
            self._used_ms = now_ms
        return now_ms - self._used_ms >= IDLE_MS

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tail is not None:
            await self._tail.close()


def _deltas_of(entry: Entry) -> list[Delta]:
    """The entry's deltas; none of an unreadable one, as its own gateway reads it."""
    try:
        return wire.decode_deltas(entry.data)
    except WireError as error:
        log.error("reply entry unreadable, skipped", entry=entry.id, error=error.message)
        return []
