"""Clients that read streams as cheaply as Python can: bytes are counted, few are parsed.

They share the cores with what they measure. Each is one connection that asks again when its last
stream has ended. An event is counted where it begins; every CHECK_EVERYth stream is read in full
and held against what the worker said.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

CHECK_EVERY = 16
STREAM_S_MAX = 60
TAIL_BYTES = 64
"""Of what came before, so that what is looked for may come in two pieces."""
HEAD_END = b"\r\n\r\n"


@dataclass(slots=True)
class Tally:
    """What all clients of a round have read. Instants are seconds of `time.perf_counter`."""

    streams: int = 0
    events: int = 0
    """With text of the answer."""
    tokens: int = 0
    bytes: int = 0
    checked: int = 0
    firsts: list[tuple[float, float]] = field(default_factory=list)
    """When each request was sent, and when its first token was there."""

    def copy(self) -> Tally:
        return Tally(self.streams, self.events, self.tokens, self.bytes, self.checked, [])


class StreamError(Exception):
    """A stream that is not as it should be."""


class Client(asyncio.Protocol, ABC):
    """One connection. `ask` makes the next request; `text` is what each answer has to say."""

    marker = b""
    """Begins each event with text."""
    before_text = 0
    """Such events that come before the first token."""
    usage = b""
    """The name of the count of the answer's tokens."""

    def __init__(self, tally: Tally, ask: Callable[[], bytes], text: str, tokens: int) -> None:
        self._tally = tally
        self._ask = ask
        self._text = text
        self._tokens = tokens
        self._parts: list[bytes] = []
        self._tail = b""
        self._events = 0
        self._sent_s = self._first_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self.closed: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = exc or StreamError("the connection was closed")
        if self._done is not None and not self._done.done():
            self._done.set_exception(self.closed)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._parts.append(data)
        seen = self._tail + data
        found = seen.count(self.marker) - self._tail.count(self.marker)
        self._tail = seen[-TAIL_BYTES:]
        self._events += found
        self._tally.events += found
        self._tally.bytes += len(data)
        if not self._first_s and self._events > self.before_text:
            self._first_s = now_s
        if self._done is None or self._done.done():
            return
        try:
            if self._ends(seen):
                self._done.set_result(None)
        except StreamError as error:
            self._done.set_exception(error)

    @abstractmethod
    def _ends(self, seen: bytes) -> bool:
        """Whether the stream ends with the last bytes, `seen`. Raises StreamError."""

    async def stream(self) -> None:
        """One request to its end. Raises StreamError."""
        assert self._transport is not None, "connected first"
        self._parts.clear()
        self._tail, self._events, self._first_s = b"", 0, 0.0
        request = self._ask()
        self._done = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter()
        self._transport.write(self.wrap(request))
        async with asyncio.timeout(STREAM_S_MAX):
            await self._done
        tally = self._tally
        tally.firsts.append((self._sent_s, self._first_s))
        tally.streams += 1
        tally.tokens += self._tokens
        tally.events -= self.before_text
        self._check(self.answer, deep=tally.streams % CHECK_EVERY == 0)

    def _check(self, data: bytes, *, deep: bool) -> None:
        if self.usage not in data:
            raise StreamError(f"no usage: {data[-600:].decode(errors='replace')}")
        count = json.loads(b"{" + data[data.rindex(self.usage) :].split(b",", 1)[0] + b"}")
        if list(count.values()) != [self._tokens]:
            raise StreamError(f"{count} instead of {self._tokens} tokens")
        if deep:
            self._tally.checked += 1
            said = "".join(self.texts(data))
            if said != self._text:
                raise StreamError(f"said {said!r}")

    @abstractmethod
    def wrap(self, request: bytes) -> bytes:
        """`request`, as it is sent."""

    @abstractmethod
    def texts(self, data: bytes) -> list[str]:
        """What a whole answer says, piece by piece."""

    @property
    def answer(self) -> bytes:
        """All of the last stream, as it came."""
        return b"".join(self._parts)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class SseClient(Client):
    """Chat completions; the first event of a stream says who speaks."""

    marker = b'"delta":{"'
    before_text = 1
    usage = b'"completion_tokens"'

    def _ends(self, seen: bytes) -> bool:
        if len(self._parts) == 1 and not seen.startswith(b"HTTP/1.1 200"):
            raise StreamError(seen[:1_000].decode(errors="replace"))
        return seen.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    def wrap(self, request: bytes) -> bytes:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(request)}\r\n\r\n"
        )
        return head.encode() + request

    def texts(self, data: bytes) -> list[str]:
        return [
            choice["delta"].get("content") or ""
            for event in sse_events(data)
            for choice in json.loads(event[len(b"data: ") :])["choices"]
        ]


def sse_events(data: bytes) -> list[bytes]:
    """The events of an HTTP answer in chunks, without the last one, `[DONE]`."""
    head, _, body = data.partition(HEAD_END)
    if not head.startswith(b"HTTP/1.1 200"):
        raise StreamError(data[:500].decode(errors="replace"))
    plain = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        plain, body = plain + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return [e for e in plain.split(b"\n\n") if e.startswith(b"data: {")]


class WebSocketClient(Client):
    """The Responses API over a WebSocket: a frame an event. `open` it first."""

    marker = b'"type":"response.output_text.delta"'
    usage = b'"output_tokens"'
    over = b'"type":"response.incomplete"'
    frame_end = re.compile(rb'"sequence_number":\d+\}$')

    def __init__(self, tally: Tally, ask: Callable[[], bytes], text: str, tokens: int) -> None:
        super().__init__(tally, ask, text, tokens)
        self._is_open = self._is_over = False

    def _ends(self, seen: bytes) -> bool:
        if not self._is_open:
            return seen.endswith(HEAD_END)
        if b'"type":"error"' in seen:
            raise StreamError(seen.decode(errors="replace"))
        self._is_over = self._is_over or self.over in seen
        return self._is_over and self.frame_end.search(seen[-64:]) is not None

    async def open(self) -> None:
        assert self._transport is not None, "connected first"
        key = base64.b64encode(os.urandom(16)).decode()
        self._done = asyncio.get_running_loop().create_future()
        head = (
            "GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        self._transport.write(head.encode())
        await self._done
        self._is_open = True

    async def stream(self) -> None:
        self._is_over = False
        await super().stream()

    def wrap(self, request: bytes) -> bytes:
        # a mask of zeros changes nothing
        size = len(request)
        assert size < 65_536, "frames of 16-bit length"
        head = struct.pack("!BB", 0x81, 0x80 | size) if size < 126 else None
        head = head or struct.pack("!BBH", 0x81, 0x80 | 126, size)
        return head + b"\0\0\0\0" + request

    def texts(self, data: bytes) -> list[str]:
        return [
            event["delta"]
            for event in map(json.loads, ws_messages(data))
            if event["type"] == "response.output_text.delta"
        ]


def ws_messages(data: bytes) -> list[bytes]:
    """The text frames in `data`."""
    messages, at = [], 0
    while at < len(data):
        opcode, size = data[at] & 0x0F, data[at + 1]
        at += 2
        if size == 126:
            (size,) = struct.unpack_from("!H", data, at)
            at += 2
        elif size == 127:
            (size,) = struct.unpack_from("!Q", data, at)
            at += 8
        if opcode == 1:
            messages.append(data[at : at + size])
        at += size
    return messages
