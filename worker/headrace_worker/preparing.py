"""What a job needs of others before the engine takes it in: its grammar, and KV that is cached.

Invariant: neither runs in the event loop or the engine's thread for long, and a cache that fails
costs time, never the job.
"""

from __future__ import annotations

import asyncio

import structlog
from opentelemetry.trace import Span

from headrace.clock import Clock
from headrace.grammars import Grammars, Matcher
from headrace.types import BLOCK_TOKENS, Job, ModelRecord
from headrace_worker.cache_link import CacheLink
from headrace_worker.reporter import Reporter
from headrace_worker.results import MissingRun, Outlook
from headrace_worker.ticket import Ticket

log = structlog.get_logger()


class Preparation:
    """For one worker's jobs."""

    def __init__(
        self, record: ModelRecord, cache: CacheLink | None, reporter: Reporter, clock: Clock
    ) -> None:
        self._grammars = Grammars(record)
        self._cache = cache
        self._reporter = reporter
        self._clock = clock

    async def compile(self, job: Job, span: Span) -> Matcher | None:
        """The job's grammar, compiled off the event loop and the engine's thread."""
        if not job.sampling.grammar:
            return None
        start_ns = self._clock.wall_ns()
        matcher = await asyncio.to_thread(self._grammars.compile, job.sampling.grammar)
        took_ms = (self._clock.wall_ns() - start_ns) / 1e6
        span.add_event("grammar compiled", {"duration_ms": took_ms})
        return matcher

    async def fetch(self, ticket: Ticket, missing: MissingRun | None, outlook: Outlook) -> None:
        """What the cache service has of `missing` and fetching pays for, into `ticket.fetched`."""
        if self._cache is None or missing is None or not missing.hashes:
            return
        try:
            fetched = await self._cache.fetch(ticket.job, missing, outlook, ticket.span)
            ticket.fetched = fetched
            self._reporter.note_fetch(len(fetched.blocks) * BLOCK_TOKENS, fetched.took_ms)
        except Exception as error:
            # our bug, but not this job's: it is computed as if nothing were cached
            log.error("cache lookup failed", job=ticket.job.id, error=repr(error), exc_info=error)
