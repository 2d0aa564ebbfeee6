"""One computation for requests that are the same, over all gateways of one model.

Invariant: who computes something stands under its key in Redis before the job is handed to the
fleet, with a lease that every reader renews; whoever asks the same meanwhile reads that job's log
in the reply stream of its gateway, from its first token. The job belongs to all who read it: its
own gateway's leaving ends it only when nobody else is left, that gateway's death does not end it
at all, and where it does end early each follower goes on after the tokens that it has.
What is in Redis is a hint: without it, or without room here, a request is computed as if nobody
else had asked. Rejected: passing tokens from gateway to gateway, which dies with the first.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from redis.asyncio import Redis

from headrace import keys, scripts
from headrace.clock import Clock
from headrace.errors import DependencyError, HeadraceError, WireError
from headrace.streams import REDIS_DOWN, Scripts
from headrace.types import NO_LOGPROBS, Band, Board, Job
from headrace.wire import Fields, pack, tokens_to_bytes
from headrace_gateway.generation import Chunk, Generation
from headrace_gateway.overhearing import Overheard
from headrace_gateway.policy.sharing import Look, Rank, Watched, watch
from headrace_gateway.prompt_cache import Opened, Source, Start

log = structlog.get_logger()

JOIN_S_MAX = 0.5
"""Longer nobody waits to learn whether somebody else computes the same."""
CATCH_UP_S_MAX = 2.0
WATCH_EVERY_MS = 1_000
FOLLOWED_MAX = 256
"""Jobs of other gateways that are followed here at once."""
OVERHEARD_MAX = 16
"""Reply streams of other gateways that are read here at once; each is a connection."""
LOGGED_TOKENS_MAX = 8_192
"""A job that begins after more tokens than these is nobody else's to follow."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose job computes what stands under `key`. `since_ms` is Redis' clock, as stream ids are.

    `logged` are the output tokens that the job had from its start.
    """

    key: bytes
    job: str
    gateway: str
    rank: Rank
    since_ms: int
    logged: array[int]


def encode_claim(gateway: str, rank: Rank, logged: array[int]) -> bytes:
    """What stands in a claim beside the job's id and its instant."""
    return pack(
        {"g": gateway, "b": int(rank.band), "p": rank.priority, "t": tokens_to_bytes(logged)}
    )


def decode_claim(key: bytes, answer: Any) -> Claim:
    """A claim from FLIGHT_JOIN's answer. Raises WireError."""
    job, since_ms, payload = answer
    f = Fields("flight", payload)
    rank = Rank(f.one_of("b", Band), f.get("p", int))
    return Claim(key, job.decode(), f.get("g", str), rank, int(since_ms), f.tokens("t"))


class SharedFlights:
    """What this gateway computes for others and reads of others, of one model.

    `board` as in Places. `settle()` before the Redis client closes.
    """

    def __init__(
        self,
        url: str,
        redis: Redis,
        model: str,
        gateway_id: str,
        board: Callable[[], Board | None],
        clock: Clock,
    ) -> None:
        self._url = url
        self._redis = redis
        self._lua = Scripts(redis)
        self._model = model
        self._gateway = gateway_id
        self._board = board
        self._clock = clock
        self._led: dict[str, Led] = {}
        self._followed: dict[str, Followed] = {}
        self._overheard: dict[str, Overheard] = {}
        self._chores: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Renew what is read here and watch what is followed, until cancelled."""
        try:
            while True:
                await asyncio.sleep(WATCH_EVERY_MS / 1000)
                with contextlib.suppress(*REDIS_DOWN):
                    await self._watch()
                await self._hush()
        finally:
            for heard in self._overheard.values():
                await heard.close()

    async def open(self, key: bytes, job: Job, rank: Rank, start: Start, spurned: str) -> Opened:
        """The tokens of `job` after those it has: another gateway's, or what `start` makes.

        `spurned` is a job that is not followed any more ('': none). Raises what `start` raises.
        """
        claim = await self._join(key, job, rank, spurned) if _may_be_shared(job) else None
        if claim is None:
            return Opened(await start(job), "", rank, False)
        if claim.job != job.id:
            followed = await self._follow(claim, job)
            if followed is not None:
                return Opened(followed, claim.job, claim.rank, True)
            return Opened(await start(job), "", rank, False)
        try:
            source = await start(job)
        except BaseException:
            self.start_chore(self._end(claim))
            raise
        led = self._led[claim.job] = Led(self, claim, source)
        return Opened(led, claim.job, rank, False)

    async def _join(self, key: bytes, job: Job, rank: Rank, spurned: str) -> Claim | None:
        """The claim that stands, ours or another's; None where that cannot be known."""
        payload = encode_claim(self._gateway, rank, job.logged)
        try:
            async with asyncio.timeout(JOIN_S_MAX):
                answer = await self._lua.call(
                    scripts.FLIGHT_JOIN,
                    [keys.flight(self._model, key)],
                    [job.id, rank.number, payload, keys.FLIGHT_LEASE_MS, spurned],
                )
            return decode_claim(key, answer)
        except REDIS_DOWN:
            return None
        except WireError as error:
            log.warning("a shared flight is unreadable, not followed", error=error.message)
            return None

    async def _follow(self, claim: Claim, job: Job) -> Followed | None:
        """Read along with `claim`; None where there is no room for that, or Redis is away."""
        heard = self._overheard.get(claim.gateway)
        full = heard is None and len(self._overheard) >= OVERHEARD_MAX
        if full or len(self._followed) >= FOLLOWED_MAX or claim.job in self._followed:
            return None
        if heard is None:
            heard = self._overheard[claim.gateway] = Overheard(
                self._url, self._redis, self._model, claim.gateway, self._board, self._clock
            )
        theirs = replace(job, id=claim.job, gateway=claim.gateway, logged=claim.logged)
        followed = Followed(self, claim, job, Generation(theirs, _nothing))
        self._followed[claim.job] = followed
        try:
            async with asyncio.timeout(CATCH_UP_S_MAX):
                await heard.listen(followed.generation, claim.since_ms)
        except REDIS_DOWN:
            self.forget(followed)
            return None
        except BaseException:
            self.forget(followed)
            raise
        return followed

    def forget(self, followed: Followed) -> None:
        """It is read here no more."""
        self._followed.pop(followed.claim.job, None)
        heard = self._overheard.get(followed.claim.gateway)
        if heard is not None:
            heard.live.pop(followed.claim.job, None)

    def ended(self, claim: Claim) -> None:
        """Nobody new follows it: it is over, or no good."""
        self._led.pop(claim.job, None)
        self.start_chore(self._end(claim))

    async def _end(self, claim: Claim) -> None:
        with contextlib.suppress(*REDIS_DOWN):
            name = keys.flight(self._model, claim.key)
            await self._lua.call(scripts.FLIGHT_END, [name], [claim.job])

    async def leave(self, claim: Claim, reader: str) -> int:
        """How many others read it on; -1 where that is not known."""
        try:
            name = keys.flight(self._model, claim.key)
            return int(await self._lua.call(scripts.FLIGHT_LEAVE, [name], [claim.job, reader]))
        except REDIS_DOWN:
            return -1

    async def cancel(self, claim: Claim) -> None:
        """Nobody reads it any more, and its own gateway left it to its followers."""
        names = [keys.job(self._model, claim.job), keys.intake(self._model)]
        with contextlib.suppress(*REDIS_DOWN):
            await self._lua.call(scripts.CANCEL, names, [claim.job])

    async def leave_led(self, led: Led) -> None:
        """Its readers here are gone: the job goes on for others, or ends."""
        self._led.pop(led.claim.job, None)
        if await self.leave(led.claim, led.claim.job) <= 0:
            await led.source.cancel()

    async def leave_followed(self, followed: Followed) -> None:
        if await self.leave(followed.claim, followed.reader) == 0:
            await self.cancel(followed.claim)

    def start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def settle(self) -> None:
        """Wait for what is on its way to Redis."""
        while self._chores:
            await asyncio.wait(set(self._chores))

    async def _watch(self) -> None:
        followed = list(self._followed.values())
        pipe = self._redis.pipeline(transaction=False)
        for each in self._led.values():
            self._stay(pipe, each.claim, each.claim.job)
        led = len(self._led)
        for other in followed:
            if other.watched.seen:
                self._stay(pipe, other.claim, other.reader)
            else:
                # one that was never accepted is not kept alive by those who wait for it
                pipe.hget(keys.flight(self._model, other.claim.key), "job")
            pipe.hmget(keys.job(self._model, other.claim.job), "attempt", "cancelled", "done")
        if not led and not followed:
            return
        answers = (await pipe.execute())[led:]
        for at, other in enumerate(followed):
            claimed, facts = answers[2 * at : 2 * at + 2]
            stands = claimed in (1, other.claim.job.encode())
            other.note(Look(stands, facts[0] is not None, bool(facts[1]), bool(facts[2])))

    def _stay(self, pipe: Any, claim: Claim, reader: str) -> None:
        name = keys.flight(self._model, claim.key)
        pipe.eval(scripts.FLIGHT_STAY, 1, name, claim.job, reader, keys.FLIGHT_LEASE_MS)

    async def _hush(self) -> None:
        """Stop reading the streams in which nothing is followed."""
        for gateway, heard in list(self._overheard.items()):
            if heard.idle():
                del self._overheard[gateway]
                await heard.close()

    def counts(self) -> dict[str, int]:
        """All zero when nobody is being served."""
        return {"led_flights": len(self._led), "followed_flights": len(self._followed)}

    def check_integrity(self) -> None:
        """Assert that what is followed is overheard, under its own name."""
        for job, followed in self._followed.items():
            assert followed.claim.job == job, "flights stand under their own names"
            assert followed.claim.gateway in self._overheard, "what is followed is read"


@dataclass(eq=False)
class Led:
    """A job of this gateway that others may read as well."""

    flights: SharedFlights
    claim: Claim
    source: Source

    async def next(self) -> Chunk:
        """As `Generation.next`."""
        try:
            chunk = await self.source.next()
        except HeadraceError:
            self.flights.ended(self.claim)
            raise
        if chunk.finish is not None:
            self.flights.ended(self.claim)
        return chunk

    async def cancel(self) -> None:
        """Read it here no more; it ends when nobody else does either."""
        self.flights.start_chore(self.flights.leave_led(self))


@dataclass(eq=False)
class Followed:
    """Another gateway's job, read for `job`, which has some of the same tokens already."""

    flights: SharedFlights
    claim: Claim
    job: Job
    generation: Generation
    watched: Watched = field(default_factory=Watched)
    at: int = 0
    """Position up to which the other's output is known here."""
    told: bool = False

    @property
    def reader(self) -> str:
        return self.job.id

    async def next(self) -> Chunk:
        """As `Generation.next`. Raises DependencyError where the other is no good to follow."""
        try:
            while True:
                chunk = await self._next()
                fresh = self._fresh(chunk)
                if fresh.tokens or fresh.finish is not None or fresh.standing is not None:
                    break
        except HeadraceError:
            self.flights.forget(self)
            raise
        if fresh.finish is not None:
            self.flights.forget(self)
            self.flights.ended(self.claim)
        return fresh

    async def _next(self) -> Chunk:
        if self.told:
            return await self.generation.next()
        self.told = True
        return Chunk(tuple(self.claim.logged), None)

    def _fresh(self, chunk: Chunk) -> Chunk:
        """`chunk` without what `job` has; both have to agree on that."""
        seen = self.job.logged[self.at : self.at + len(chunk.tokens)].tolist()
        self.at += len(chunk.tokens)
        ended = chunk.finish is not None and self.at < len(self.job.logged)
        if ended or seen != list(chunk.tokens[: len(seen)]):
            raise DependencyError("the same request came to other tokens there", code="differs")
        cut = len(seen)
        return replace(chunk, tokens=chunk.tokens[cut:], logprobs=chunk.logprobs[cut:])

    def note(self, look: Look) -> None:
        """Take what the queue says of it."""
        self.watched = watch(self.watched, look)
        if self.watched.lost:
            log.info("no longer followed", job=self.claim.job, reason=self.watched.lost)
            self.generation.fail(DependencyError(f"followed: {self.watched.lost}"))

    async def cancel(self) -> None:
        """Read it no more; the last who does ends it."""
        self.flights.forget(self)
        self.flights.start_chore(self.flights.leave_followed(self))


def _may_be_shared(job: Job) -> bool:
    """Tokens that it has from the start travel in its claim, what is known of them does not."""
    scored = job.sampling.logprobs != NO_LOGPROBS or job.sampling.prompt_logprobs != NO_LOGPROBS
    return not job.logged or (not scored and len(job.logged) <= LOGGED_TOKENS_MAX)


async def _nothing(generation: Generation) -> None:
    """A follower cancels no job of its own accord."""
