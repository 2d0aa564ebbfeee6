"""A connection to Redis on which the engine's thread sends for itself, without the event loop.

Invariant: what was sent stays here until it was answered, in its order; what a broken connection
leaves unanswered is given back by `settle`, for whoever sends it again. Nobody waits for the socket
or for the lock's other holder, so that a Redis that is away costs the engine's thread nothing.
Rejected: the loop's own connection, whose transport may be writing while another thread wants to;
and waiting for the loop to send, which begins only when the next step has given Python's lock away
and then takes a core from that step, as all do who are woken by what it sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import hiredis
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.connection import ConnectionInterface
from redis.retry import Retry

from headrace.streams import COMMAND_TIMEOUT_S, REDIS_DOWN

WAITING_MAX = 32
"""Sendings that have no answer yet; with more the connection counts as slow."""
READ_BYTES = 65_536
POLL_S = 0.001
OPEN_AGAIN_S = 1.0

_NOTHING = object()
T = TypeVar("T")


class Line(Generic[T]):
    """`send` is called in one thread, everything else in the event loop. It opens in the
    background, and again when it broke. Over TLS there is none: its sockets are not for two."""

    def __init__(self, url: str) -> None:
        self._pool = ConnectionPool.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=COMMAND_TIMEOUT_S,
            socket_connect_timeout=COMMAND_TIMEOUT_S,
        )
        self._lock = threading.Lock()
        self._connection: ConnectionInterface | None = None
        self._socket: socket.socket | None = None
        """None when there is no connection, or one that broke."""
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[int, T]] = deque()
        self._opening: asyncio.Task[None] | None = None
        self._open_at_s = 0.0

    def send(self, commands: Sequence[Sequence[Any]], what: T) -> bool:
        """Send now what `settle` may give back as `what`; False where somebody else has to."""
        if self._socket is None or not self._lock.acquire(blocking=False):
            return False
        try:
            self._take_answers()
            if self._socket is None or len(self._waiting) >= WAITING_MAX:
                return False
            packed = b"".join([hiredis.pack_command(tuple(command)) for command in commands])
            try:
                sent = self._socket.send(packed)
            except OSError:
                sent = 0
            if sent < len(packed):
                self._socket = None  # with half a command on it, it is of no use
                return False
            self._waiting.append((len(commands), what))
            return True
        finally:
            self._lock.release()

    async def settle(self) -> list[T]:
        """Wait until all that was sent is answered; what has to be sent again, oldest first."""
        loop = asyncio.get_running_loop()
        by_s = loop.time() + COMMAND_TIMEOUT_S
        while True:
            with self._lock:
                self._take_answers()
                if not self._waiting:
                    return []
                if self._socket is None or loop.time() >= by_s:
                    self._socket = None
                    lost = [what for _, what in self._waiting]
                    self._waiting.clear()
                    return lost
            await asyncio.sleep(POLL_S)

    def open_soon(self) -> None:
        """See to it that there is a connection, in the background."""
        now_s = asyncio.get_running_loop().time()
        idle = self._opening is None or self._opening.done()
        gone = self._socket is None and not self._waiting
        if gone and idle and now_s >= self._open_at_s:
            self._open_at_s = now_s + OPEN_AGAIN_S
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        self._let_go()
        connection = self._pool.make_connection()
        try:
            await asyncio.to_thread(connection.connect)
        except REDIS_DOWN:
            return
        found = getattr(connection, "_sock", None)
        if type(found) is not socket.socket:
            connection.disconnect()  # type: ignore[no-untyped-call]  # theirs
            self._open_at_s = float("inf")
            return
        found.setblocking(False)
        with self._lock:
            assert not self._waiting, "what the last one left was given back"
            self._reader = hiredis.Reader(notEnoughData=_NOTHING)
            self._connection, self._socket = connection, found

    def close(self) -> None:
        """Let the connection go, and what it did not answer."""
        if self._opening is not None:
            self._opening.cancel()
        with self._lock:
            self._socket = None
            self._waiting.clear()
        self._let_go()

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*REDIS_DOWN):
                connection.disconnect()  # type: ignore[no-untyped-call]  # theirs

    def _take_answers(self) -> None:
        """What has arrived; an error among it, or an end, breaks the connection."""
        if self._socket is None or not self._waiting:
            return
        try:
            data = self._socket.recv(READ_BYTES)
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _NOTHING:
                if isinstance(answer, hiredis.PushNotification):
                    continue  # nobody asked for it
                count, what = self._waiting.popleft()
                if isinstance(answer, Exception):
                    self._waiting.appendleft((count, what))
                    self._socket = None
                    return
                if count > 1:
                    self._waiting.appendleft((count - 1, what))
            if not data:
                self._socket = None
        except BlockingIOError:
            return
        except (OSError, IndexError, hiredis.ProtocolError):
            self._socket = None

    def check_integrity(self) -> None:
        assert len(self._waiting) <= WAITING_MAX, "sendings are bounded"
        assert all(count > 0 for count, _ in self._waiting), "who has all answers leaves the line"
