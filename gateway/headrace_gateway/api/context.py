"""What every handler gets: the gateway's parts, and who is calling.

Invariant: handlers reach the fleet through `FleetSeam` alone, so that the API is tested without
Redis and the fleet without HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web
from opentelemetry.trace import Span

from headrace.cache_cluster import Cache
from headrace.cache_directory import open_cache
from headrace.clock import Clock
from headrace.errors import DependencyError
from headrace.types import Job, ModelRecord
from headrace_gateway.generation import Chunk
from headrace_gateway.grammar_check import GrammarChecker
from headrace_gateway.limits import Limiter
from headrace_gateway.metrics import GatewayMetrics
from headrace_gateway.policy.admission import Admission, Ask
from headrace_gateway.policy.lengths import Lengths
from headrace_gateway.prompt_cache import Elsewhere, PromptCache
from headrace_gateway.prompt_entries import PromptEntries
from headrace_gateway.settings import GatewaySettings
from headrace_gateway.templates import ChatTemplates
from headrace_gateway.tenants import Tenant, Tenants
from headrace_gateway.tokens import Tokenizers
from headrace_gateway.tools.dialects import Dialects

if TYPE_CHECKING:
    from headrace_gateway.api.turn import Turn

DRAIN_POLL_S = 0.05
DRAIN_RETRY_MS = 1_000


class GenerationSeam(Protocol):
    """A running job, as `headrace_gateway.generation` defines it."""

    async def next(self) -> Chunk: ...

    async def cancel(self) -> None: ...


class FleetSeam(Protocol):
    """The fleet, as `headrace_gateway.fleet` defines it."""

    gateway_id: str
    limiter: Limiter

    def models(self) -> list[ModelRecord]: ...

    def model(self, name: str) -> ModelRecord: ...

    def ready(self) -> str: ...

    def lengths(self, model: str) -> Lengths: ...

    def admit(self, model: str, ask: Ask) -> Admission: ...

    def held_tokens(self, model: str, blocks: bytes) -> int: ...

    def calm(self, model: str) -> bool: ...

    def flights(self, model: str) -> Elsewhere | None: ...

    def submit(self, job: Job, span: Span) -> Coroutine[Any, Any, GenerationSeam]: ...

    def counts(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One request, or one turn on a WebSocket, before anything in it is understood.

    `trace` are the client's W3C headers, `deadline` and `session` our own as they were sent, '' for
    none. `arrived_ms` is on the gateway's monotonic clock. What a handler puts into `reply_headers`
    goes out with the response, also with an error.
    """

    tenant: Tenant
    operation: str
    attributes: dict[str, str]
    trace: dict[str, str]
    arrived_ms: int
    reply_headers: dict[str, str] = field(default_factory=dict)
    deadline: str = ""
    session: str = ""


class Gateway:
    """The parts of one gateway, and what it is doing right now."""

    def __init__(
        self, settings: GatewaySettings, fleet: FleetSeam, tenants: Tenants, clock: Clock
    ) -> None:
        self.settings = settings
        self.fleet = fleet
        self.tenants = tenants
        self.clock = clock
        self.tokenizers = Tokenizers()
        self.templates = ChatTemplates(clock)
        self.dialects = Dialects(self.templates)
        self.grammars = GrammarChecker()
        self.cache = _cache_of(settings, clock)
        entries = None if self.cache is None else PromptEntries(self.cache)
        self.prompt_cache = PromptCache(entries, clock)
        self.metrics = GatewayMetrics(self.counts)
        self.turns: set[Turn] = set()
        self.sockets: set[web.WebSocketResponse] = set()
        self.draining = False
        self.started_ms = clock.now_ms()

    def counts(self) -> dict[str, int]:
        """What is open here; all zero when nobody is being served."""
        return (
            self.fleet.counts()
            | self.prompt_cache.counts()
            | {"active_turns": len(self.turns), "open_websockets": len(self.sockets)}
        )

    def ready(self) -> str:
        """'' when requests are taken, else why not."""
        return "draining: this gateway is shutting down" if self.draining else self.fleet.ready()

    def check_open(self) -> None:
        """Raises DependencyError (503) once the gateway drains."""
        if self.draining:
            raise DependencyError(
                "this gateway is shutting down; send the request again",
                code="draining",
                retry_after_ms=DRAIN_RETRY_MS,
            )

    async def drain(self) -> bool:
        """Take nothing new and wait for what runs, at most `drain_ms`; whether all ended."""
        self.draining = True
        deadline_ms = self.clock.now_ms() + self.settings.drain_ms
        while self.turns and self.clock.now_ms() < deadline_ms:
            await asyncio.sleep(DRAIN_POLL_S)
        return not self.turns


def _cache_of(settings: GatewaySettings, clock: Clock) -> Cache | None:
    if not settings.cache_url:
        return None
    # what a gateway reads is small: it does not need the service's memory
    timeout_s = settings.cache_timeout_ms / 1000
    return open_cache(
        settings.cache_url, settings.redis_url, timeout_s=timeout_s, clock=clock, arena=False
    )


GATEWAY = web.AppKey("gateway", Gateway)
TENANT = web.RequestKey("tenant", Tenant)
REPLY_HEADERS = web.RequestKey("reply_headers", dict[str, str])
