"""Which cache services there are: each says so in Redis while it lives, clients read it.

Invariant: a hint. A service that is missing here costs what it had, one that is here but away is
skipped by its client's breaker. While Redis is away, or has just come back and knows nobody yet,
those known last count on for KEEP_MS.
"""

from __future__ import annotations

import contextlib

import structlog
from redis.asyncio import Redis

from headrace import keys
from headrace.cache_client import CacheClient
from headrace.cache_cluster import Cache, CacheCluster
from headrace.clock import Clock, SystemClock
from headrace.errors import SettingsError, WireError
from headrace.frames import parse_address
from headrace.policy.cache_nodes import NODES_MAX, Node
from headrace.streams import REDIS_DOWN, as_bytes, connect
from headrace.types import CacheNode
from headrace.wire_cache import decode_node, encode_node

AUTO = "auto"
"""A cache URL that means: those that Redis knows."""
KEEP_MS = 5_000

log = structlog.get_logger(__name__)


class Directory:
    """The services that Redis knows. Raises what redis-py raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def announce(self, node: CacheNode) -> None:
        """`node` lives, for NODE_LEASE_MS from now on."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.sadd(keys.CACHE_NODES, node.address)
        pipe.set(keys.cache_node(node.address), encode_node(node), px=keys.NODE_LEASE_MS)
        await pipe.execute()

    async def withdraw(self, node: CacheNode) -> None:
        """`node` is gone, unless another incarnation has taken its address."""
        raw = await self._redis.get(keys.cache_node(node.address))
        with contextlib.suppress(WireError):
            if raw is not None and decode_node(as_bytes(raw)).boot != node.boot:
                return
        pipe = self._redis.pipeline(transaction=False)
        pipe.srem(keys.CACHE_NODES, node.address)
        pipe.delete(keys.cache_node(node.address))
        await pipe.execute()

    async def nodes(self) -> list[CacheNode]:
        """Those that live, by address, at most NODES_MAX."""
        names = sorted(as_bytes(n).decode() for n in await self._redis.smembers(keys.CACHE_NODES))
        raws = await self._redis.mget([keys.cache_node(n) for n in names]) if names else []
        found = []
        for name, raw in zip(names, raws, strict=True):
            try:
                node = decode_node(as_bytes(raw)) if raw is not None else None
                if node is not None and node.address == name:
                    found.append(node)
            except WireError as error:
                log.warning("cache node unreadable", node=name, error=error.message)
        return found[:NODES_MAX]

    async def sweep(self) -> None:
        """Forget the addresses whose services have not said for a lease that they live."""
        alive = {node.address for node in await self.nodes()}
        known = {as_bytes(n).decode() for n in await self._redis.smembers(keys.CACHE_NODES)}
        if known - alive:
            # one that was only late says so again with its next heartbeat
            await self._redis.srem(keys.CACHE_NODES, *(known - alive))


class Followed:
    """The nodes of a directory as a cluster's `source`; connects when first asked."""

    def __init__(self, redis_url: str, clock: Clock | None = None) -> None:
        self._url = redis_url
        self._clock = clock or SystemClock()
        self._redis: Redis | None = None
        self._seen: dict[str, tuple[CacheNode, int]] = {}

    async def nodes(self) -> list[Node] | None:
        """All nodes; None while Redis does not answer."""
        if self._redis is None:
            self._redis = connect(self._url)
        try:
            found = await Directory(self._redis).nodes()
        except REDIS_DOWN as error:
            log.debug("cache nodes unknown, redis is away", error=str(error))
            return None
        return self._note(found, self._clock.now_ms())

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    def _note(self, found: list[CacheNode], now_ms: int) -> list[Node]:
        for node in found:
            if _is_address(node.address):
                self._seen[node.address] = (node, now_ms)
        self._seen = {
            name: (node, at_ms)
            for name, (node, at_ms) in self._seen.items()
            if now_ms - at_ms < KEEP_MS
        }
        return [Node(name, float(node.budget_bytes)) for name, (node, _) in self._seen.items()]


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except SettingsError:
        return False
    return True


def open_cache(
    urls: str, redis_url: str, *, timeout_s: float, clock: Clock | None = None, arena: bool = True
) -> Cache:
    """The client for what a setting names: one address, several with commas, or AUTO.

    Raises SettingsError for anything else.
    """
    names = [name.strip() for name in urls.split(",") if name.strip()]
    if names == [AUTO]:
        source = Followed(redis_url, clock)
        return CacheCluster(timeout_s=timeout_s, clock=clock, arena=arena, source=source)
    if len(names) == 1:
        return CacheClient(names[0], timeout_s=timeout_s, clock=clock, arena=arena)
    return CacheCluster(map(Node, names), timeout_s=timeout_s, clock=clock, arena=arena)
