"""The lease by which one gateway leads a model's dispatching.

Invariant: each term has a token of its own, and a lease that ran out is never renewed: what a
paused leader remembers may be long untrue. Holding the lease is only a hint to the holder; each
script that changes anything checks the token itself.
"""

from __future__ import annotations

import secrets

from redis.asyncio import Redis

from headrace import keys, scripts
from headrace.streams import Scripts


class Deposed(Exception):
    """Somebody else leads, or may have led; this term is over."""


class Lease:
    """One gateway's claim to lead `model`. `token` is the present term's."""

    def __init__(self, redis: Redis, lua: Scripts, model: str, gateway_id: str) -> None:
        self._redis = redis
        self._lua = lua
        self._gateway_id = gateway_id
        self._key, self._board = keys.leader(model), keys.board(model)
        self.token = ""

    async def take(self) -> bool:
        """Begin a term if nobody leads."""
        self.token = f"{self._gateway_id}:{secrets.token_hex(4)}"
        taken = await self._redis.set(self._key, self.token, nx=True, px=keys.LEADER_LEASE_MS)
        return bool(taken)

    async def renew(self) -> bool:
        """False when the term is over."""
        answer = await self._lua.call(
            scripts.RENEW, [self._key], [self.token, keys.LEADER_LEASE_MS]
        )
        return bool(answer == 1)

    async def release(self) -> None:
        await self._lua.call(scripts.RELEASE, [self._key, self._board], [self.token])
