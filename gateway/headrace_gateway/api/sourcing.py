"""Where one turn's choices get their tokens: the fleet, a request that is the same, or an entry.

Invariant: sharing is for tenants that opted in and for deterministic jobs; all others go straight
to the fleet. Whatever way it is, a choice gets its tokens from something that looks like a
generation, so that text, finish and logprobs come about in one way only.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from opentelemetry.trace import Span, SpanKind

from headrace import telemetry
from headrace.types import Finish, FinishReason, Job, ModelRecord
from headrace_gateway.api.context import Gateway, GenerationSeam
from headrace_gateway.api.wishes import Wish
from headrace_gateway.choices import Choice
from headrace_gateway.generation import Chunk
from headrace_gateway.policy.sharing import is_deterministic, request_key
from headrace_gateway.prompt_cache import Asked, Tracked, Way
from headrace_gateway.tenants import Tenant

WAY_ATTRIBUTE = "headrace.prompt_cache.way"


class Silent:
    """A generation none of whose tokens are told; it ends as one that had nothing to say."""

    def __init__(self, source: GenerationSeam) -> None:
        self._source = source

    async def next(self) -> Chunk:
        chunk = await self._source.next()
        finish = chunk.finish
        if finish is not None and finish.reason is FinishReason.LENGTH:
            finish = Finish(FinishReason.STOP)
        return replace(chunk, tokens=(), logprobs=(), finish=finish)

    async def cancel(self) -> None:
        await self._source.cancel()


class Sources:
    """One turn's, by choice index."""

    def __init__(self, gateway: Gateway, tenant: Tenant, span: Span) -> None:
        self._gateway = gateway
        self._tenant = tenant
        self._span = span
        self._tracked: dict[int, Tracked] = {}
        self._opened = 0
        self._silent = False

    @property
    def cached(self) -> bool:
        """Whether nothing had to be computed for the whole turn."""
        ways = [source.way for source in self._tracked.values()]
        return bool(ways) and len(ways) == self._opened and set(ways) == {Way.ENTRY}

    def teaches(self, index: int) -> bool:
        """Whether the choice says something of how long this tenant's outputs are."""
        source = self._tracked.get(index)
        return not self._silent and (source is None or source.way is Way.COMPUTED)

    async def open(self, index: int, job: Job, record: ModelRecord, wish: Wish) -> GenerationSeam:
        """The source of choice `index`. Raises what the fleet refuses `job` with."""
        seeded = wish.seed is not None
        self._silent = wish.caching.prewarm
        if self._silent:
            source: GenerationSeam = Silent(await self._submit(job))
        elif not self._tenant.prompt_entries or not is_deterministic(job.sampling, seeded=seeded):
            source = await self._submit(job)
        else:
            key = request_key(
                record.fingerprint, job.salt, job.prompt, job.sampling, _reading(wish)
            )
            source = self._tracked[index] = await self._shared(key, job, record)
        self._opened += 1
        return source

    async def _shared(self, key: bytes, job: Job, record: ModelRecord) -> Tracked:
        span = telemetry.tracer().start_span(
            "prompt cache", telemetry.under(self._span), SpanKind.CLIENT
        )
        try:
            elsewhere = self._gateway.fleet.flights(record.name)
            asked = Asked(key, job, record, self._submit, telemetry.inject(span), elsewhere)
            source = await self._gateway.prompt_cache.open(asked)
            span.set_attribute(WAY_ATTRIBUTE, source.way.value)
            span.set_attribute("headrace.prompt_cache.saved_ms", source.saved_ms)
        finally:
            span.end()
        metrics = self._gateway.metrics
        metrics.prompt_answers.labels(record.name, source.way.value).inc()
        metrics.prompt_saved.labels(record.name).inc(source.saved_ms / 1000)
        return source

    def _submit(self, job: Job) -> Coroutine[Any, Any, GenerationSeam]:
        return self._gateway.fleet.submit(job, self._span)

    def ended(self, choice: Choice) -> None:
        """The choice came to its end: what it was made of is worth keeping."""
        source = self._tracked.get(choice.index)
        if source is not None and choice.finish in (FinishReason.STOP, FinishReason.LENGTH):
            source.keep(choice.finish, choice.completion_tokens)


def _reading(wish: Wish) -> Sequence[Any]:
    """What decides where a choice's text ends, and with it its generation."""
    rules, tools = wish.rules, wish.tools
    calls: list[Any] = []
    if tools is not None:
        calls = [
            tools.dialect.format.value,
            sorted(tools.offer.names),
            tools.offer.parallel,
            sorted(tools.markers.items()),
        ]
    return [
        list(rules.stops),
        rules.keep_stop,
        rules.min_tokens,
        sorted(rules.silent),
        rules.score_end,
        calls,
    ]
