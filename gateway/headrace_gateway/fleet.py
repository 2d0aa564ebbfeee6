"""The fleet as a gateway sees it: which models there are, and how a job gets to them.

Invariant: this is the only part of the gateway that the API talks to; it knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from opentelemetry.trace import Span
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.clock import Clock, SystemClock
from headrace.errors import DependencyError, NotFoundError, WireError
from headrace.streams import REDIS_DOWN, as_bytes, connect
from headrace.types import Job, ModelRecord
from headrace_gateway.channel import Channel
from headrace_gateway.generation import Generation
from headrace_gateway.limits import Limiter
from headrace_gateway.policy.admission import Admission, AdmissionLimits, Ask
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.shared_flights import SharedFlights

log = structlog.get_logger()

DISCOVER_EVERY_MS = 300
HEARTBEAT_EVERY_MS = 1_500


class Fleet:
    """All channels of one gateway."""

    def __init__(
        self,
        redis_url: str,
        gateway_id: str,
        *,
        host: str = "",
        port: int = 0,
        clock: Clock | None = None,
        limits: AdmissionLimits | None = None,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """`on_broken` is called when a loop died of a bug of ours: only a new start helps then."""
        self.gateway_id = gateway_id
        self._url = redis_url
        self._clock = clock or SystemClock()
        self._limits = limits or AdmissionLimits()
        self._redis: Redis = connect(redis_url)
        self.limiter = Limiter(self._redis, self._clock)
        self._channels: dict[str, Channel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._redis_error = "not connected yet"
        self._broken = ""
        self._on_broken = on_broken
        self._card = {
            "id": gateway_id,
            "pid": os.getpid(),
            "host": host,
            "port": port,
            "started": self._clock.wall_ms(),
        }

    async def start(self) -> None:
        self._spawn(self._discover_loop())
        self._spawn(self._heartbeat_loop())
        self._spawn(self.limiter.run())

    def _spawn(self, loop: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(loop)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A loop that ends by itself is our bug: say so, and be unready until restarted."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a gateway loop died", error=repr(error), exc_info=error)
            self._broken = repr(error)
            if self._on_broken is not None:
                self._on_broken()

    async def stop(self) -> None:
        """End the loops; leads no more. Jobs that still run go on in their workers."""
        for channel in self._channels.values():
            await channel.settle()
        await self.limiter.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(*REDIS_DOWN):
            await self._redis.delete(keys.gateway(self.gateway_id))
        await self._redis.aclose()

    def models(self) -> list[ModelRecord]:
        """Every model that some worker has announced."""
        return [channel.record for channel in self._channels.values()]

    def model(self, name: str) -> ModelRecord:
        """The record of `name`. Raises NotFoundError."""
        return self._channel(name).record

    def ready(self) -> str:
        """'' when requests can be served, else why not."""
        if self._broken:
            return f"a loop of this gateway died: {self._broken}"
        if self._redis_error:
            return f"redis: {self._redis_error}"
        if not self._channels:
            return "no model is known yet"
        boards = [channel.board for channel in self._channels.values()]
        if not any(board is not None and board.workers > 0 for board in boards):
            return "no worker is ready"
        return ""

    def lengths(self, model: str) -> Lengths:
        """What this gateway has learned of `model`'s generations. Raises NotFoundError."""
        return self._channel(model).lengths

    def calm(self, model: str) -> bool:
        """Whether nobody waits for a worker of `model`. Raises NotFoundError."""
        return self._channel(model).calm

    def admit(self, model: str, ask: Ask) -> Admission:
        """Whether `ask` may enter now; costs no round trip. Raises NotFoundError."""
        return self._channel(model).admit(ask)

    def submit(self, job: Job, span: Span) -> Coroutine[Any, Any, Generation]:
        """Admit and durably accept `job`.

        Raises NotFoundError, OverloadError (429 with retry_after_ms) or DependencyError (503).
        """
        return self._channel(job.model).submit(job, span)

    def held_tokens(self, model: str, blocks: bytes) -> int:
        """Tokens of a prompt of these `blocks` (as Job has them) that the cache services spare.

        Raises NotFoundError.
        """
        return self._channel(model).held_tokens(blocks)

    def flights(self, model: str) -> SharedFlights:
        """What all gateways compute of `model` that may be shared. Raises NotFoundError."""
        return self._channel(model).flights

    def counts(self) -> dict[str, int]:
        """What this gateway holds; all zero when nothing streams."""
        channels = self._channels.values()
        counts = {
            "live_generations": sum(len(channel.replies.live) for channel in channels),
            "unread_tokens": sum(channel.replies.unread_tokens for channel in channels),
        }
        for name in ("led_flights", "followed_flights"):
            counts[name] = sum(channel.flights.counts()[name] for channel in channels)
        return counts

    def queued(self) -> dict[str, tuple[int, int, int]]:
        """Waiting jobs per band for each model, as the dispatcher published them."""
        return {
            name: channel.board.queued if channel.board else (0, 0, 0)
            for name, channel in self._channels.items()
        }

    def _channel(self, name: str) -> Channel:
        channel = self._channels.get(name)
        if channel is None and self._redis_error:
            raise DependencyError(
                f"the model registry is out of reach: {self._redis_error}", retry_after_ms=1_000
            )
        if channel is None:
            known = ", ".join(sorted(self._channels)) or "none yet"
            raise NotFoundError(
                f"the model {name[:200]!r} does not exist; models served here: {known}",
                param="model",
                code="model_not_found",
            )
        return channel

    async def _discover_loop(self) -> None:
        while True:
            try:
                fingerprints = await self._redis.hgetall(keys.MODELS)
                for raw_name, fingerprint in fingerprints.items():
                    await self._open(as_bytes(raw_name).decode(), as_bytes(fingerprint).decode())
                self._redis_error = ""
            except REDIS_DOWN as error:
                self._redis_error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(DISCOVER_EVERY_MS / 1000)

    async def _open(self, name: str, fingerprint: str) -> None:
        """Open a channel for a new model; take up the record of a changed one."""
        channel = self._channels.get(name)
        if channel is not None and channel.record.fingerprint == fingerprint:
            return
        raw = await self._redis.get(keys.record(name))
        if raw is None:
            return
        try:
            record = wire.decode_model(as_bytes(raw))
        except WireError as error:
            log.error("model record unreadable", model=name, error=error.message)
            return
        if channel is not None:
            channel.record = record
            return
        channel = Channel(
            self._url, self._redis, record, self.gateway_id, self._clock, self._limits
        )
        self._channels[name] = channel
        for part in channel.parts():
            self._spawn(part)
        log.info("model found", model=name, context=record.context_tokens)

    async def _heartbeat_loop(self) -> None:
        card: dict[str, Any] = self._card
        while True:
            with contextlib.suppress(*REDIS_DOWN):
                await self._redis.set(
                    keys.gateway(self.gateway_id), wire.pack(card), px=keys.GATEWAY_LEASE_MS
                )
            await asyncio.sleep(HEARTBEAT_EVERY_MS / 1000)
