"""Keeps the dispatcher's picture of the cache services in step with what they tell.

Invariant: a hint, and nobody waits for it: while Redis is away, or where services tell nothing,
routing goes by the workers' blocks alone.
"""

from __future__ import annotations

import asyncio

import structlog
from redis.asyncio import Redis

from headrace import keys
from headrace.cache_directory import Directory
from headrace.errors import WireError
from headrace.policy.hashing import model_tag
from headrace.streams import REDIS_DOWN, Entry, Tail, as_bytes
from headrace.wire_cache import decode_news
from headrace_gateway.policy.shared_index import SharedIndex

REFRESH_MS = 1_000

log = structlog.get_logger()


class SharedWatch:
    """One term's view of what the cache services hold of one model."""

    def __init__(self, url: str, redis: Redis, model: str, index: SharedIndex) -> None:
        self._url = url
        self._redis = redis
        self._model = model
        self._index = index
        self._directory = Directory(redis)
        self._tag = b""
        self._tail: Tail | None = None
        self._wanted: dict[str, None] = {}

    async def run(self) -> None:
        """Follow until cancelled; close then."""
        try:
            while True:
                try:
                    await self._begin()
                    break
                except REDIS_DOWN:
                    await asyncio.sleep(REFRESH_MS / 1000)
            assert self._tail is not None, "begun"
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._refresh_loop())
                tasks.create_task(self._read(self._tail))
        finally:
            if self._tail is not None:
                await self._tail.close()

    async def _begin(self) -> None:
        """Find out the model's tag, and from where on to read. Raises what redis-py raises."""
        fingerprint = await self._redis.hget(keys.MODELS, self._model)
        self._tag = model_tag(as_bytes(fingerprint or b"").decode())
        if self._tail is None:
            self._tail = Tail(self._url, keys.cache_events(self._tag), after="$")
        # before any snapshot is read: what it lacks is then in the stream
        await self._tail.settle()

    async def _read(self, tail: Tail) -> None:
        async for entries in tail:
            for entry in entries:
                self._note(entry)

    def _note(self, entry: Entry) -> None:
        try:
            news = decode_news(entry.data)
        except WireError as error:
            log.warning("block news unreadable, skipped", model=self._model, error=error.message)
            return
        if not self._index.note(news):
            self._wanted[news.address] = None

    async def _refresh_loop(self) -> None:
        while True:
            try:
                await self.refresh()
            except REDIS_DOWN as error:
                log.debug("cache services unknown, redis is away", error=str(error))
            await asyncio.sleep(REFRESH_MS / 1000)

    async def refresh(self) -> None:
        """Forget services that are gone, read the snapshots of new ones and where news were missed.

        Raises what redis-py raises.
        """
        alive = [node.address for node in await self._directory.nodes()]
        self._index.keep_only(alive)
        known = set(self._index.nodes)
        wanted = [name for name in alive if name in self._wanted or name not in known]
        self._wanted.clear()
        if not wanted:
            return
        raws = await self._redis.mget([keys.cache_blocks(self._tag, name) for name in wanted])
        for name, raw in zip(wanted, raws, strict=True):
            try:
                if raw is not None and not self._index.snapshot(decode_news(as_bytes(raw))):
                    self._wanted[name] = None
            except WireError as error:
                log.warning("block snapshot unreadable", node=name, error=error.message)
