"""Sending large buffers from where they lie, beside an asyncio transport that is at rest.

Invariant: nothing is sent while the transport still has something to send, nor the other way
round: whoever uses an outlet sees to that.
Rejected: `transport.write`. Up to Python 3.11 it copies what the kernel does not take at once,
which is nearly all of a large entry.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice

from headrace.frames import Buffer

BUFFERS_MAX = 256
"""In one call of the kernel, which allows 1024."""


class Outlet:
    """One more descriptor of a transport's socket."""

    def __init__(self, transport: asyncio.Transport) -> None:
        """Raises OSError where there are no more descriptors."""
        file = os.dup(transport.get_extra_info("socket").fileno())
        self._socket = socket.socket(fileno=file)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._room: asyncio.Future[None] | None = None
        self.closed = False

    async def send(self, buffers: Sequence[Buffer], stall_s: float) -> None:
        """Have the kernel take all of `buffers`, which stay as they are meanwhile.

        Raises TimeoutError where it takes nothing for `stall_s`, ConnectionError where the
        connection is gone.
        """
        rest: deque[memoryview] = deque(memoryview(each) for each in buffers)
        while rest:
            if self.closed:
                raise ConnectionResetError("the connection is closed")
            try:
                sent = self._socket.sendmsg(list(islice(rest, BUFFERS_MAX)))
            except (BlockingIOError, InterruptedError):
                await self._wait_for_room(stall_s)
                continue
            except ConnectionError:
                raise
            except OSError as error:
                raise ConnectionAbortedError(str(error)) from error
            while rest and sent >= len(rest[0]):
                sent -= len(rest.popleft())
            if sent:
                rest[0] = rest[0][sent:]

    async def _wait_for_room(self, stall_s: float) -> None:
        self._room = self._loop.create_future()
        self._loop.add_writer(self._socket, self._wake)
        try:
            async with asyncio.timeout(stall_s):
                await self._room
        finally:
            self._room = None
            if not self.closed:
                self._loop.remove_writer(self._socket)

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def close(self) -> None:
        """Whoever sends is told. Without it the connection does not end."""
        if not self.closed:
            self._loop.remove_writer(self._socket)
            self.closed = True
            self._socket.close()
            self._wake()
