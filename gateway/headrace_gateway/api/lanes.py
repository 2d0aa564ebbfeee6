"""Lanes of a WebSocket: FIFO within one, parallel across them, bounded in number and length.

Invariant: a lane exists while it has work. One task runs it, turn after turn; what a turn raises
ends that turn, never the lane.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import OverloadError

RETRY_MS = 1_000


@dataclass(eq=False)
class Work:
    """One `response.create`. `response_id` is known once its turn has begun.

    `cancelled` says that the client asked for the end, which tells a cancelled task why. Once
    `settled`, its closing events are on their way and there is nothing left to cancel.
    """

    lane: str | None
    body: dict[str, Any]
    response_id: str | None = None
    cancelled: bool = False
    settled: bool = False
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """End this turn where it stands; its closing events are still sent."""
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()


Run = Callable[[Work], Awaitable[None]]


@dataclass
class _Lane:
    waiting: deque[Work] = field(default_factory=deque)
    running: Work | None = None
    task: asyncio.Task[None] | None = None


class Lanes:
    """All lanes of one connection; `run` does one turn."""

    def __init__(self, run: Run, *, lanes_max: int, queue_max: int) -> None:
        self._run = run
        self._lanes_max = lanes_max
        self._queue_max = queue_max
        self._lanes: dict[str | None, _Lane] = {}

    def add(self, work: Work) -> None:
        """Queue `work` in its lane. Raises OverloadError when there are too many."""
        lane = self._lanes.get(work.lane)
        if lane is None and len(self._lanes) >= self._lanes_max:
            raise OverloadError(
                f"{self._lanes_max} lanes of this connection are busy",
                code="too_many_lanes",
                param="stream_id",
                retry_after_ms=RETRY_MS,
            )
        if sum(len(each.waiting) for each in self._lanes.values()) >= self._queue_max:
            raise OverloadError(
                f"{self._queue_max} turns are waiting in this connection",
                code="too_many_turns",
                retry_after_ms=RETRY_MS,
            )
        if lane is None:
            lane = self._lanes[work.lane] = _Lane()
            lane.task = asyncio.create_task(self._drive(work.lane, lane))
        lane.waiting.append(work)

    def cancel(self, name: str | None, response_id: str | None) -> bool:
        """Cancel the response of that id, or what runs in the lane; whether there was one."""
        for lane_name, lane in self._lanes.items():
            work = lane.running
            if work is None or work.cancelled or work.settled:
                continue
            if work.response_id == response_id if response_id else lane_name == name:
                work.cancel()
                return True
        return False

    async def close(self) -> None:
        """The connection is gone: end every turn, drop what waits."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for lane in self._lanes.values():
            lane.waiting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drive(self, name: str | None, lane: _Lane) -> None:
        try:
            while lane.waiting:
                lane.running = lane.waiting.popleft()
                lane.running.task = asyncio.current_task()
                await self._run(lane.running)
                lane.running = None
        finally:
            self._lanes.pop(name, None)
