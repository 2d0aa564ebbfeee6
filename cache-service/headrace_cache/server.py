"""The cache service's sockets: frames in, store, frames out.

Invariants: one thread owns the store, so a request is answered in one go and no lock is needed;
whatever a connection sends costs at most that connection. What a connection held of the arena is
free when it ends, but not before its client has it mapped no more.
Rejected: a task for each request (a get takes microseconds; only sending waits).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import stat
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from headrace import cache_admin, telemetry
from headrace.clock import Clock, SystemClock
from headrace.errors import SettingsError, WireError
from headrace.frame_protocol import Place
from headrace.frames import (
    DISK,
    PAYLOAD_BYTES_MAX,
    Address,
    Ask,
    Commit,
    Counted,
    Found,
    Get,
    Has,
    Hello,
    Known,
    Lend,
    Lent,
    Manage,
    Put,
    Release,
    Request,
    Reserve,
    Reserved,
    Stats,
    Verify,
    Welcome,
)
from headrace_cache.admin import manage
from headrace_cache.connection import Connection, Limits, Reply
from headrace_cache.disk import DiskTier
from headrace_cache.grants import NOWHERE, Loan, Outcome
from headrace_cache.management import Management
from headrace_cache.metrics import Metrics
from headrace_cache.store import Store
from headrace_cache.tiers import Tiers, Wanted

__all__ = ["CacheServer", "Limits"]

SWEEP_EVERY_S = 1.0
TRIM_AFTER_S = 0.002
"""Places had ahead were named, and are not committed: longer than copying a usual batch takes,
which has begun already. A commit that comes meanwhile would have to wait."""

PROBE_S = 1.0

log = structlog.get_logger(__name__)


class CacheServer:
    """Serves one store on one address."""

    def __init__(
        self,
        store: Store,
        clock: Clock | None = None,
        limits: Limits | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.store = store
        self.clock: Clock = clock or SystemClock()
        self.tiers = Tiers(store, disk, self.clock)
        self.limits = limits or Limits()
        self.metrics = Metrics(self.snapshot)
        self.management = Management(self.tiers)
        self.stopping = False
        self._seats = itertools.count(1)
        self._connections: dict[int, Connection] = {}  # by seat
        self._gone: set[int] = set()
        """Seats of ended connections whose clients still have the arena mapped."""
        self._empty = asyncio.Event()
        self._listener: asyncio.AbstractServer | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._trimmer: asyncio.Handle | None = None
        self._trims_later = False
        self._path = ""

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port that was given where 0 was asked for.

        Raises SettingsError when the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        await self.tiers.start()
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
                await asyncio.gather(*(each.finish() for each in list(self._connections.values())))
                await self._wait_empty()
        for connection in list(self._connections.values()):
            connection.abort()
        await self._wait_empty()
        if self._trimmer is not None:
            self._trimmer.cancel()
        await self.metrics.close()
        await self.tiers.close()

    async def _wait_empty(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()

    def _accept(self) -> Connection:
        return Connection(self, next(self._seats))

    def join(self, connection: Connection) -> bool:
        """Whether there is room for one more connection; it is counted then."""
        if self.stopping or len(self._connections) >= self.limits.connections_max:
            log.warning("connection refused", connections=len(self._connections))
            return False
        self._connections[connection.seat] = connection
        return True

    def leave(self, connection: Connection) -> None:
        """Forget an ended connection, and end what it held if its client cannot touch it."""
        self._connections.pop(connection.seat, None)
        if connection.has_arena:
            self._gone.add(connection.seat)
            self._end_gone()
        else:
            self.store.end_all(connection.seat)
        if not self._connections:
            self._empty.set()

    def _end_gone(self) -> None:
        for seat in [seat for seat in self._gone if not self.store.arena.is_mapped_by(seat)]:
            self._gone.remove(seat)
            self.store.end_all(seat)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            self.sweep()

    def sweep(self) -> None:
        """End connections that stalled, have long been idle or keep what they were lent."""
        now_ms = self.clock.now_ms()
        for connection in list(self._connections.values()):
            connection.sweep(now_ms)
        for seat in self.store.overdue(now_ms - self.limits.lease_ms_max):
            if seat in self._connections:
                log.warning("client keeps what it was lent or has ahead, connection closed")
                self._connections[seat].abort()
        self._end_gone()

    def _trim_soon(self, after_s: float = 0.0) -> None:
        """Once the answer is on its way, and its client has something to do."""
        if self._trimmer is not None:
            if after_s or not self._trims_later:
                return
            self._trimmer.cancel()
        loop = asyncio.get_running_loop()
        self._trims_later = after_s > 0
        self._trimmer = (
            loop.call_later(after_s, self._trim) if after_s else loop.call_soon(self._trim)
        )

    def _trim(self) -> None:
        self._trimmer = None
        if self.store.trim(self.clock.now_ms()):
            self._trim_soon()

    def places(self, connection: Connection, put: Put) -> Sequence[Place]:
        """Where the entries of a put are received: in the arena, or nowhere."""
        reservation = self.store.reserve(connection.seat, put.entries, self.clock.now_ms())
        self._trim_soon()
        connection.receiving = reservation.ticket
        connection.outcomes = reservation.outcomes
        return [
            place != NOWHERE and self.store.arena.view(place, facts.size_bytes)
            for place, facts in zip(reservation.places, put.entries, strict=True)
        ]

    def answer(
        self, connection: Connection, request: Request, began_ns: int, began_s: float
    ) -> Reply | Awaitable[Reply] | None:
        """Do what `request` asks. Never waits. Raises WireError, which ends the connection."""
        match request:
            case Get():
                return self._get(connection, request, began_ns, began_s)
            case Put():
                return self._put(connection, request, began_ns, began_s)
            case Release():
                self.store.end(connection.seat, request.lease)
                return None
            case Reserve():
                return self._reserve(connection, request, began_ns, began_s)
            case Commit():
                seat, now_ms = connection.seat, self.clock.now_ms()
                kept = self.store.commit(seat, request.ticket, request.crcs, now_ms)
                self._trim_soon()
                return Reply("commit", Counted(request.id, kept), began_s)
            case Hello():
                return Reply("hello", self._welcome(connection, request), began_s)
            case Has():
                known = Known(request.id, tuple(key in self.tiers for key in request.keys))
                return Reply("has", known, began_s)
            case Verify():
                dropped = sum(self.tiers.verify(key) for key in request.keys)
                return Reply("verify", Counted(request.id, dropped), began_s)
            case Ask(op="ping"):
                return Reply("ping", Counted(request.id, 0), began_s)
            case Ask():
                return Reply("stats", Stats(request.id, self.snapshot()), began_s)
            case Manage():
                return self._manage(request, began_s)

    def _welcome(self, connection: Connection, request: Hello) -> Welcome:
        arena = self.store.arena
        return Welcome(request.id, arena.path, arena.nonce, arena.mapped_bytes, connection.seat)

    def _check_arena(self, connection: Connection) -> None:
        """Raises WireError if the client cannot have the arena mapped."""
        if not connection.has_arena:
            if not self.store.arena.is_mapped_by(connection.seat):
                raise WireError("nothing is lent to who has not mapped the arena")
            connection.has_arena = True

    def _get(
        self, connection: Connection, request: Get, began_ns: int, began_s: float
    ) -> Reply | Awaitable[Reply]:
        limit_bytes = PAYLOAD_BYTES_MAX
        if isinstance(request, Lend):
            self._check_arena(connection)
            limit_bytes = self.limits.lent_bytes_max - self.store.leases.held_bytes(connection.seat)
        wanted = Wanted(request.keys, max(0, limit_bytes), request.band, request.layout)
        loan = self.tiers.lend(connection.seat, wanted)
        if isinstance(loan, Loan):
            return self._found(request, loan, began_ns, began_s)
        return self._found_later(request, loan, began_ns, began_s)

    async def _found_later(
        self, request: Get, awaited: Awaitable[Loan], began_ns: int, began_s: float
    ) -> Reply:
        """The answer once what is on disk was read."""
        return self._found(request, await awaited, began_ns, began_s)

    def _found(self, request: Get, loan: Loan, began_ns: int, began_s: float) -> Reply:
        run = (request.id, loan.sizes, loan.crcs, loan.more, loan.tiers)
        if isinstance(request, Lend):
            reply = Reply("lend", Lent(*run, loan.lease, loan.places), began_s)
        else:
            views = [
                self.store.arena.view(place, size)
                for place, size in zip(loan.places, loan.sizes, strict=True)
            ]
            reply = Reply("get", Found(*run), began_s, views, lease=loan.lease)
        reply.span = _server_span(
            "cache get",
            request.trace,
            began_ns,
            {
                "headrace.cache.kind": request.keys[0].kind,
                "headrace.cache.keys": len(request.keys),
                "headrace.cache.hits": len(loan.places),
                "headrace.cache.bytes": loan.bytes,
                "headrace.cache.from_disk": loan.tiers.count(DISK),
                "headrace.cache.saved_ms": loan.saved_us / 1000,
            },
        )
        return reply

    def _put(self, connection: Connection, request: Put, began_ns: int, began_s: float) -> Reply:
        outcomes = connection.outcomes
        crcs = [
            facts.crc
            for facts, outcome in zip(request.entries, outcomes, strict=True)
            if outcome is Outcome.KEPT
        ]
        self.store.commit(connection.seat, connection.receiving, crcs, self.clock.now_ms())
        held = sum(facts.key in self.store for facts in request.entries)
        reply = Reply("put", Counted(request.id, held), began_s)
        reply.span = _put_span(request, outcomes, began_ns)
        return reply

    def _reserve(
        self, connection: Connection, request: Reserve, began_ns: int, began_s: float
    ) -> Reply:
        self._check_arena(connection)
        seat, now_ms = connection.seat, self.clock.now_ms()
        reservation = self.store.reserve(seat, request.entries, now_ms, request.using)
        count, size_bytes = request.ahead
        ahead: tuple[int, tuple[int, ...]] = (0, ())
        if count and size_bytes:
            tenant = request.entries[0].tenant
            ahead = self.store.reserve_ahead(seat, tenant, count, size_bytes, now_ms)
        self._trim_soon(TRIM_AFTER_S if request.using else 0.0)
        held = reservation.outcomes.count(Outcome.PRESENT)
        reserved = Reserved(request.id, reservation.ticket, reservation.places, held, *ahead)
        reply = Reply("reserve", reserved, began_s)
        reply.span = _put_span(request, reservation.outcomes, began_ns)
        return reply

    async def _manage(self, request: Manage, began_s: float) -> Reply:
        """The answer once the disk did its part. Raises WireError."""
        asked = cache_admin.decode_request(request.values)
        answer = await manage(self.management, asked, self.clock.now_ms())
        return Reply("manage", Stats(request.id, cache_admin.encode(answer)), began_s)

    def snapshot(self) -> dict[str, Any]:
        """The store's statistics and the number of connections."""
        return self.tiers.stats() | {"connections": len(self._connections)}

    def sent(self, connection: Connection, reply: Reply) -> None:
        """`reply` was handed to the kernel."""
        if reply.lease:
            self.store.end(connection.seat, reply.lease)
        reply.span.end(self.clock.wall_ns())
        elapsed_s = asyncio.get_running_loop().time() - reply.began_s
        self.metrics.seconds.labels(reply.op).observe(elapsed_s)

    def lost(self, connection: Connection, reply: Reply) -> None:
        """The client of `reply` is gone, or did not read it."""
        self.store.end(connection.seat, reply.lease)
        reply.span.set_status(trace.StatusCode.ERROR, "the client did not read the answer")
        reply.span.end(self.clock.wall_ns())

    def check_integrity(self) -> None:
        """Assert that the store is whole, and when no client is there that nothing is held."""
        self.store.check_integrity()
        held = len(self.store.leases) + self.store.reserved_bytes
        assert self._connections or self._gone or not held, "the gone hold nothing"


def _put_span(request: Put | Reserve, outcomes: Sequence[Outcome], began_ns: int) -> Span:
    if not request.trace:
        return trace.INVALID_SPAN
    return _server_span(
        "cache put",
        request.trace,
        began_ns,
        {
            "headrace.cache.kind": request.entries[0].key.kind,
            "headrace.cache.keys": len(outcomes),
            "headrace.cache.hits": outcomes.count(Outcome.PRESENT),
            "headrace.cache.kept": outcomes.count(Outcome.KEPT),
            "headrace.cache.bytes": sum(facts.size_bytes for facts in request.entries),
        },
    )


def _server_span(
    name: str, carrier: Mapping[str, str], start_ns: int, attributes: Mapping[str, str | float]
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
