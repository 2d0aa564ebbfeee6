"""The cache service's sockets: frames in, store, frames out.

Invariants: one thread owns the store, so a request is answered in one go and no lock is needed;
whatever a connection sends costs at most that connection; each has a bounded amount of unsent
answers (beyond it, nothing more is read from it) and of time to read them; and all puts in
flight together hold at most `receiving_bytes_max`, beyond which their bytes are skipped.
Rejected: a task for each request (a get takes microseconds; only sending waits).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from headrace import telemetry
from headrace.clock import Clock, SystemClock
from headrace.errors import SettingsError, WireError
from headrace.frame_codec import NONCE_BYTES, decode_request, encode
from headrace.frame_protocol import FrameProtocol
from headrace.frames import (
    PAYLOAD_BYTES_MAX,
    Address,
    Answer,
    Ask,
    Buffer,
    Counted,
    Found,
    Get,
    Has,
    Hello,
    Known,
    Put,
    Request,
    Stats,
    Verify,
    Welcome,
)
from headrace_cache.metrics import Metrics
from headrace_cache.store import Outcome, Store

SWEEP_EVERY_S = 1.0
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
"""Asked for; the kernel gives what its own limits allow."""

PROBE_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients together and each of them may take."""

    connections_max: int = 256
    unsent_frames_max: int = 16
    unsent_bytes_max: int = PAYLOAD_BYTES_MAX
    receiving_bytes_max: int = 256 * 1024 * 1024
    idle_ms_max: int = 600_000
    stall_ms_max: int = 10_000
    drain_s_max: float = 5.0


@dataclass(slots=True)
class _Reply:
    """An answer on its way out, and what is measured when it has left."""

    op: str
    buffers: list[Buffer]
    size_bytes: int
    span: Span
    began_s: float


class _Connection(FrameProtocol[Request]):
    """One client."""

    def __init__(self, server: CacheServer) -> None:
        super().__init__(decode_request, self._choose)
        self._server = server
        self._unsent: deque[_Reply] = deque()
        self._unsent_bytes = 0
        self._receiving_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._paused = False
        self._began_ns = 0
        self._began_s = 0.0
        self._heard_ms = server.clock.now_ms()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        _widen(transport)
        if not self._server.join(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._release()
        self._server.leave(self)

    def buffer_updated(self, nbytes: int) -> None:
        self._heard_ms = self._server.clock.now_ms()
        super().buffer_updated(nbytes)

    def _choose(self, request: Request) -> Sequence[bool]:
        self._began_ns = self._server.clock.wall_ns()
        self._began_s = asyncio.get_running_loop().time()
        wanted, self._receiving_bytes = self._server.choose(request)
        return wanted

    def _release(self) -> None:
        self._server.receiving_bytes -= self._receiving_bytes
        self._receiving_bytes = 0

    def frame_received(self, message: Request, parts: list[memoryview | None]) -> None:
        self._release()
        reply = self._server.answer(message, parts, self._began_ns, self._began_s)
        self._unsent.append(reply)
        self._unsent_bytes += reply.size_bytes
        self._set_paused()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_unsent())

    def malformed(self, error: WireError) -> None:
        log.warning("malformed frame, connection closed", error=error.message)

    def _set_paused(self) -> None:
        limits = self._server.limits
        full = (
            len(self._unsent) >= limits.unsent_frames_max
            or self._unsent_bytes >= limits.unsent_bytes_max
            or self._server.stopping
        )
        if full != self._paused and not self.closed and not self.transport.is_closing():
            self._paused = full
            if full:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()
                self._heard_ms = self._server.clock.now_ms()

    async def _write_unsent(self) -> None:
        try:
            while self._unsent:
                reply = self._unsent[0]
                await self.send(reply.buffers, self._server.limits.stall_ms_max / 1000)
                self._unsent.popleft()
                self._unsent_bytes -= reply.size_bytes
                self._server.sent(reply)
                self._set_paused()
        except ConnectionError as error:
            log.debug("client gone before its answer", reason=str(error))
        finally:
            self._writer = None
            for reply in self._unsent:
                self._server.lost(reply)
            self._unsent.clear()

    def sweep(self, now_ms: int) -> None:
        """End the connection if it has been silent for too long."""
        silent_ms = now_ms - self._heard_ms
        if self._paused or self._writer is not None:
            return
        if not self._reader.idle and silent_ms > self._server.limits.stall_ms_max:
            log.warning("client stalled within a frame", silent_ms=silent_ms)
            self.abort()
        elif silent_ms > self._server.limits.idle_ms_max:
            self.transport.close()

    async def finish(self) -> None:
        """Read no more, send what is unsent, close."""
        self._set_paused()
        if self._writer is not None:
            await asyncio.wait({self._writer})
        if not self.closed:
            self.transport.close()


class CacheServer:
    """Serves one store on one address."""

    def __init__(
        self, store: Store, clock: Clock | None = None, limits: Limits | None = None
    ) -> None:
        self.store = store
        self.clock: Clock = clock or SystemClock()
        self.limits = limits or Limits()
        self.metrics = Metrics(self.snapshot)
        self.receiving_bytes = 0
        self.stopping = False
        self._connections: set[_Connection] = set()
        self._empty = asyncio.Event()
        self._listener: asyncio.AbstractServer | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._path = ""

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port that was given where 0 was asked for.

        Raises SettingsError when the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        try:
            if address.path:
                unix = _unix_socket(address.path)
                self._listener = await loop.create_unix_server(self._accept, sock=unix)
                self._path = address.path
            else:
                server = await loop.create_server(self._accept, address.host, address.port)
                self._listener = server
                address = address._replace(port=server.sockets[0].getsockname()[1])
        except OSError as error:
            raise SettingsError(f"HEADRACE_CACHE_LISTEN: {address}: {error}") from error
        self._sweeper = loop.create_task(self._sweep_for_ever())
        return address

    async def stop(self) -> None:
        """Accept nothing new, answer what was asked within `drain_s_max`, close."""
        self.stopping = True
        if self._listener is not None:
            self._listener.close()
        path, self._path = self._path, ""
        if path:
            Path(path).unlink(missing_ok=True)  # noqa: ASYNC240  # one unlink, at the end
        if self._sweeper is not None:
            self._sweeper.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_s_max):
                await asyncio.gather(*(each.finish() for each in list(self._connections)))
                await self._wait_empty()
        for connection in list(self._connections):
            connection.abort()
        await self._wait_empty()
        await self.metrics.close()

    async def _wait_empty(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()

    def _accept(self) -> _Connection:
        return _Connection(self)

    def join(self, connection: _Connection) -> bool:
        """Whether there is room for one more connection; it is counted then."""
        if self.stopping or len(self._connections) >= self.limits.connections_max:
            log.warning("connection refused", connections=len(self._connections))
            return False
        self._connections.add(connection)
        return True

    def leave(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            self.sweep()

    def sweep(self) -> None:
        """End connections that stalled or have long been idle."""
        now_ms = self.clock.now_ms()
        for connection in list(self._connections):
            connection.sweep(now_ms)

    def choose(self, request: Request) -> tuple[Sequence[bool], int]:
        """Which entries of a put are worth receiving, and the bytes counted as being received."""
        if not isinstance(request, Put):
            return (), 0
        store = self.store
        wanted = [facts.key not in store and store.can_hold(facts) for facts in request.entries]
        size_bytes = sum(
            facts.size_bytes for facts, want in zip(request.entries, wanted, strict=True) if want
        )
        if self.receiving_bytes + size_bytes > self.limits.receiving_bytes_max:
            return [False] * len(wanted), 0
        self.receiving_bytes += size_bytes
        return wanted, size_bytes

    def answer(
        self,
        request: Request,
        parts: list[memoryview | None],
        began_ns: int,
        began_s: float,
    ) -> _Reply:
        """Do what `request` asks. Never waits."""
        match request:
            case Get():
                return self._get(request, began_ns, began_s)
            case Put():
                return self._put(request, parts, began_ns, began_s)
            case Has():
                known = Known(request.id, tuple(key in self.store for key in request.keys))
                return _reply("has", known, began_s)
            case Verify():
                dropped = sum(self.store.verify(key) for key in request.keys)
                return _reply("verify", Counted(request.id, dropped), began_s)
            case Hello():
                nowhere = Welcome(request.id, "", bytes(NONCE_BYTES), 0, 0)
                return _reply("hello", nowhere, began_s)
            case Ask(op="ping"):
                return _reply("ping", Counted(request.id, 0), began_s)
            case Ask():
                return _reply("stats", Stats(request.id, self.snapshot()), began_s)
            case _:
                raise WireError("this service has no arena")

    def _get(self, request: Get, began_ns: int, began_s: float) -> _Reply:
        run = self.store.get_run(request.keys, self.clock.now_ms(), PAYLOAD_BYTES_MAX, request.band)
        facts = [stored.facts for stored in run.entries]
        found = Found(
            request.id,
            tuple(each.size_bytes for each in facts),
            tuple(each.crc for each in facts),
            run.more,
        )
        attributes: dict[str, str | int] = {
            "headrace.cache.kind": request.keys[0].kind,
            "headrace.cache.keys": len(request.keys),
            "headrace.cache.hits": len(facts),
            "headrace.cache.bytes": run.bytes,
        }
        reply = _reply("get", found, began_s)
        reply.buffers.extend(stored.data for stored in run.entries)
        reply.size_bytes += run.bytes
        reply.span = _server_span("cache get", request.trace, began_ns, attributes)
        return reply

    def _put(
        self, request: Put, parts: list[memoryview | None], began_ns: int, began_s: float
    ) -> _Reply:
        now_ms = self.clock.now_ms()
        outcomes = [
            self.store.put(facts, part, now_ms)
            for facts, part in zip(request.entries, parts, strict=True)
        ]
        present = outcomes.count(Outcome.PRESENT)
        held = sum(facts.key in self.store for facts in request.entries)
        attributes: dict[str, str | int] = {
            "headrace.cache.kind": request.entries[0].key.kind,
            "headrace.cache.keys": len(outcomes),
            "headrace.cache.hits": present,
            "headrace.cache.kept": outcomes.count(Outcome.KEPT),
            "headrace.cache.bytes": sum(request.sizes),
        }
        reply = _reply("put", Counted(request.id, held), began_s)
        reply.span = _server_span("cache put", request.trace, began_ns, attributes)
        return reply

    def snapshot(self) -> dict[str, Any]:
        """The store's statistics and the number of connections."""
        return self.store.stats() | {"connections": len(self._connections)}

    def sent(self, reply: _Reply) -> None:
        """`reply` was handed to the kernel."""
        reply.span.end(self.clock.wall_ns())
        elapsed_s = asyncio.get_running_loop().time() - reply.began_s
        self.metrics.seconds.labels(reply.op).observe(elapsed_s)

    def lost(self, reply: _Reply) -> None:
        """The client of `reply` is gone, or did not read it."""
        reply.span.set_status(trace.StatusCode.ERROR, "the client did not read the answer")
        reply.span.end(self.clock.wall_ns())

    def check_integrity(self) -> None:
        """Assert that the store is whole, and when no client is there that nothing is held."""
        self.store.check_integrity()
        assert self.receiving_bytes >= 0, "what is released was counted"
        assert self._connections or self.receiving_bytes == 0, "the gone hold no bytes"


def _reply(op: str, answer: Answer, began_s: float) -> _Reply:
    head = encode(answer)
    return _Reply(op, [head], len(head), trace.INVALID_SPAN, began_s)


def _server_span(
    name: str, carrier: Mapping[str, str], start_ns: int, attributes: Mapping[str, str | int]
) -> Span:
    """A SERVER span under the caller's; none where the caller is not traced."""
    if not carrier or not telemetry.enabled():
        return trace.INVALID_SPAN
    return telemetry.tracer().start_span(
        name,
        context=telemetry.extract(carrier),
        kind=SpanKind.SERVER,
        attributes=attributes,
        start_time=start_ns,
    )


def _widen(transport: asyncio.BaseTransport) -> None:
    """Larger socket buffers: fewer turns of the event loop for each megabyte."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def _unix_socket(path: str) -> socket.socket:
    """A socket bound to `path`, for its owner only. Raises OSError when somebody listens there."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(path).stat().st_mode):
            _check_stale(path)
            Path(path).unlink()
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        unix.bind(path)
    except OSError:
        unix.close()
        raise
    finally:
        os.umask(mask)
    return unix


def _check_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
    raise OSError("another cache service listens there")
