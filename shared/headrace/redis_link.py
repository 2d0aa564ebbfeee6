"""A connection to Redis that many share: commands as they come, answers in their order.

Invariant: each command is sent once and has one place in the line. Who is cancelled meanwhile
leaves the place behind, and the answer goes nowhere; what takes longer than the limit ends the
connection, and with it everything that waits. redis-py opens the connection (addresses, TLS,
passwords, databases); from then on its socket is ours, and hiredis reads it. Rejected: redis-py's
client on the tokens' way, where a command costs some 0.3 ms of CPU in pools, timers and retries,
thirty times what this takes, and where a cancel may get lost (docs/adr/0002).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import hiredis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.exceptions import ConnectionError as LinkDownError
from redis.exceptions import InvalidResponse, RedisError

WAITING_MAX = 4_096
"""Calls on one link that have no answer yet: more than a gateway has requests."""

_NOTHING = object()
Command = Sequence[Any]
T = TypeVar("T")


async def keep_cancel(call: Awaitable[T]) -> T:
    """Await `call`; raise the cancel that arrived meanwhile if redis-py lost it."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await call
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


class Packing:
    """Commands packed in C, as redis-py does for blocking clients only: a hand-off has 15
    arguments, and 32 of them travel together."""

    _writer: asyncio.StreamWriter | None

    def pack_command(self, *args: Any) -> list[bytes]:
        # the other commands' names have no spaces: each is one argument
        assert isinstance(args[0], str)
        return [hiredis.pack_command((*args[0].split(), *args[1:]))]

    def adopt(self, protocol: asyncio.Protocol) -> asyncio.WriteTransport:
        """Let `protocol` have what arrives from now on; nothing may be under way."""
        assert self._writer is not None, "connected first"
        transport = self._writer.transport
        transport.set_protocol(protocol)
        return transport


class TcpConnection(Packing, Connection):
    pass


class TlsConnection(Packing, SSLConnection):
    pass


class UnixConnection(Packing, UnixDomainSocketConnection):
    pass


KINDS: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: TcpConnection,
    SSLConnection: TlsConnection,
    UnixDomainSocketConnection: UnixConnection,
}
"""redis-py's kinds of connections, and ours in their places."""


class _Place:
    """Where the answers to one call go: `count` of them, by `due_s` of the loop's time."""

    __slots__ = ("answers", "count", "due_s", "future")

    def __init__(self, count: int, future: asyncio.Future[list[Any]], due_s: float) -> None:
        self.count = count
        self.future = future
        self.due_s = due_s
        self.answers: list[Any] = []


class Link(asyncio.Protocol):
    """`make`: a new connection, not open yet. `limit_s`: for each call, opening included.

    It opens with the first call, and again with the first one after it was lost. One timer watches
    the oldest call, and is set again when it rings: a timer for each would cost more than the call.
    """

    def __init__(self, make: Callable[[], AbstractConnection], limit_s: float) -> None:
        self._make = make
        self._limit_s = limit_s
        self._line: deque[_Place] = deque()
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._fd: int | None = None
        """The transport's, where what travels is what is written: not under TLS."""
        self._opening = asyncio.Lock()
        self._watch: asyncio.TimerHandle | None = None
        self._reader = hiredis.Reader()

    async def one(self, *command: Any) -> Any:
        """The answer to a command. Raises RedisError, OSError, TimeoutError."""
        [answer] = await self.many([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def many(self, commands: Sequence[Command]) -> list[Any]:
        """Commands that travel together; an answer may be the exception that a command earned.

        Raises RedisError, OSError, TimeoutError where the outcome is unknown.
        """
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._limit_s
        if self._transport is None:
            async with asyncio.timeout_at(due_s):
                await self._open()
        packed, place = self._take_place(commands, due_s)
        assert self._transport is not None, "it is open"
        self._transport.write(packed)
        return await place.future

    @property
    def is_open(self) -> bool:
        """Whether `send` may be called."""
        return self._transport is not None

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """As `many`, on a link that is open: the commands are on their way when this returns, so
        that the caller can do what they do not need before it awaits the answers.

        Raises RedisError.
        """
        transport, loop = self._transport, asyncio.get_running_loop()
        assert transport is not None, "is_open comes first"
        packed, place = self._take_place(commands, loop.time() + self._limit_s)
        unsent = self._write_through(packed) if self._fd is not None else packed
        if unsent:
            transport.write(unsent)
        return place.future

    def _take_place(self, commands: Sequence[Command], due_s: float) -> tuple[bytes, _Place]:
        """`commands` as they travel, and where their answers go. Raises RedisError."""
        if len(self._line) >= WAITING_MAX:
            raise RedisError(f"{WAITING_MAX} calls wait for their answers")
        loop = asyncio.get_running_loop()
        packed = b"".join([hiredis.pack_command(tuple(command)) for command in commands])
        place = _Place(len(commands), loop.create_future(), due_s)
        self._line.append(place)
        if self._watch is None:
            self._watch = loop.call_at(due_s, self._look, loop)
        return packed, place

    def _write_through(self, data: bytes) -> bytes:
        """Write past the transport, which in uvloop's case waits for the end of the loop's turn;
        what is left for it to write."""
        assert self._transport is not None and self._fd is not None, "open"
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            return data  # behind what waits already
        try:
            return data[os.write(self._fd, data) :]
        except OSError:  # full, or broken, which the transport finds out
            return data

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lose a connection that did not answer the oldest call in time."""
        self._watch = None
        if not self._line:
            return
        oldest = self._line[0]
        if oldest.due_s > loop.time():
            self._watch = loop.call_at(oldest.due_s, self._look, loop)
            return
        if not oldest.future.done():
            oldest.future.set_exception(TimeoutError(f"no answer within {self._limit_s:g} s"))
        self._lose(LinkDownError(f"no answer within {self._limit_s:g} s"))

    async def _open(self) -> asyncio.WriteTransport:
        async with self._opening:
            if self._transport is not None:
                return self._transport
            await self._let_go()
            connection = self._make()
            try:
                await keep_cancel(connection.connect())  # type: ignore[no-untyped-call]  # theirs
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            assert isinstance(connection, Packing)
            self._reader = hiredis.Reader(
                protocolError=InvalidResponse,
                # the parser knows which exception each of Redis' error codes is
                replyError=connection._parser.parse_error,
                notEnoughData=_NOTHING,
            )
            self._connection = connection
            self._transport = connection.adopt(self)
            plain = not isinstance(connection, TlsConnection)
            self._fd = self._transport.get_extra_info("socket").fileno() if plain else None
            return self._transport

    def data_received(self, data: bytes) -> None:
        line, reader = self._line, self._reader
        try:
            reader.feed(data)
            while (answer := reader.gets()) is not _NOTHING:
                if isinstance(answer, hiredis.PushNotification):
                    continue  # nobody asked for it
                place = line[0]
                place.answers.append(answer)
                if len(place.answers) == place.count:
                    line.popleft()
                    if not place.future.done():
                        place.future.set_result(place.answers)
        except (InvalidResponse, IndexError) as error:
            self._lose(LinkDownError(f"not what Redis answers: {error!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        # the word may come late, when another connection is in its place
        if self._transport is None or self._transport.is_closing():
            self._lose(LinkDownError(f"Redis closed the connection: {exc}"))

    def _lose(self, error: Exception) -> None:
        transport, self._transport, self._fd = self._transport, None, None
        if transport is not None:
            transport.abort()
        line = list(self._line)
        self._line.clear()
        for place in line:
            if not place.future.done():
                place.future.set_exception(error)

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Let the connection go; what waits for an answer raises. A later call opens it again."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._lose(LinkDownError("this link was closed"))
        await self._let_go()

    def check_integrity(self) -> None:
        assert len(self._line) <= WAITING_MAX, "the line is bounded"
        assert self._transport is not None or not self._line, "nobody waits for a lost connection"
        for place in self._line:
            assert len(place.answers) < place.count, "who has all answers leaves the line"
