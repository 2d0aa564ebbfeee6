"""The lease by which one gateway leads a model's dispatching.

Invariant: holding the lease is only a hint to the holder; each script that changes anything checks
the lease itself, so a leader that was paused finds out before it does harm.
"""

from __future__ import annotations

import secrets

from headrace import keys, scripts
from headrace.streams import Scripts


class Deposed(Exception):
    """Somebody else leads; this term is over."""


class Lease:
    """One gateway's claim to lead `model`. `token` is unique to this claimant."""

    def __init__(self, lua: Scripts, model: str, gateway_id: str) -> None:
        self._lua = lua
        self._key, self._board = keys.leader(model), keys.board(model)
        self.token = f"{gateway_id}:{secrets.token_hex(4)}"

    async def hold(self) -> bool:
        """Take the lease when it is free, renew it when it is ours; False when another has it."""
        answer = await self._lua.call(scripts.HOLD, [self._key], [self.token, keys.LEADER_LEASE_MS])
        return bool(answer == 1)

    async def release(self) -> None:
        await self._lua.call(scripts.RELEASE, [self._key, self._board], [self.token])
