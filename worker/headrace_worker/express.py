"""The short way out of the engine's thread, for steps that only made tokens.

Invariant: a step goes this way as a whole or not at all, and only when everything before it has
reached Redis (the caller sees to that) or went this way too, so that tokens leave in step order.
Whatever else a step brings, an end, KV, a job that moves, goes through the event loop, which waits
for the answers to what went this way before it sends anything.
The way is for few streams, whose steps are short. There what counts is when Redis, the gateway and
the client are woken: while Python prepares the next step one core has nothing else to do, and they
use it; woken once that step runs, they take a core from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace_worker.cache_link import CacheLink
from headrace_worker.publisher import Addressed, Publisher
from headrace_worker.results import StepResult
from headrace_worker.ticket import Ticket

STREAMS_MAX = 8
"""Of a step; what more of them take to encode is better spent beside the next one."""


class Express:
    """For one worker's jobs. `take` is called in the engine's thread.

    `tickets` and `cache`: the event loop's, which are only asked for one job at a time.
    """

    def __init__(
        self,
        tickets: Mapping[str, Ticket],
        publisher: Publisher,
        cache: CacheLink | None,
    ) -> None:
        self._tickets = tickets
        self._publisher = publisher
        self._cache = cache

    def take(self, result: StepResult) -> bool:
        """Send a step's tokens; False where the event loop has to, and nothing was sent."""
        deltas = result.deltas
        if len(deltas) > STREAMS_MAX or result.blocks or result.stories or result.handed:
            return False
        if result.lent:
            return False
        step = []
        for delta in deltas:
            ticket = self._tickets.get(delta.job)
            if ticket is None or delta.finish is not None or delta.prompt_logprobs:
                return False
            if ticket.to.attempt != delta.attempt:
                return False
            written = 0 if self._cache is None else self._cache.written_tokens(delta.job)
            told = replace(delta, cache_write_tokens=written) if written else delta
            step.append(Addressed(told, ticket.to))
        return not step or self._publisher.put_now(step)
