"""One computation for requests that are the same: a kept output is replayed, a running one shared.

Invariants: each reader gets every token once, in order, whoever else reads, leaves or fails; the
computation goes on as long as somebody reads it, and no longer. The leader's failure is its own: a
follower that is left behind hands its own job to the fleet, with the tokens that it has seen
already, so that its text goes on after precisely those. A job with a deadline neither leads nor
follows, since it would end, or wait, by another one's time.
What runs on another gateway (`shared_flights.py`) is one more flight here, whose leader is none of
its readers: whatever becomes of it, they go on.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol

from headrace.clock import Clock
from headrace.types import Finish, FinishReason, Job, ModelRecord, TokenLogprobs, pack_tokens
from headrace_gateway.generation import Chunk, Standing
from headrace_gateway.policy.sharing import Rank, may_follow
from headrace_gateway.prompt_entries import WHOLE, Cost, Output, PromptEntries

REPLAY_TOKENS = 256
"""Tokens of a kept output in one delivery."""


class Way(StrEnum):
    """How a job got its tokens."""

    COMPUTED = "computed"
    FOLLOWED = "followed"
    ENTRY = "entry"


class Source(Protocol):
    """A running job, as `headrace_gateway.generation` defines it."""

    async def next(self) -> Chunk: ...

    async def cancel(self) -> None: ...


Start = Callable[[Job], Awaitable[Source]]
"""Hands a job to the fleet. Raises what the fleet refuses it with."""


class Opened(NamedTuple):
    """Where a job's tokens come from.

    `job` computes them ('': unknown to other gateways), at `rank`; `followed`: another gateway's.
    """

    source: Source
    job: str
    rank: Rank
    followed: bool


class Elsewhere(Protocol):
    """What other gateways compute, as `headrace_gateway.shared_flights` defines it."""

    async def open(self, key: bytes, job: Job, rank: Rank, start: Start, spurned: str) -> Opened:
        """As SharedFlights.open."""
        ...


class Tracked(Source, Protocol):
    """A Source that knows where its tokens come from."""

    @property
    def way(self) -> Way: ...

    @property
    def saved_ms(self) -> int:
        """What computing it took before, where it was not computed now; 0 if that is not known."""
        ...

    def keep(self, finish: FinishReason, tokens: int) -> None:
        """The first `tokens` tokens, ended by `finish`, are all that was wanted: worth keeping."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A deterministic job, the name of its output, and how to have it computed.

    `trace` are the W3C headers of the span that a lookup belongs to. `elsewhere`: None where other
    gateways are none of its business.
    """

    key: bytes
    job: Job
    record: ModelRecord
    start: Start
    trace: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None

    @property
    def rank(self) -> Rank:
        return Rank(self.job.band, self.job.priority)

    @property
    def alone(self) -> bool:
        return bool(self.job.ttft_by_ms or self.job.done_by_ms)


class Replay:
    """A kept output, delivered again."""

    way = Way.ENTRY

    def __init__(self, output: Output, prompt_tokens: int) -> None:
        self._output = output
        self._prompt_tokens = prompt_tokens
        self._at = 0
        self.saved_ms = output.took_ms

    async def next(self) -> Chunk:
        output, first = self._output, self._at
        last = first + REPLAY_TOKENS
        self._at = min(last, len(output.tokens))
        return Chunk(
            tuple(output.tokens[first:last]),
            Finish(output.finish) if last >= len(output.tokens) else None,
            self._prompt_tokens,
            tuple(output.logprobs[first:last]),
            () if first else output.prompt_logprobs,
        )

    async def cancel(self) -> None:
        """There is nothing to stop."""

    def keep(self, finish: FinishReason, tokens: int) -> None:
        """It is kept already."""


class _Flight:
    """One computation, all that came of it so far, and who reads it."""

    def __init__(self, cache: PromptCache, asked: Asked, now_ms: int) -> None:
        self.asked = asked
        self.rank = asked.rank
        self.job = self.spurned = ""
        """Who computes this, as other gateways know it; who is followed no more."""
        self.followed = False
        self.began_ms = now_ms
        self.tokens: array[int] = pack_tokens(())
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.cached_tokens = 0
        self.cache_write_tokens = 0
        self.standing: Standing | None = None
        self.finish: Finish | None = None
        self.failure: BaseException | None = None
        self.kept = False
        self.readers: set[Reader] = set()
        self._cache = cache
        self._source: Source | None = None
        self._pump: asyncio.Task[None] | None = None

    def inherit(self, other: _Flight) -> None:
        """Go on where `other` broke off."""
        self.tokens = other.tokens[:]
        self.logprobs = other.logprobs[:]
        self.prompt_logprobs = other.prompt_logprobs
        self.cached_tokens = other.cached_tokens
        self.began_ms = other.began_ms
        self.spurned = other.job

    def leads(self, asked: Asked) -> bool:
        """Whether this computation is `asked`'s own."""
        return self.asked is asked and not self.followed

    @property
    def broken(self) -> bool:
        """Whether it ended in a way that is the leader's business alone."""
        early = self.finish is not None and self.finish.reason not in WHOLE
        return self.failure is not None or early

    async def start(self) -> None:
        """Have it computed, here or elsewhere. Raises what the fleet refuses the job with."""
        asked, job = self.asked, self.asked.job
        try:
            if self.tokens:
                job = replace(job, logged=pack_tokens(self.tokens))
            if asked.elsewhere is None or asked.alone:
                self._source = await asked.start(job)
            else:
                found = await asked.elsewhere.open(
                    asked.key, job, asked.rank, asked.start, self.spurned
                )
                self._source, self.job, self.rank, self.followed = found
        except BaseException as error:
            self._fail(error)
            raise
        self._pump = asyncio.create_task(self._read(self._source))

    async def _read(self, source: Source) -> None:
        try:
            while self.finish is None:
                self._take(await source.next())
                self._tell()
            self._cache.forget(self)
        except Exception as error:  # each reader raises it, or goes on without this flight
            self._fail(error)

    def _take(self, chunk: Chunk) -> None:
        if chunk.standing is not None:
            self.standing = chunk.standing
            return
        self.tokens.extend(chunk.tokens)
        self.logprobs.extend(chunk.logprobs)
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
        self.cache_write_tokens = chunk.cache_write_tokens
        self.finish = chunk.finish

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._cache.forget(self)
        self._tell()

    def _tell(self) -> None:
        for reader in self.readers:
            reader.news.set()

    async def leave(self, reader: Reader) -> None:
        """`reader` wants no more; the last one ends the computation."""
        self.readers.discard(reader)
        if self.readers:
            return
        self._cache.forget(self)
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()
        if self._source is not None and self.finish is None and self.failure is None:
            await self._source.cancel()


class Reader:
    """One request's way through a flight: its leader's, or a follower's."""

    saved_ms = 0

    def __init__(self, cache: PromptCache, flight: _Flight, asked: Asked) -> None:
        self.news = asyncio.Event()
        self.way = Way.COMPUTED if flight.asked is asked else Way.FOLLOWED
        self._cache = cache
        self._asked = asked
        self._flight = flight
        self._cursor = 0
        self._told: Standing | None = None
        flight.readers.add(self)

    async def next(self) -> Chunk:
        """As `Generation.next`."""
        while True:
            flight = self._flight
            leads = flight.leads(self._asked)
            unread = len(flight.tokens) > self._cursor
            if unread or (flight.finish is not None and (leads or not flight.broken)):
                return self._unread(flight)
            if flight.broken and not leads:
                await self._go_on(flight)
                continue
            if flight.failure is not None:
                raise flight.failure
            if flight.standing is not None and flight.standing != self._told and not flight.tokens:
                self._told = flight.standing
                return Chunk((), None, standing=self._told)
            self.news.clear()
            await self.news.wait()

    def _unread(self, flight: _Flight) -> Chunk:
        first, self._cursor = self._cursor, len(flight.tokens)
        leads = flight.leads(self._asked)
        return Chunk(
            tuple(flight.tokens[first:]),
            flight.finish if leads or not flight.broken else None,
            flight.cached_tokens if self.way is Way.COMPUTED else len(self._asked.job.prompt),
            tuple(flight.logprobs[first:]),
            () if first else flight.prompt_logprobs,
            cache_write_tokens=flight.cache_write_tokens if leads else 0,
        )

    async def _go_on(self, flight: _Flight) -> None:
        """What was followed broke: follow who went on, or go on oneself."""
        flight.readers.discard(self)
        self._flight, begins = self._cache.successor(flight, self._asked)
        self._flight.readers.add(self)
        if begins:
            await self._flight.start()
            if not flight.tokens and not self._flight.followed:
                self.way = Way.COMPUTED

    async def cancel(self) -> None:
        """Read no more; what others read goes on."""
        await self._flight.leave(self)

    def keep(self, finish: FinishReason, tokens: int) -> None:
        self._cache.keep(self._flight, finish, tokens)


class PromptCache:
    """What this gateway shares between requests. `entries`: None where there is no cache."""

    def __init__(self, entries: PromptEntries | None, clock: Clock) -> None:
        self._entries = entries
        self._clock = clock
        self._flights: dict[bytes, _Flight] = {}

    async def open(self, asked: Asked) -> Tracked:
        """The tokens of a job: kept ones, those of the same request, or its own.

        Raises what the fleet refuses it with.
        """
        flight = self._joinable(asked)
        if flight is None and self._entries is not None:
            found = await self._read(self._entries, asked)
            if found is not None:
                return Replay(found, len(asked.job.prompt))
            # the same request may have come while this one was looked up
            flight = self._joinable(asked)
        if flight is not None:
            return Reader(self, flight, asked)
        flight = self._begin(asked)
        reader = Reader(self, flight, asked)
        await flight.start()
        if flight.followed:
            reader.way = Way.FOLLOWED
        return reader

    async def _read(self, entries: PromptEntries, asked: Asked) -> Output | None:
        return await entries.read(
            asked.key,
            fingerprint=asked.record.fingerprint,
            tenant=asked.job.tenant,
            band=asked.job.band,
            vocab_size=asked.record.vocab_size,
            trace=asked.trace,
        )

    def _joinable(self, asked: Asked) -> _Flight | None:
        flight = None if asked.alone else self._flights.get(asked.key)
        if flight is None or not may_follow(flight.rank, asked.rank).follows:
            return None
        return flight

    def _begin(self, asked: Asked) -> _Flight:
        flight = _Flight(self, asked, self._clock.now_ms())
        if not asked.alone:
            # one of a lower rank goes on for those who follow it; new ones follow this
            self._flights[asked.key] = flight
        return flight

    def successor(self, broken: _Flight, asked: Asked) -> tuple[_Flight, bool]:
        """What takes the place of `broken` for `asked`, and whether `asked` has to start it."""
        flight = self._joinable(asked)
        if flight is not None and flight.tokens[: len(broken.tokens)] == broken.tokens:
            return flight, False
        flight = self._begin(asked)
        flight.inherit(broken)
        return flight, True

    def forget(self, flight: _Flight) -> None:
        """Nobody new follows `flight`."""
        if self._flights.get(flight.asked.key) is flight:
            del self._flights[flight.asked.key]

    def keep(self, flight: _Flight, finish: FinishReason, tokens: int) -> None:
        """Write down what came of `flight`, once."""
        if flight.kept or self._entries is None or finish not in WHOLE:
            return
        assert tokens <= len(flight.tokens), "what was read has come"
        flight.kept = True
        job = flight.asked.job
        output = Output(
            flight.tokens[:tokens],
            finish,
            flight.logprobs[:tokens],
            flight.prompt_logprobs,
            self._clock.now_ms() - flight.began_ms,
        )
        cost = Cost(job.tenant, job.band, len(job.prompt) + tokens)
        fingerprint = flight.asked.record.fingerprint
        self._entries.write_soon(flight.asked.key, output, fingerprint, cost)

    def counts(self) -> dict[str, int]:
        """All zero when nobody is being served."""
        return {"shared_computations": len(self._flights)}

    def check_integrity(self) -> None:
        """Assert that what may be followed is read by somebody and has not ended."""
        for key, flight in self._flights.items():
            assert flight.asked.key == key, "flights stand under their own keys"
            assert flight.readers, "what nobody reads is over"
            assert flight.finish is None and flight.failure is None, "what ended is forgotten"
