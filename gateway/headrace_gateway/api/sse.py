"""Server-sent events: headers out soon, then what a delivery says in one write, comments when it
is quiet.

Invariant: each write is whole events, so that those of several choices never mix; a write that
takes longer than `write_ms` means the client is gone. What is written without waiting goes
straight to the transport, in the framing that was settled when the headers went out. Events that
differ in nothing but a text are written from a mould, which is JSON but for that text. Rejected:
buffering for a slow client here, since what it has not read yet waits in the fleet's bounded log;
and a JSON encoder's walk through the same dictionary for each token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.errors import StreamGoneError

_KEEPALIVE = b": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
"""The marker that ends OpenAI's chat and completion streams."""

Write = Callable[[bytes], Awaitable[None]]


# one encoder for all: `json.dumps` with these options would build one a call, a call a token
dump: Callable[[Mapping[str, Any]], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":")
).encode


quote: Callable[[str], str] = json.encoder.encode_basestring
"""A text as JSON, as `dump` writes it."""

OPENING_S = 0.02
"""How long headers and opening events wait for something to go out with: a client that is woken
for them takes its time just when the first token is made, and where cores are few its core."""

CALM_BYTES = 16 * 1024
"""With less than this unsent a transport has not asked to wait: it does from 64 KiB on, and until
a quarter of that is left."""


@dataclass(frozen=True, slots=True)
class Mould:
    """The JSON of objects that differ in one or more values: what stands around those."""

    parts: tuple[str, ...]

    def fill(self, *values: str) -> str:
        """The object with `values`, each JSON already, where the holes were."""
        made = [self.parts[0]]
        for value, part in zip(values, self.parts[1:], strict=True):
            made += (value, part)
        return "".join(made)


def mould(value: Mapping[str, Any], *holes: str) -> Mould:
    """`value` with a hole for each of `holes`, texts that stand in it once, in this order."""
    parts, rest = [], dump(value)
    for hole in holes:
        assert rest.count(quote(hole)) == 1, "a hole stands once, behind those before it"
        part, _, rest = rest.partition(quote(hole))
        parts.append(part)
    return Mould((*parts, rest))


def event_of(text: str, name: str | None = None) -> str:
    """JSON as an event."""
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


def calm(transport: asyncio.WriteTransport | None, size: int) -> bool:
    """Whether a write of `size` bytes to `transport` ends at once, whoever reads."""
    return transport is not None and transport.get_write_buffer_size() + size < CALM_BYTES


class _Held(web.StreamResponse):
    """One whose headers go out with what is written first, in one piece."""

    _send_headers_immediately = False


class EventStream:
    """`async with EventStream(request) as events:`; its `response` is what the handler returns.

    `opening`: whole events that go out with the headers: with what is written first, or alone when
    that has not come for OPENING_S.
    """

    def __init__(self, request: web.Request, opening: str = "") -> None:
        settings = request.app[GATEWAY].settings
        self._request = request
        self._write_s = settings.write_ms / 1000
        self._keepalive_s = settings.keepalive_ms / 1000
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self._quiet = False
        self._held = opening.encode()
        self._begun = False
        self._begin_timer: asyncio.TimerHandle | None = None
        self._writer: AbstractStreamWriter | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._chunked = False
        self.response = _Held(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        if request.version == HttpVersion11:
            self.response.enable_chunked_encoding()

    async def __aenter__(self) -> EventStream:
        self._writer = await self.response.prepare(self._request)
        self._transport, self._chunked = self._request.transport, self.response.chunked
        self._begin_timer = asyncio.get_running_loop().call_later(OPENING_S, self._begin)
        self._tick()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_ticking()
        if self._comment is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._comment

    async def write(self, events: str) -> None:
        """Whole events, made by `event_of`. Raises StreamGoneError if the client takes none."""
        if events:
            await self._write(events.encode())

    def ready(self) -> bool:
        """Whether `write_now` may be called: what it writes leaves at once, behind all before."""
        transport = self._transport
        return (
            not (self._held and self._begun)
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() < CALM_BYTES
        )

    def write_now(self, events: bytes) -> None:
        """As `write`, when `ready`, without a coroutine: most of what is written is one token."""
        transport = self._transport
        assert transport is not None, "ready() comes first"
        self._quiet = False
        if not self._begun:
            self._begin()
        transport.write(self._framed(events))

    def _framed(self, events: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events

    def _begin(self) -> None:
        """The headers, and what is held, unless they are out."""
        transport, writer = self._transport, self._writer
        if self._begun or writer is None or transport is None or transport.is_closing():
            return  # whoever writes next finds out that the client is gone
        self._begun = True
        writer.send_headers()
        if self._held:
            transport.write(self._framed(self._held))
            self._held = b""

    async def comment(self, text: str) -> None:
        """One line that clients skip and people see. Raises StreamGoneError like `write`."""
        await self._write(f": {text}\n\n".encode())

    def hold(self, events: str) -> None:
        """Whole events that go out with what is written next, which comes at once."""
        self._held += events.encode()

    async def end(self, events: str = "") -> None:
        """The last events, and the end of the stream, in one write. Raises like `write`."""
        self._stop_ticking()  # behind the end there is no room for its comment
        await self._write(events.encode(), self.response.write_eof)

    async def _write(self, data: bytes, write: Write | None = None) -> None:
        self._quiet, self._begun = False, True  # the headers go with it
        write = write or self.response.write
        if self._held:
            data, self._held = self._held + data, b""
        try:
            if calm(self._request.transport, len(data)):
                await write(data)
            else:
                async with asyncio.timeout(self._write_s):
                    await write(data)
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise StreamGoneError(self.response) from error
        except ConnectionError as error:
            raise StreamGoneError(self.response) from error

    def _tick(self) -> None:
        """Proxies and clients drop a connection on which nothing moves while a job is queued.

        A timer and not a task: nearly all streams end before it has anything to do.
        """
        if self._quiet and (self._comment is None or self._comment.done()):
            self._comment = asyncio.create_task(self._keep_alive())
        self._quiet = True
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._keepalive_s, self._tick)

    async def _keep_alive(self) -> None:
        with contextlib.suppress(StreamGoneError):  # whoever writes next finds out as well
            await self._write(_KEEPALIVE)
            self._quiet = True

    def _stop_ticking(self) -> None:
        for each in (self._begin_timer, self._timer, self._comment):
            if each is not None:
                each.cancel()
