"""The gateway's reply stream of one model: read once, handed to the generations it belongs to.

Invariant: one reader, in stream order; it never waits for a client. The stream is the token log of
every live job, so it is trimmed only behind the oldest of them.
All that one read brings of a job is handed on together: a gateway that falls behind its workers
writes larger pieces, not more of them.
"""

from __future__ import annotations

import structlog
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.streams import Tail
from headrace.types import Delta
from headrace_gateway.generation import Generation

log = structlog.get_logger()

KEEP_MS = 60_000
"""How long a finished job's log stays readable."""


class Replies:
    """Demultiplexes `headrace:{model}:replies:<gateway>`."""

    def __init__(self, url: str, redis: Redis, model: str, gateway_id: str, clock: Clock) -> None:
        self._redis = redis
        self._clock = clock
        self._stream = keys.replies(model, gateway_id)
        self._tail = Tail(url, self._stream)
        self.live: dict[str, Generation] = {}

    async def run(self) -> None:
        """Read until cancelled."""
        try:
            async for entries in self._tail:
                self._hand_out([entry.data for entry in entries])
        finally:
            await self._tail.close()

    def _hand_out(self, frames: list[bytes]) -> None:
        live, noted = self.live, dict[str, Generation]()
        for frame in frames:
            try:
                rows = wire.decode_rows(frame)
            except WireError as error:
                log.error("reply entry unreadable, skipped", error=error.message)
                continue
            for row in rows:
                job = row.job if isinstance(row, Delta) else row[0]
                generation = live.get(job)
                if generation is not None:
                    generation.note(row)
                    noted[job] = generation
        for job, generation in noted.items():
            generation.tell()
            if generation.ended:
                del live[job]

    async def trim(self) -> None:
        """Drop what no live job needs, and keep the key alive. Raises what redis-py raises."""
        oldest_ms = self._clock.wall_ms() - KEEP_MS
        for generation in self.live.values():
            if generation.accepted_id:
                oldest_ms = min(oldest_ms, int(generation.accepted_id.partition("-")[0]))
        pipe = self._redis.pipeline(transaction=False)
        pipe.xtrim(self._stream, minid=max(0, oldest_ms), approximate=True)
        pipe.pexpire(self._stream, keys.REPLIES_TTL_MS)
        await pipe.execute()

    @property
    def unread_tokens(self) -> int:
        return sum(generation.unread_tokens for generation in self.live.values())
