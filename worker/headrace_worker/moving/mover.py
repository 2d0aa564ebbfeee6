"""KV of jobs that will move, on its way while their prompts are computed.

Invariant: blocks of a job are sent in the order of its chain, a batch at a time. Any trouble ends
the sending of that job and nothing else: the job then stays where it is. A receiver that was not to
be reached is left alone for DOWN_MS.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from headrace.clock import Clock
from headrace.errors import SettingsError
from headrace.types import Job
from headrace_worker.kv.export import Export
from headrace_worker.moving.link import TROUBLE, Link
from headrace_worker.moving.messages import BATCH_MAX

log = structlog.get_logger()

DOWN_MS = 1_000
FINISH_S_MAX = 3.0
"""For how long a job that has its first token waits for the rest of its KV to arrive."""
MOVES_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Arrived:
    """A job's KV is where it moves to. `reason` says why the job cannot follow; '' if it can."""

    reason: str
    kv_tokens: int = 0
    max_jobs: int = 0
    blocks: int = 0
    shared: bool = False


@dataclass(slots=True)
class _Move:
    address: str
    queue: deque[Export] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    complete: bool = False
    sent: int = 0
    task: asyncio.Task[Arrived] | None = None


class Mover:
    """What this worker sends to others. Belongs to the event loop."""

    def __init__(self, layout: bytes, block_bytes: int, clock: Clock) -> None:
        self._layout = layout
        self._block_bytes = block_bytes
        self._clock = clock
        self._links: dict[str, Link] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._down_until_ms: dict[str, int] = {}
        self._moves: dict[str, _Move] = {}
        self.sent_blocks = 0

    def begin(self, job: Job) -> None:
        """`job` will move: connect, and send what comes of it."""
        assert job.move_address, "it has where to go"
        if job.id in self._moves or len(self._moves) >= MOVES_MAX:
            return
        move = _Move(job.move_address)
        self._moves[job.id] = move
        move.task = asyncio.create_task(self._run(move))

    def lend(self, exports: Iterable[Export]) -> None:
        """Blocks that were computed; those of jobs that do not move any more are let go."""
        for export in exports:
            move = self._moves.get(export.facts.job)
            if move is None or move.task is None or move.task.done():
                export.drop()
                continue
            move.queue.append(export)
            move.news.set()

    async def finish(self, job_id: str) -> Arrived:
        """Nothing more comes of the job: wait until all of it is there. Never raises."""
        move = self._moves.get(job_id)
        if move is None or move.task is None:
            return Arrived("its KV was not sent")
        move.complete = True
        move.news.set()
        try:
            async with asyncio.timeout(FINISH_S_MAX):
                return await asyncio.shield(move.task)
        except TimeoutError:
            return Arrived(f"its KV did not arrive within {FINISH_S_MAX} s")
        finally:
            self.forget(job_id)

    def forget(self, job_id: str) -> None:
        """The job has ended or stays here."""
        move = self._moves.pop(job_id, None)
        if move is None:
            return
        if move.task is not None and not move.task.done():
            move.task.cancel()
        _let_go(move)

    async def close(self) -> None:
        tasks = [move.task for move in self._moves.values() if move.task is not None]
        for job_id in list(self._moves):
            self.forget(job_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._links.values():
            link.abort()

    async def _run(self, move: _Move) -> Arrived:
        try:
            link = await self._link(move.address)
            while True:
                while move.queue:
                    batch = [move.queue[at] for at in range(min(BATCH_MAX, len(move.queue)))]
                    sent = await link.put(batch)
                    move.sent += sent
                    self.sent_blocks += sent
                    for _ in batch:
                        move.queue.popleft()
                if move.complete:
                    break
                move.news.clear()
                await move.news.wait()
            reason = await link.flush()
        except (*TROUBLE, SettingsError) as error:
            log.warning("KV could not be moved", to=move.address, error=repr(error))
            return Arrived(f"{type(error).__name__}: {error}")
        finally:
            _let_go(move)
        w = link.welcome
        return Arrived(reason, w.kv_tokens, w.max_jobs, move.sent, link.shared)

    async def _link(self, address: str) -> Link:
        lock = self._connecting.setdefault(address, asyncio.Lock())
        async with lock:
            link = self._links.get(address)
            if link is not None and not link.closed:
                return link
            self._forget_gone()
            if self._clock.now_ms() < self._down_until_ms.get(address, 0):
                raise ConnectionRefusedError("not reached a moment ago")
            try:
                link = await Link.connect(address, self._layout, self._block_bytes)
            except (*TROUBLE, SettingsError):
                self._down_until_ms[address] = self._clock.now_ms() + DOWN_MS
                raise
            self._down_until_ms.pop(address, None)
            self._links[address] = link
            return link

    def _forget_gone(self) -> None:
        """Workers come under new addresses: nothing is kept of those that went."""
        now = self._clock.now_ms()
        self._links = {at: link for at, link in self._links.items() if not link.closed}
        self._down_until_ms = {at: ms for at, ms in self._down_until_ms.items() if ms > now}
        self._connecting = {at: lock for at, lock in self._connecting.items() if lock.locked()}

    def check_integrity(self) -> None:
        assert len(self._moves) <= MOVES_MAX, "jobs on the move are bounded"


def _let_go(move: _Move) -> None:
    for export in move.queue:
        export.drop()
    move.queue.clear()
