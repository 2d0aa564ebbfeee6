"""One client of the cache service: its frames, its answers on their way out, its patience.

Invariants: a connection has a bounded amount of unsent answers (beyond it, nothing more is read
from it) and of time to read them; what an answer sends from the arena stays lent until the kernel
has it.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span

from headrace.clock import Clock
from headrace.errors import WireError
from headrace.frame_codec import decode_request, encode
from headrace.frame_protocol import FrameProtocol, Place
from headrace.frames import PAYLOAD_BYTES_MAX, Answer, Buffer, Put, Request
from headrace_cache.grants import Outcome

SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
"""Asked for; the kernel gives what its own limits allow."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients together and each of them may take."""

    connections_max: int = 256
    unsent_frames_max: int = 16
    unsent_bytes_max: int = PAYLOAD_BYTES_MAX
    lent_bytes_max: int = 256 * 1024 * 1024
    lease_ms_max: int = 30_000
    idle_ms_max: int = 600_000
    stall_ms_max: int = 10_000
    drain_s_max: float = 5.0


@dataclass(slots=True)
class Reply:
    """An answer on its way out, and what is measured when it has left."""

    op: str
    answer: Answer
    began_s: float
    payload: Sequence[Buffer] = ()
    span: Span = trace.INVALID_SPAN
    lease: int = 0
    """Ends when the answer has left."""
    head: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.head = encode(self.answer)

    @property
    def size_bytes(self) -> int:
        return len(self.head) + sum(map(len, self.payload))


class Host(Protocol):
    """What a connection asks of its server."""

    clock: Clock
    limits: Limits
    stopping: bool

    def join(self, connection: Connection) -> bool: ...
    def leave(self, connection: Connection) -> None: ...
    def places(self, connection: Connection, put: Put) -> Sequence[Place]: ...
    def answer(
        self, connection: Connection, request: Request, began_ns: int, began_s: float
    ) -> Reply | Awaitable[Reply] | None: ...
    def sent(self, connection: Connection, reply: Reply) -> None: ...
    def lost(self, connection: Connection, reply: Reply) -> None: ...


class Connection(FrameProtocol[Request]):
    """One client. `seat` is its number, by which it holds what it was given of the arena."""

    def __init__(self, host: Host, seat: int) -> None:
        super().__init__(decode_request, self._choose)
        self.seat = seat
        self.has_arena = False
        # of the put that is being received
        self.receiving = 0
        self.outcomes: Sequence[Outcome] = ()
        self._host = host
        self._unsent: deque[Reply] = deque()
        self._unsent_bytes = 0
        self._awaited: set[asyncio.Task[None]] = set()
        self._writer: asyncio.Task[None] | None = None
        self._began_ns = 0
        self._began_s = 0.0
        self._heard_ms = host.clock.now_ms()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        _widen(transport)
        if not self._host.join(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for task in self._awaited:
            task.cancel()
        self._host.leave(self)

    def buffer_updated(self, nbytes: int) -> None:
        self._heard_ms = self._host.clock.now_ms()
        super().buffer_updated(nbytes)

    def _choose(self, request: Request) -> Sequence[Place]:
        self._began_ns = self._host.clock.wall_ns()
        self._began_s = asyncio.get_running_loop().time()
        return self._host.places(self, request) if isinstance(request, Put) else ()

    def frame_received(
        self,
        message: Request,
        parts: list[memoryview | None],  # noqa: ARG002  # received right where they belong
    ) -> None:
        reply = self._host.answer(self, message, self._began_ns, self._began_s)
        if isinstance(reply, Reply):
            self._queue(reply)
        elif reply is not None:
            task = asyncio.get_running_loop().create_task(self._queue_later(reply))
            self._awaited.add(task)
            task.add_done_callback(self._awaited.discard)
            self._set_paused()

    async def _queue_later(self, awaited: Awaitable[Reply]) -> None:
        task = asyncio.current_task()
        assert task is not None, "runs as a task"
        try:
            reply = await awaited
        except WireError as error:
            self.malformed(error)
            self.abort()
            return
        except Exception:
            # our bug: a client that hears of it now does not wait for its time limit
            log.exception("no answer could be made, connection closed")
            self.abort()
            return
        self._awaited.discard(task)
        if self.closed:
            self._host.lost(self, reply)
        else:
            self._queue(reply)

    def _queue(self, reply: Reply) -> None:
        """Send `reply`: now if it is small and nothing is before it, else by a task."""
        if self._writer is None and not reply.payload and self.try_send(reply.head):
            self._host.sent(self, reply)
            if self._paused:
                self._set_paused()
            return
        self._unsent.append(reply)
        self._unsent_bytes += reply.size_bytes
        self._set_paused()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_unsent())

    def malformed(self, error: WireError) -> None:
        log.warning("malformed frame, connection closed", error=error.message)

    def _set_paused(self) -> None:
        limits = self._host.limits
        full = (
            len(self._unsent) + len(self._awaited) >= limits.unsent_frames_max
            or self._unsent_bytes >= limits.unsent_bytes_max
            or self._host.stopping
        )
        if full != self._paused and not self.closed and not self.transport.is_closing():
            if full:
                self.pause_reading()
            else:
                self._heard_ms = self._host.clock.now_ms()
                self.resume_reading()

    async def _write_unsent(self) -> None:
        stall_s = self._host.limits.stall_ms_max / 1000
        try:
            while self._unsent:
                reply = self._unsent[0]
                await self.send([reply.head, *reply.payload], stall_s)
                if reply.lease:
                    await self.flushed(stall_s)
                self._unsent.popleft()
                self._unsent_bytes -= reply.size_bytes
                self._host.sent(self, reply)
                self._set_paused()
        except ConnectionError as error:
            log.debug("client gone before its answer", reason=str(error))
        finally:
            self._writer = None
            for reply in self._unsent:
                self._host.lost(self, reply)
            self._unsent.clear()

    def sweep(self, now_ms: int) -> None:
        """End the connection if it has been silent for too long."""
        silent_ms = now_ms - self._heard_ms
        if self._paused or self._writer is not None or self._awaited:
            return
        if not self._reader.idle and silent_ms > self._host.limits.stall_ms_max:
            log.warning("client stalled within a frame", silent_ms=silent_ms)
            self.abort()
        elif silent_ms > self._host.limits.idle_ms_max:
            self.transport.close()

    async def finish(self) -> None:
        """Read no more, send what is unsent, close."""
        self._set_paused()
        if self._awaited:
            await asyncio.wait(self._awaited)
        if self._writer is not None:
            await asyncio.wait({self._writer})
        if not self.closed:
            self.transport.close()


def _widen(transport: asyncio.BaseTransport) -> None:
    """Larger socket buffers: fewer turns of the event loop for each megabyte."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
