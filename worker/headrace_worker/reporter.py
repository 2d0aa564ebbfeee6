"""Tells the dispatcher how far jobs are and which KV is here, a few times a second.

Invariant: all of it is a hint. A report that does not reach Redis is dropped, and the snapshot of
all blocks, which follows within SNAPSHOT_MS, makes up for what it said of blocks. The engine's
thread only hands over what a step did; what is gathered, netted and encoded happens here, in the
event loop, apart from the tokens' way. Rejected: a report with each step, which at fifty steps a
second would make one dispatcher read as many reports as there are token frames in the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from itertools import islice

from redis.asyncio import Redis

from headrace import keys
from headrace.clock import Clock
from headrace.streams import REDIS_DOWN
from headrace.types import BlockSnapshot, JobProgress, Progress
from headrace.wire_reports import encode_progress, encode_snapshot
from headrace_worker.results import StepResult

REPORT_MS = 250
SNAPSHOT_MS = 5_000
"""Between two snapshots while blocks come and go."""
RENEW_MS = keys.BLOCKS_TTL_MS // 3
"""Between two snapshots while they do not."""
NEWS_MAX = 4_096
"""Block keys in one report; where there are more, only the snapshot tells of them."""
SNAPSHOT_BLOCKS_MAX = 262_144
"""Blocks in a snapshot, 2 MiB: the ones that came last."""


class Reporter:
    """What is to be told of one engine. `note` comes after each step, in the event loop."""

    def __init__(self, redis: Redis, model: str, clock: Clock) -> None:
        self._redis = redis
        self._model = model
        self._clock = clock
        self._held: dict[bytes, None] = {}
        self._sequence = 0
        self._snapshot_at_ms = 0
        self._held_changed = False
        self._forget_pending()

    def _forget_pending(self) -> None:
        self._moved: dict[str, JobProgress] = {}
        self._news: dict[bytes, bool] = {}
        self._news_skipped = False
        self._busy_ns = 0
        self._prefill_tokens = 0
        self._output_tokens = 0
        self._fetched_tokens = 0
        self._fetch_ms = 0.0

    def begin(self) -> None:
        """A new incarnation, which counts its reports from 1 and has told nothing yet."""
        self._sequence = 0
        self._forget_pending()
        self._held_changed = True
        self._snapshot_at_ms = self._clock.now_ms()

    def note(self, result: StepResult) -> None:
        """Takes in what a step did."""
        work = result.work
        for progress in work.moved:
            self._moved[progress.job] = progress
        for story in (*result.stories, *result.handed):
            self._moved.pop(story.job, None)  # its end tells more
        for key, came in work.news.items():
            self._note_block(key, came)
        self._busy_ns += work.busy_ns
        self._prefill_tokens += work.prefill_tokens
        self._output_tokens += work.output_tokens

    def note_fetch(self, tokens: int, took_ms: float) -> None:
        """KV of `tokens` came from the cache service."""
        self._fetched_tokens += tokens
        self._fetch_ms += took_ms

    def _note_block(self, key: bytes, came: bool) -> None:
        self._held_changed = True
        self._held.pop(key, None)
        if came:
            self._held[key] = None
        if self._news_skipped:
            return
        self._news.pop(key, None)
        self._news[key] = came
        if len(self._news) > NEWS_MAX:
            self._news.clear()
            self._news_skipped = True

    def take_report(self, worker: str) -> Progress | None:
        """What came together since the last one; None when there is nothing to tell."""
        if not (self._moved or self._news or self._busy_ns or self._fetched_tokens):
            return None
        self._sequence += 1
        report = Progress(
            worker=worker,
            sequence=self._sequence,
            jobs=tuple(self._moved.values()),
            stored=b"".join(key for key, came in self._news.items() if came),
            removed=b"".join(key for key, came in self._news.items() if not came),
            busy_ms=round(self._busy_ns / 1e6),
            prefill_tokens=self._prefill_tokens,
            output_tokens=self._output_tokens,
            fetched_tokens=self._fetched_tokens,
            fetch_ms=round(self._fetch_ms),
        )
        self._forget_pending()
        return report

    def take_snapshot(self) -> BlockSnapshot | None:
        """All blocks that are here, as far as it is time to tell."""
        now = self._clock.now_ms()
        if now < self._snapshot_at_ms + (0 if self._held_changed else RENEW_MS - SNAPSHOT_MS):
            return None
        self._snapshot_at_ms = now + SNAPSHOT_MS
        self._held_changed = False
        return BlockSnapshot(self._sequence, _newest(self._held))

    async def run(self, worker: str) -> None:
        """Report for the incarnation `worker` until cancelled."""
        self.begin()
        while True:
            await asyncio.sleep(REPORT_MS / 1000)
            report, snapshot = self.take_report(worker), self.take_snapshot()
            if report is None and snapshot is None:
                continue
            try:
                await self._send(worker, report, snapshot)
            except REDIS_DOWN:
                self._held_changed = True  # what was dropped is told by a snapshot

    async def _send(
        self, worker: str, report: Progress | None, snapshot: BlockSnapshot | None
    ) -> None:
        pipe = self._redis.pipeline(transaction=False)
        if report is not None:
            pipe.xadd(
                keys.events(self._model),
                {"e": encode_progress(report)},
                maxlen=keys.EVENTS_MAX,
                approximate=True,
            )
        if snapshot is not None:
            name = keys.blocks(self._model, worker)
            pipe.set(name, encode_snapshot(snapshot), px=keys.BLOCKS_TTL_MS)
        await pipe.execute()

    async def withdraw(self, worker: str) -> None:
        """`worker` is gone, and so is what it had."""
        with contextlib.suppress(*REDIS_DOWN):
            await self._redis.delete(keys.blocks(self._model, worker))


def _newest(held: dict[bytes, None]) -> bytes:
    """The keys that came last, in their order, at most SNAPSHOT_BLOCKS_MAX of them."""
    kept: Iterable[bytes] = islice(held, max(0, len(held) - SNAPSHOT_BLOCKS_MAX), None)
    return b"".join(kept)
