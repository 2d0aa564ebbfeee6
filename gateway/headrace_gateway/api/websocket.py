"""GET /v1/responses, upgraded: OpenAI's Responses mode over a WebSocket.

Invariant: a bad frame is answered and the connection lives on; when it closes, nothing that it
started runs on. A client that does not read is found by the heartbeat, since its pongs do not come.
Text that goes on is written by the reader of the replies, as on event streams: whole frames go
to the transport in one call each, whoever writes them, so that they never mix.
Rejected: compressed frames, where tokens are too short to gain and each connection pays memory.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from headrace.errors import CallerError, HeadraceError, NotFoundError, OverloadError
from headrace_gateway.api.bodies import parse_object
from headrace_gateway.api.context import GATEWAY, Gateway
from headrace_gateway.api.errors import as_headrace_error, http_error, retry_headers
from headrace_gateway.api.lanes import Lanes, Work
from headrace_gateway.api.requests import make_call
from headrace_gateway.api.response_events import Json, Line, ResponseEvents, lines_of
from headrace_gateway.api.response_schemas import (
    CREATE,
    Frame,
    parse_frame,
    parse_response,
    read_lane,
)
from headrace_gateway.api.responses import ID_PREFIX, TextOutlet, finished, start
from headrace_gateway.api.sse import OPENING_S, calm, dump, quote
from headrace_gateway.api.turn import STATUS_OK, ClientGoneError, Turn
from headrace_gateway.api.waiting import Place
from headrace_gateway.choices import Piece

log = structlog.get_logger()

TURN_ROUTE = "/v1/responses#turn"
CLOSE_S = 5.0
_TEXT_FRAME = 0x81
"""A whole message of text in one frame, which a server does not mask (RFC 6455, section 5.2)."""


async def responses_socket(request: web.Request) -> web.StreamResponse:
    """Serves one connection until it closes."""
    gateway = request.app[GATEWAY]
    gateway.check_open()
    _check_upgrade(request, gateway)
    settings = gateway.settings
    socket = web.WebSocketResponse(
        timeout=CLOSE_S,
        heartbeat=settings.ws_heartbeat_ms / 1000,
        compress=False,
        max_msg_size=settings.body_bytes_max,
    )
    await socket.prepare(request)
    gateway.sockets.add(socket)
    connection = _Connection(request, socket, gateway)
    try:
        await connection.serve()
    finally:
        gateway.sockets.discard(socket)
        await connection.lanes.close()
    return socket


def _check_upgrade(request: web.Request, gateway: Gateway) -> None:
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise http_error(426, "GET here is for WebSocket clients; POST creates a response")
    if len(gateway.sockets) >= gateway.settings.websockets_max:
        raise OverloadError(
            f"{gateway.settings.websockets_max} WebSockets are open at this gateway",
            code="websocket_connection_limit_reached",
            retry_after_ms=1_000,
        )
    # Browsers let any page open a WebSocket to any host: without keys only our own pages may.
    origin = request.headers.get("Origin")
    if gateway.tenants.open_to_all and origin and urlsplit(origin).netloc != request.host:
        raise CallerError(
            "WebSockets from other origins need an API key",
            status=403,
            code="origin_not_allowed",
        )


class _Connection:
    """One WebSocket and its lanes."""

    def __init__(
        self, request: web.Request, socket: web.WebSocketResponse, gateway: Gateway
    ) -> None:
        self._request = request
        self._socket = socket
        self._gateway = gateway
        self._write_s = gateway.settings.write_ms / 1000
        self.lanes = Lanes(
            self._turn,
            lanes_max=gateway.settings.ws_lanes_max,
            queue_max=gateway.settings.ws_queue_max,
        )

    async def serve(self) -> None:
        """Read frames until the connection ends."""
        try:
            async for message in self._socket:
                await self._take(message)
        except ClientGoneError:
            return
        except Exception as error:  # after the upgrade there is no HTTP answer to give any more
            log.error("unexpected error", what="a WebSocket", exc_info=error)
            await self._socket.close(code=WSCloseCode.INTERNAL_ERROR)

    async def _take(self, message: WSMessage) -> None:
        lane: str | None = None
        try:
            if message.type is not WSMsgType.TEXT:
                raise CallerError("frames are text, holding JSON", code="invalid_frame")
            value = parse_object(message.data)
            lane = read_lane(value)
            frame = parse_frame(value)
            if frame.type == CREATE:
                self.lanes.add(Work(frame.lane, frame.body))
            else:
                self._cancel(frame)
        except HeadraceError as error:
            await self._send_error(error, lane)

    def _cancel(self, frame: Frame) -> None:
        if not self.lanes.cancel(frame.lane, frame.response_id):
            raise NotFoundError(
                "no such response is running here",
                code="response_not_found",
                param="response_id" if frame.response_id else "stream_id",
            )

    async def _turn(self, work: Work) -> None:
        """One `response.create`: its events, or the error frame that it earned."""
        status = STATUS_OK
        call = make_call(self._request, "chat", "websocket")
        turn = Turn(self._gateway, call, ID_PREFIX)
        try:
            async with turn:
                parsed = parse_response(work.body | {"stream": True})
                events = await start(turn, parsed)
                work.response_id = turn.id
                await self._tell(turn, events, work)
            status = turn.status
        except ClientGoneError:
            status = turn.status
        except asyncio.CancelledError:
            status = turn.status
            self._check_asked(work)
            await self._send_error(_cancelled_early(), work.lane)
        except Exception as error:
            known = as_headrace_error(error, "a WebSocket turn")
            status = known.status
            await self._send_error(known, work.lane)
        finally:
            self._gateway.metrics.requests.labels(TURN_ROUTE, str(status)).inc()

    async def _tell(self, turn: Turn, events: ResponseEvents, work: Work) -> None:
        frames = _Frames(self, work.lane, lines_of(events.opening()))

        async def send_all(made: list[Json]) -> None:
            await frames.send(lines_of(made))

        async def send(piece: Piece) -> None:
            await frames.send(events.lines(piece))

        async def tell(place: Place | None) -> None:
            await send_all(events.place(place))

        try:
            await turn.run(send, tell, TextOutlet(events, self.ready, frames.send_now))
            work.settled = True
            await send_all(finished(turn, events))
        except ClientGoneError:
            raise
        except asyncio.CancelledError:
            self._check_asked(work)
            await turn.stop()
            await send_all(events.cancelled(turn.usage()))
        except Exception as error:  # the response was created: it ends with an event of its own
            work.settled = True
            turn.note_error(error)
            known = as_headrace_error(error, "a WebSocket turn")
            await send_all(events.failed(known, turn.usage()))
        finally:
            frames.close()

    def _check_asked(self, work: Work) -> None:
        """Called for a CancelledError, which goes on unless the client asked for this one.

        In that case only the turn ends: its task also runs the lane's next turns.
        """
        if not work.cancelled or self._socket.closed:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None, "turns run in tasks"
        task.uncancel()

    async def _send_error(self, error: HeadraceError, lane: str | None) -> None:
        body: dict[str, Any] = dict(error.body()["error"])
        if error.retry_after_ms is not None:
            body["headers"] = retry_headers(error)
        await self.send(dump({"type": "error", "status": error.status, "error": body}), lane)

    async def send(self, event: str, lane: str | None) -> None:
        """One event, given as JSON. Raises ClientGoneError."""
        event = _in_lane(event, lane)
        try:
            if calm(self._request.transport, len(event)):
                await self._socket.send_str(event)
                return
            async with asyncio.timeout(self._write_s):
                await self._socket.send_str(event)
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGoneError("the client does not read") from error
        except ConnectionError as error:
            raise ClientGoneError("the client went away") from error

    def ready(self) -> bool:
        """Whether `send_now` may be called: what it sends leaves at once, behind all before."""
        transport = self._request.transport
        open_ = not self._socket.closed and transport is not None and not transport.is_closing()
        return open_ and calm(transport, 0)

    def send_now(self, event: str, lane: str | None) -> None:
        """As `send`, when `ready`, without a coroutine: most of what is sent is one token."""
        transport = self._request.transport
        assert transport is not None, "ready() comes first"
        transport.write(text_frame(_in_lane(event, lane).encode()))


class _Frames:
    """What one turn sends, in its order. The opening waits for the first token, if that comes soon,
    as an event stream's does."""

    def __init__(self, connection: _Connection, lane: str | None, opening: list[Line]) -> None:
        self._connection = connection
        self._lane = lane
        self._unsent = deque(opening)
        self._timer = asyncio.get_running_loop().call_later(OPENING_S, self._begin)

    async def send(self, lines: list[Line]) -> None:
        """Raises ClientGoneError."""
        self._unsent += lines
        while self._unsent:
            # taken before: whoever is cancelled has written it
            await self._connection.send(self._unsent.popleft().json, self._lane)

    def send_now(self, line: Line) -> None:
        """As `send`, when the connection is ready."""
        self._unsent.append(line)
        while self._unsent:
            self._connection.send_now(self._unsent.popleft().json, self._lane)

    def _begin(self) -> None:
        while self._unsent and self._connection.ready():  # else whoever sends next does it
            self._connection.send_now(self._unsent.popleft().json, self._lane)

    def close(self) -> None:
        self._timer.cancel()


def _in_lane(event: str, lane: str | None) -> str:
    return event if lane is None else f'{event[:-1]},"stream_id":{quote(lane)}}}'


def text_frame(data: bytes) -> bytes:
    """`data` as one message of a server."""
    size = len(data)
    if size < 126:
        return struct.pack("!BB", _TEXT_FRAME, size) + data
    if size < 65_536:
        return struct.pack("!BBH", _TEXT_FRAME, 126, size) + data
    return struct.pack("!BBQ", _TEXT_FRAME, 127, size) + data


def _cancelled_early() -> HeadraceError:
    return CallerError("cancelled before the response was created", status=499, code="cancelled")


async def close_sockets(gateway: Gateway) -> None:
    """Tell every client that the gateway goes away."""
    for socket in set(gateway.sockets):
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"gateway is shutting down")
