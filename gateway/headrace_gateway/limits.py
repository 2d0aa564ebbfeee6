"""What one API key may use, exact over all gateways: requests, tokens, how many run at once.

Invariant: a request takes all that it needs in one step of Redis, or nothing; whichever gateway it
comes to, the sum never exceeds the key's limits, but for output that gets longer than predicted,
which is charged at the end and delays what comes next. Use drains evenly over a minute and a whole
minute may be used at once (GCRA). A running request holds a lease, so that what a dead gateway
held is free again within LEASE_MS. Keys without limits cost no call.
Rejected: counters by calendar minute, which let twice the limit through around its turn; a share
for each gateway, which is exact only where load balancing is.
Source of the algorithm: ATM Forum, generic cell rate algorithm, as a continuous leaky bucket.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis

from headrace import keys, scripts
from headrace.clock import Clock
from headrace.errors import DependencyError, OverloadError
from headrace.streams import REDIS_DOWN, Scripts
from headrace_gateway.tenants import KeyLimits

log = structlog.get_logger()

CODE = "rate_limit_exceeded"
MINUTE_MS = 60_000
LEASE_MS = 30_000
RENEW_EVERY_MS = 10_000
RETRY_MS_MIN = 1
FREE_MS_UNKNOWN = 1_000
FREE_MS_MIN, FREE_MS_MAX = 50, 60_000
"""Bounds of the guess when one of a key's running requests ends."""
HELD_WEIGHT = 0.2
"""What the newest duration counts in their running mean."""


@dataclass(slots=True)
class Grant:
    """What a request has taken; to be settled once. `lease` is unique over all gateways."""

    limits: KeyLimits
    lease: str
    tokens: int
    taken_ms: int


@dataclass(slots=True)
class _Seen:
    """What was last heard of a key, at `at_ms` on our monotonic clock."""

    requests: float = 0.0
    tokens: float = 0.0
    at_ms: int = 0
    held_ms: float = 0.0
    full_until_ms: int = 0


class Limiter:
    """The limits of all keys, as one gateway applies them."""

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self._redis = redis
        self._lua = Scripts(redis)
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._running: dict[str, Grant] = {}
        self._chores: set[asyncio.Task[None]] = set()

    def check(self, limits: KeyLimits) -> None:
        """Refuse what is known to be refused, without asking. Raises OverloadError (429)."""
        wait_ms = self._seen.get(limits.id, _Seen()).full_until_ms - self._clock.now_ms()
        if wait_ms > 0:
            raise _refusal("requests", limits, wait_ms)

    async def take(self, limits: KeyLimits, lease: str, tokens: int) -> Grant:
        """Take one request of `tokens` (prompt and expected output), or nothing.

        Raises OverloadError (429), DependencyError (503) when Redis is away.
        """
        if 0 < limits.tokens_per_minute < tokens:
            raise OverloadError(
                f"the request needs {tokens} tokens, this key may use "
                f"{limits.tokens_per_minute} a minute: make it shorter",
                code=CODE,
            )
        try:
            answer = await self._lua.call(
                scripts.LIMIT_TAKE,
                _names(limits),
                [lease, *_per_minute(limits), limits.concurrency, tokens, LEASE_MS],
            )
        except BaseException as error:
            # whether it was taken is unknown (time-out, client gone); its place at least is free
            self._start(self._forget(limits.id, lease))
            if not isinstance(error, REDIS_DOWN):
                raise
            raise DependencyError(
                "the key's limits are out of reach, nothing was accepted", retry_after_ms=1_000
            ) from error
        reason, wait_us, *used = answer
        seen = self._note(limits, used)
        if reason:
            self._refuse(reason.decode(), limits, seen, math.ceil(float(wait_us) / 1000))
        grant = Grant(limits, lease, tokens, self._clock.now_ms())
        self._running[lease] = grant
        return grant

    async def settle(self, grant: Grant, tokens: int, *, counts: bool = True) -> None:
        """The request ended and used `tokens`; one that does not count was never accepted.

        Harmless a second time. Goes on when it is cancelled, and never raises otherwise: what Redis
        does not hear of ends with its lease.
        """
        chore = self.settle_soon(grant, tokens, counts=counts)
        if chore is not None:
            await asyncio.shield(chore)

    def settle_soon(
        self, grant: Grant, tokens: int, *, counts: bool = True
    ) -> asyncio.Task[None] | None:
        """`settle` in the background."""
        if self._running.pop(grant.lease, None) is None:
            return None
        if counts:
            self._note_held(grant)
        return self._start(self._settle(grant, tokens - grant.tokens, 0 if counts else -1))

    async def _settle(self, grant: Grant, tokens: int, requests: int) -> None:
        limits = grant.limits
        try:
            used = await self._lua.call(
                scripts.LIMIT_SETTLE,
                _names(limits),
                [grant.lease, *_per_minute(limits), requests, tokens],
            )
        except REDIS_DOWN as error:
            log.warning("a key's use could not be settled", error=str(error))
        else:
            self._note(limits, used)

    def _start(self, chore: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task

    async def run(self) -> None:
        """Keep the leases of what runs here, until cancelled."""
        while True:
            await asyncio.sleep(RENEW_EVERY_MS / 1000)
            await self.renew()

    async def renew(self) -> None:
        """One call for each key that has something running."""
        running: dict[str, list[str]] = {}
        for grant in self._running.values():
            if grant.limits.concurrency:
                running.setdefault(grant.limits.id, []).append(grant.lease)
        for key_id, leases in running.items():
            try:
                await self._lua.call(
                    scripts.LIMIT_RENEW, [keys.limit_running(key_id)], [LEASE_MS, *leases]
                )
            except REDIS_DOWN as error:
                log.warning("leases could not be renewed", error=str(error))
                return
            # those that ended meanwhile must not stand there again
            for lease in leases:
                if lease not in self._running:
                    self._start(self._forget(key_id, lease))

    async def _forget(self, key_id: str, lease: str) -> None:
        try:
            await self._redis.zrem(keys.limit_running(key_id), lease)
        except REDIS_DOWN as error:
            log.warning("a lease could not be given back", error=str(error))

    async def close(self) -> None:
        """Wait for what is being settled."""
        if self._chores:
            await asyncio.wait(set(self._chores))

    def headers(self, limits: KeyLimits) -> dict[str, str]:
        """OpenAI's rate limit headers, from what was last heard of the key."""
        seen = self._seen.get(limits.id, _Seen(at_ms=self._clock.now_ms()))
        elapsed_ms = self._clock.now_ms() - seen.at_ms
        made: dict[str, str] = {}
        for name, limit, stored in (
            ("requests", limits.requests_per_minute, seen.requests),
            ("tokens", limits.tokens_per_minute, seen.tokens),
        ):
            if limit:
                used = max(0.0, stored - elapsed_ms * limit / MINUTE_MS)
                reset_ms = math.ceil(used * MINUTE_MS / limit)
                made[f"x-ratelimit-limit-{name}"] = str(limit)
                made[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(limit - used)))
                made[f"x-ratelimit-reset-{name}"] = spell_duration(reset_ms)
        return made

    def _note(self, limits: KeyLimits, used: list[bytes]) -> _Seen:
        seen = self._seen.setdefault(limits.id, _Seen())
        seen.requests, seen.tokens = map(float, used)
        seen.at_ms = self._clock.now_ms()
        return seen

    def _note_held(self, grant: Grant) -> None:
        seen = self._seen.setdefault(grant.limits.id, _Seen())
        held_ms = self._clock.now_ms() - grant.taken_ms
        old = seen.held_ms or held_ms
        seen.held_ms = (1 - HELD_WEIGHT) * old + HELD_WEIGHT * held_ms

    def _refuse(self, reason: str, limits: KeyLimits, seen: _Seen, wait_ms: int) -> None:
        if reason == "requests":
            seen.full_until_ms = self._clock.now_ms() + wait_ms
        if reason == "concurrency":
            guess = seen.held_ms / limits.concurrency if seen.held_ms else FREE_MS_UNKNOWN
            wait_ms = max(FREE_MS_MIN, min(FREE_MS_MAX, round(guess)))
        raise _refusal(reason, limits, max(RETRY_MS_MIN, wait_ms))


def _refusal(reason: str, limits: KeyLimits, wait_ms: int) -> OverloadError:
    said = {
        "requests": f"{limits.requests_per_minute} requests a minute",
        "tokens": f"{limits.tokens_per_minute} tokens a minute",
        "concurrency": f"{limits.concurrency} requests at once",
    }
    return OverloadError(
        f"this key may use {said[reason]}: try again in {spell_duration(wait_ms)}",
        code=CODE,
        retry_after_ms=wait_ms,
    )


def _names(limits: KeyLimits) -> list[str]:
    return [keys.limit_used(limits.id), keys.limit_running(limits.id)]


def _per_minute(limits: KeyLimits) -> tuple[int, int]:
    return limits.requests_per_minute, limits.tokens_per_minute


def spell_duration(milliseconds: int) -> str:
    """As OpenAI's headers spell it: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    seconds, rest = divmod(milliseconds, 1_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    spelled = f"{seconds}.{rest:03}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{spelled}"
    return f"{minutes}m{spelled}" if minutes else spelled
