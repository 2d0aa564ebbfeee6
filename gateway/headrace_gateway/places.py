"""Where this gateway's jobs stand in one model's queue, as the dispatcher publishes it.

Invariant: a hint and nothing more: a lost, late or unreadable publication delays what clients
are told, and touches neither jobs nor tokens. One read answers for all generations, and there is
none while nobody waits.

That a job is listed proves that it waits. That it is not listed proves little: a new leader may
still be reading the intake, the key may have ended with the leader, a long queue is listed in
part. So a job counts as handed off once it was missing while the board was published several
times. Rejected: a word from the dispatcher at each hand-off, a write a job to save a fraction of
a second on what the first token says as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog
from redis.asyncio import Redis

from headrace import keys, wire_reports
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.streams import REDIS_DOWN, as_bytes
from headrace.types import Board, Positions
from headrace_gateway.generation import Generation, Standing

log = structlog.get_logger()

POLL_EVERY_MS = 250
MISSING_BOARDS = 4
"""Boards published without a job being listed, after which it has left the queue. Places are
published with at least every third one."""
LISTED_MAX = 2_000
"""A queue that is longer is not published to its end: absence says nothing then."""


class Places:
    """Tells the generations in `live` that wait for their first token where they stand."""

    def __init__(
        self,
        redis: Redis,
        model: str,
        gateway_id: str,
        live: Mapping[str, Generation],
        board: Callable[[], Board | None],
        clock: Clock,
    ) -> None:
        self._redis = redis
        self._key = keys.places(model, gateway_id)
        self._live = live
        self._board = board
        self._clock = clock
        self._published_ms = 0
        self._boards = 0
        self._missing: dict[str, tuple[int, int]] = {}
        """Job id → boards counted when it was first not listed, and that instant."""
        self._readable = True

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(POLL_EVERY_MS / 1000)
            await self.poll()

    async def poll(self) -> None:
        """Read once, if somebody waits, and tell everybody who does."""
        self._count_board()
        waiting = [each for each in self._live.values() if each.waits and each.accepted_id]
        if not waiting:
            self._missing.clear()
            return
        positions = await self._read()
        if positions is not None:
            self._tell(waiting, positions)

    def _count_board(self) -> None:
        board = self._board()
        if board is None or sum(board.queued) > LISTED_MAX:
            self._missing.clear()
        elif board.published_ms != self._published_ms:
            self._published_ms = board.published_ms
            self._boards += 1

    def _tell(self, waiting: list[Generation], positions: Positions) -> None:
        now_ms = self._clock.now_ms()
        missing: dict[str, tuple[int, int]] = {}
        for generation in waiting:
            job = generation.job.id
            if job in positions:
                generation.note_place(Standing(*positions[job], now_ms))
                continue
            boards, since_ms = self._missing.get(job, (self._boards, now_ms))
            if self._boards - boards >= MISSING_BOARDS:
                generation.note_place(Standing(0, 0, since_ms))
            else:
                missing[job] = boards, since_ms
        self._missing = missing

    async def _read(self) -> Positions | None:
        """What is published for this gateway; None when that cannot be known now."""
        try:
            raw = await self._redis.get(self._key)
            positions = wire_reports.decode_positions(as_bytes(raw)) if raw else {}
        except REDIS_DOWN:
            return None
        except WireError as error:
            if self._readable:
                log.error("places unreadable, nobody is told", key=self._key, error=error.message)
            self._readable = False
            return None
        self._readable = True
        return positions
