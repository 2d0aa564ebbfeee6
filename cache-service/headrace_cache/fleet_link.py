"""Tells the fleet through Redis that this service lives, and which blocks it has.

Invariant: all of it is a hint, and none of it the service's own business: without Redis it serves
as before. News that did not reach Redis leave a gap in their numbers, for which readers fetch the
snapshot that follows within SNAPSHOT_MS.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import structlog
from redis.asyncio import Redis

from headrace import keys
from headrace.cache_directory import Directory
from headrace.clock import Clock, SystemClock
from headrace.streams import REDIS_DOWN, connect
from headrace.types import BlockNews, CacheNode
from headrace.wire_cache import encode_news
from headrace_cache.feed import Feed
from headrace_cache.tiers import Tiers

REPORT_MS = 250
BEAT_MS = keys.NODE_LEASE_MS // 3
SWEEP_MS = 60_000
SNAPSHOT_MS = 5_000
"""Between two snapshots of a model while its blocks come and go, ..."""
SNAPSHOT_DUTY = 20
"""... and so many times as long as taking one takes."""
RENEW_MS = keys.BLOCKS_TTL_MS // 3
"""Between two snapshots while nothing changes."""

log = structlog.get_logger(__name__)


class FleetLink:
    """One incarnation of a service, as `address`."""

    def __init__(
        self, redis_url: str, address: str, tiers: Tiers, clock: Clock | None = None
    ) -> None:
        self._redis: Redis = connect(redis_url)
        self._directory = Directory(self._redis)
        self._tiers = tiers
        self._clock = clock or SystemClock()
        self.address = address
        self.boot = secrets.token_hex(8)
        self.feed = Feed(tiers)
        self._snapshot_at_ms: dict[bytes, int] = {}
        self._beat_at_ms = 0
        self._sweep_at_ms = 0
        self._away = False

    @property
    def card(self) -> CacheNode:
        store = self._tiers.store
        return CacheNode(self.address, self.boot, store.budget_bytes, store.used_bytes)

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(REPORT_MS / 1000)

    async def tell(self) -> None:
        """What there is to tell now. Never raises."""
        news = self.feed.take(self.address, self.boot)
        try:
            await self._beat()
            await self._send(news)
            for model in list(self.feed.sequences):
                await self._snapshot(model)
            self._away = False
        except REDIS_DOWN as error:
            if not self._away:
                log.warning("redis is away, the fleet is not told", error=str(error))
            self._away = True

    async def _beat(self) -> None:
        now_ms = self._clock.now_ms()
        if now_ms >= self._beat_at_ms:
            await self._directory.announce(self.card)
            self._beat_at_ms = now_ms + BEAT_MS
        if now_ms >= self._sweep_at_ms:
            await self._directory.sweep()
            self._sweep_at_ms = now_ms + SWEEP_MS

    async def _send(self, news: list[tuple[bytes, BlockNews]]) -> None:
        if not news:
            return
        pipe = self._redis.pipeline(transaction=False)
        for model, each in news:
            pipe.xadd(
                keys.cache_events(model),
                {"n": encode_news(each)},
                maxlen=keys.CACHE_EVENTS_MAX,
                approximate=True,
            )
        await pipe.execute()

    async def _snapshot(self, model: bytes) -> None:
        changed = model in self.feed.changed
        now_ms = self._clock.now_ms()
        if now_ms < self._snapshot_at_ms.get(model, 0) + (0 if changed else RENEW_MS - SNAPSHOT_MS):
            return
        self.feed.changed.discard(model)
        sequence = self.feed.sequences[model]
        pieces = []
        for piece in self.feed.snapshot(model):
            pieces.append(piece)
            await asyncio.sleep(0)
        snapshot = BlockNews(self.address, self.boot, sequence, b"".join(pieces))
        name = keys.cache_blocks(model, self.address)
        took_ms = self._clock.now_ms() - now_ms
        self._snapshot_at_ms[model] = now_ms + max(SNAPSHOT_MS, SNAPSHOT_DUTY * took_ms)
        try:
            await self._redis.set(name, encode_news(snapshot), px=keys.BLOCKS_TTL_MS)
        except REDIS_DOWN:
            self.feed.changed.add(model)
            raise

    async def close(self) -> None:
        """Say that the service is gone."""
        with contextlib.suppress(*REDIS_DOWN):
            async with asyncio.timeout(1.0):
                await self._directory.withdraw(self.card)
                names = [keys.cache_blocks(model, self.address) for model in self.feed.sequences]
                if names:
                    await self._redis.delete(*names)
        await self._redis.aclose()
