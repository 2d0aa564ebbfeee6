"""One connection of a cache client: made when needed, multiplexed, behind a breaker.

Invariant: a call ends within its time limit with an answer or with None, whatever the service
does; an answer that comes too late is skipped by its request id and never taken for another, and
what it lends is given back.
Rejected: retries inside a call. The caller's fallback, computing the block, costs about as much.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from headrace.arena_view import ArenaView
from headrace.cache_ahead import Kept
from headrace.clock import Clock
from headrace.errors import WireError
from headrace.frame_codec import decode_answer, encode
from headrace.frame_protocol import FrameProtocol, Place
from headrace.frames import (
    Address,
    Answer,
    Buffer,
    Hello,
    Lent,
    Message,
    Release,
    Request,
    Reserved,
    Welcome,
)

FAILURES_MAX = 3
BREAK_MS_MIN = 250
BREAK_MS_MAX = 5_000
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
RELEASE_STALL_S = 5.0
HELLO_STALL_S = 5.0

TROUBLE = (OSError, TimeoutError, WireError)
"""What the service's absence, slowness or nonsense raises; everything else is our bug."""

log = structlog.get_logger(__name__)

A = TypeVar("A", bound=Message)


@dataclass(slots=True)
class ClientCounts:
    """What became of the calls, in entries or calls since the client was made."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    puts_sent: int = 0
    puts_failed: int = 0
    puts_dropped: int = 0
    puts_ahead: int = 0
    """Of those sent: written to places that were had ahead."""
    failures: int = 0
    skipped: int = 0


class Breaker:
    """Skips calls for a while after failures; the pause doubles until a call succeeds again.

    Once the pause is over one call is let through to try; the others wait for its outcome, or for
    another pause to end.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._pause_ms = BREAK_MS_MIN
        self._open_until_ms: int | None = None
        self._trying = False

    def allows(self, now_ms: int) -> bool:
        """Whether to make a call now. Taking the one trial after a pause uses it up."""
        if self._open_until_ms is None:
            return True
        if now_ms < self._open_until_ms:
            return False
        self._open_until_ms = now_ms + self._pause_ms
        self._trying = True
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._pause_ms = BREAK_MS_MIN
        self._open_until_ms = None
        self._trying = False

    def failed(self, now_ms: int, *, surely: bool = False) -> bool:
        """A call failed; `surely` when nobody was there, which needs no second opinion.

        Whether a pause begins with it. Calls that began before the pause do not lengthen it.
        """
        if self._open_until_ms is not None:
            if not self._trying:
                return False
            self._pause_ms = min(2 * self._pause_ms, BREAK_MS_MAX)
        else:
            self._failures += 1
            if not surely and self._failures < FAILURES_MAX:
                return False
        self._trying = False
        self._open_until_ms = now_ms + self._pause_ms
        return True

    @property
    def closed(self) -> bool:
        return self._open_until_ms is None

    def rests(self, now_ms: int) -> bool:
        """Whether a call would be skipped now; unlike `allows`, this uses up no trial."""
        return self._open_until_ms is not None and now_ms < self._open_until_ms


Parts = list[memoryview | None]


class Connection(FrameProtocol[Answer]):
    """One connection to the service, its requests told apart by their ids.

    `arena` is the service's, if it could be mapped.
    """

    def __init__(self) -> None:
        super().__init__(decode_answer, self._choose)
        self._filling = 0
        """The request whose answer is being received into its caller's memory, if any is."""
        self.arena: ArenaView | None = None
        self.writers = 0
        """Batches that are being written in place."""
        self.turn = asyncio.Lock()
        """Theirs to copy: one after the other, as all of them would be late by turns."""
        self._pending: dict[int, asyncio.Future[tuple[Answer, Parts]]] = {}
        self._places: dict[int, Sequence[memoryview]] = {}
        """By request: the caller's memory, for an answer whose entries have its lengths."""
        self.kept = Kept(self.give_back)
        """Places to write to that the service gave ahead."""
        self._returning: set[asyncio.Task[None]] = set()

    def _choose(self, answer: Answer) -> Sequence[Place]:
        places = self._places.get(answer.id, ())[: len(answer.sizes)]
        if places and list(map(len, places)) == list(answer.sizes):
            self._filling = answer.id
            return places
        # a late answer's entries are skipped, not stored
        return [answer.id in self._pending] * len(answer.sizes)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    def frame_received(self, message: Answer, parts: Parts) -> None:
        self._filling = 0
        future = self._pending.get(message.id)
        if future is not None and not future.done():
            future.set_result((message, parts))
        else:
            self._return(message)

    def _return(self, message: Answer) -> None:
        """Give back what an answer grants that nobody waits for any more."""
        if isinstance(message, Lent):
            self.give_back(message.lease)
        elif isinstance(message, Reserved):
            self.give_back(message.ticket)
            self.give_back(message.ahead)

    def give_back(self, lease: int) -> None:
        """Tell the service that what it lent or reserved is not used any more. Never waits."""
        if lease and not self.closed and not self.try_send(encode(Release(0, lease))):
            task = asyncio.get_running_loop().create_task(self._send_release(lease))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    async def _send_release(self, lease: int) -> None:
        # a connection that is gone gives back everything at once
        with contextlib.suppress(ConnectionError):
            await self.send([encode(Release(0, lease))], RELEASE_STALL_S)

    def malformed(self, error: WireError) -> None:
        log.warning("the cache service sent a malformed frame", error=error.message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def abort(self) -> None:
        super().abort()
        self._end()

    def _end(self) -> None:
        self.arena = None
        self.kept.drop()  # closed by now: the service takes back all at once
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the cache service hung up"))

    async def ask(
        self,
        request: Request,
        payload: Sequence[Buffer],
        stall_s: float,
        places: Sequence[memoryview] = (),
    ) -> tuple[Answer, Parts]:
        """Send `request` and wait for its answer. Raises ConnectionError.

        `places` is where the answer's entries go if they have its lengths. Nothing is written there
        once the wait is over: an answer that is half there then ends the connection.
        """
        future: asyncio.Future[tuple[Answer, Parts]]
        future = asyncio.get_running_loop().create_future()
        self._pending[request.id] = future
        if places:
            self._places[request.id] = places
        try:
            head = encode(request)
            if payload or not self.try_send(head):
                await self.send([head, *payload], stall_s)
            answer = await future
        except BaseException:
            # it may have come in the moment in which the wait was given up; nor is it an error then
            if future.done() and not future.cancelled() and future.exception() is None:
                self._return(future.result()[0])
            raise
        finally:
            del self._pending[request.id]
            self._places.pop(request.id, None)
            if self._filling == request.id:
                self.abort()
        return answer


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """An answer, the bytes that came with it, and the connection that it came by."""

    answer: A
    parts: Parts
    connection: Connection


class Lane:
    """A connection that is made when needed, behind a breaker."""

    def __init__(
        self, address: Address, clock: Clock, counts: ClientCounts, *, arena: bool = True
    ) -> None:
        """`arena`: map the service's, where that is possible."""
        self._address = address
        self._clock = clock
        self._counts = counts
        self._wants_arena = arena
        self._ids = itertools.count(1)
        self._breaker = Breaker()
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def ask(
        self,
        build: Callable[[int, ArenaView | None], Request],
        expected: type[A],
        timeout_s: float,
        payload: Sequence[Buffer] = (),
        on: Connection | None = None,
        places: Sequence[memoryview] = (),
    ) -> Answered[A] | None:
        """The answer to the request that `build` makes, or None within `timeout_s`.

        `build` gets an id, and the arena if it is mapped. `on` is the connection to ask by, had
        from `reach`, if another would not do. `places` are Connection.ask's.
        """
        if on is None and not self._breaker.allows(self._clock.now_ms()):
            self._counts.skipped += 1
            return None
        try:
            async with asyncio.timeout(timeout_s):
                connection = on or await self._connected()
                request = build(next(self._ids), connection.arena)
                answer, parts = await connection.ask(request, payload, timeout_s, places)
            if not isinstance(answer, expected):
                connection.abort()
                raise WireError(f"answer of another kind: {type(answer).__name__}")
        except TROUBLE as error:
            self._failed(error)
            return None
        self._breaker.succeeded()
        return Answered(answer, parts, connection)

    @property
    def resting(self) -> bool:
        """Whether calls are skipped just now."""
        return self._breaker.rests(self._clock.now_ms())

    async def reach(self, timeout_s: float) -> Connection | None:
        """The connection, made if needed; None where it cannot be had, or not in `timeout_s`."""
        if not self._breaker.allows(self._clock.now_ms()):
            self._counts.skipped += 1
            return None
        try:
            async with asyncio.timeout(timeout_s):
                return await self._connected()
        except TROUBLE as error:
            self._failed(error)
            return None

    def _failed(self, error: BaseException) -> None:
        self._counts.failures += 1
        was_closed = self._breaker.closed
        away = self._connection is None or self._connection.closed
        if not self._breaker.failed(self._clock.now_ms(), surely=away):
            return
        if was_closed:
            log.warning("cache service away or slow, calls are skipped", error=repr(error))
        # what still waits unread in this connection is worth nothing after the pause
        self.drop()

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = None
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        address = self._address
        if address.path:
            _, connection = await loop.create_unix_connection(Connection, address.path)
        else:
            _, connection = await loop.create_connection(Connection, address.host, address.port)
        if self._wants_arena:
            try:
                welcome, _ = await connection.ask(Hello(next(self._ids)), (), HELLO_STALL_S)
            except BaseException:
                connection.abort()
                raise
            if isinstance(welcome, Welcome):
                connection.arena = ArenaView.open(welcome)
        return connection

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
