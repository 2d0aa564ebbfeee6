"""One connection of a cache client: made when needed, multiplexed, behind a breaker.

Invariant: a call ends within its time limit with an answer or with None, whatever the service
does; an answer that comes too late is skipped by its request id and never taken for another.
Rejected: retries inside a call. The caller's fallback, computing the block, costs about as much.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from headrace.clock import Clock
from headrace.errors import WireError
from headrace.frame_protocol import FrameProtocol
from headrace.frames import (
    Address,
    Answer,
    Buffer,
    Counted,
    Found,
    Known,
    Request,
    Stats,
    decode_answer,
    encode,
)

FAILURES_MAX = 3
BREAK_MS_MIN = 250
BREAK_MS_MAX = 5_000
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024

TROUBLE = (OSError, TimeoutError, WireError)
"""What the service's absence, slowness or nonsense raises; everything else is our bug."""

log = structlog.get_logger(__name__)

A = TypeVar("A", Found, Counted, Known, Stats)


@dataclass(slots=True)
class ClientCounts:
    """What became of the calls, in entries or calls since the client was made."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    puts_sent: int = 0
    puts_failed: int = 0
    puts_dropped: int = 0
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


class _Connection(FrameProtocol[Answer]):
    """One connection to the service, its requests told apart by their ids."""

    def __init__(self) -> None:
        super().__init__(decode_answer, self._choose)
        self._pending: dict[int, asyncio.Future[tuple[Answer, list[memoryview | None]]]] = {}

    def _choose(self, answer: Answer) -> Sequence[bool]:
        # a late answer's entries are skipped, not stored
        return [answer.id in self._pending] * len(answer.sizes)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    def frame_received(self, message: Answer, parts: list[memoryview | None]) -> None:
        future = self._pending.get(message.id)
        if future is not None and not future.done():
            future.set_result((message, parts))

    def malformed(self, error: WireError) -> None:
        log.warning("the cache service sent a malformed frame", error=error.message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._fail_pending()

    def abort(self) -> None:
        super().abort()
        self._fail_pending()

    def _fail_pending(self) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the cache service hung up"))

    async def ask(
        self, request: Request, payload: Sequence[Buffer], stall_s: float
    ) -> tuple[Answer, list[memoryview | None]]:
        """Send `request` and wait for its answer. Raises ConnectionError."""
        future: asyncio.Future[tuple[Answer, list[memoryview | None]]]
        future = asyncio.get_running_loop().create_future()
        self._pending[request.id] = future
        try:
            await self.send([encode(request), *payload], stall_s)
            return await future
        finally:
            del self._pending[request.id]
            # an outcome that nobody waits for any more is no error
            if future.done() and not future.cancelled():
                future.exception()


class Lane:
    """A connection that is made when needed, behind a breaker."""

    def __init__(self, address: Address, clock: Clock, counts: ClientCounts) -> None:
        self._address = address
        self._clock = clock
        self._counts = counts
        self._ids = itertools.count(1)
        self._breaker = Breaker()
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def ask(
        self,
        build: Callable[[int], Request],
        expected: type[A],
        timeout_s: float,
        payload: Sequence[Buffer] = (),
    ) -> tuple[A, list[memoryview | None]] | None:
        """The answer to the request that `build` makes of an id, or None within `timeout_s`."""
        if not self._breaker.allows(self._clock.now_ms()):
            self._counts.skipped += 1
            return None
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected()
                answer, parts = await connection.ask(build(next(self._ids)), payload, timeout_s)
            if not isinstance(answer, expected):
                connection.abort()
                raise WireError(f"answer of another kind: {type(answer).__name__}")
        except TROUBLE as error:
            self._failed(error)
            return None
        self._breaker.succeeded()
        return answer, parts

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

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = None
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        address = self._address
        if address.path:
            _, connection = await loop.create_unix_connection(_Connection, address.path)
        else:
            _, connection = await loop.create_connection(_Connection, address.host, address.port)
        return connection

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
