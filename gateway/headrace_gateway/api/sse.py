"""Server-sent events: headers out first, then one event a write, comments when it is quiet.

Invariant: each write is one whole event, so that events of several choices never mix; a write that
takes longer than `write_ms` means the client is gone. Rejected: buffering for a slow client here,
since what it has not read yet waits in the fleet's bounded log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from aiohttp import web

from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.errors import StreamGoneError

_KEEPALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


# one encoder for all: `json.dumps` with these options would build one a call, a call a token
dump: Callable[[Mapping[str, Any]], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":")
).encode


class EventStream:
    """`async with EventStream(request) as events:`; its `response` is what the handler returns."""

    def __init__(self, request: web.Request) -> None:
        settings = request.app[GATEWAY].settings
        self._request = request
        self._write_s = settings.write_ms / 1000
        self._keepalive_s = settings.keepalive_ms / 1000
        self._ticker: asyncio.Task[None] | None = None
        self._quiet = False
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._request)
        self._ticker = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker

    async def send(self, value: Mapping[str, Any], event: str | None = None) -> None:
        """One event. Raises StreamGoneError when the client does not take it."""
        name = f"event: {event}\n" if event else ""
        await self._write(f"{name}data: {dump(value)}\n\n".encode())

    async def comment(self, text: str) -> None:
        """One line that clients skip and people see. Raises StreamGoneError like `send`."""
        await self._write(f": {text}\n\n".encode())

    async def done(self) -> None:
        """The marker that ends OpenAI's chat and completion streams."""
        await self._write(_DONE)

    async def _write(self, data: bytes) -> None:
        self._quiet = False
        try:
            async with asyncio.timeout(self._write_s):
                await self.response.write(data)
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise StreamGoneError(self.response) from error
        except ConnectionError as error:
            raise StreamGoneError(self.response) from error

    async def _keep_alive(self) -> None:
        """Proxies and clients drop a connection on which nothing moves while a job is queued."""
        while True:
            self._quiet = True
            await asyncio.sleep(self._keepalive_s)
            if self._quiet:
                try:
                    await self._write(_KEEPALIVE)
                except StreamGoneError:
                    return
