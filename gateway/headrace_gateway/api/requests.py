"""An aiohttp request → a Call and a JSON body, within limits of size and time."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from headrace import telemetry
from headrace_gateway.api.bodies import parse_object
from headrace_gateway.api.context import GATEWAY, REPLY_HEADERS, TENANT, Call
from headrace_gateway.api.deadlines import DEADLINE_HEADER
from headrace_gateway.api.errors import http_error
from headrace_gateway.api.sessions import SESSION_HEADER

_TRACE_HEADERS = ("traceparent", "tracestate")


def make_call(request: web.Request, operation: str, protocol: str = "http") -> Call:
    """The Call that `request` is; on a WebSocket one is made for each turn."""
    return Call(
        tenant=request[TENANT],
        operation=operation,
        attributes=_attributes(request, protocol) if telemetry.enabled() else {},
        trace={name: request.headers[name] for name in _TRACE_HEADERS if name in request.headers},
        arrived_ms=request.app[GATEWAY].clock.now_ms(),
        reply_headers=request[REPLY_HEADERS] if protocol == "http" else {},
        deadline=request.headers.get(DEADLINE_HEADER, ""),
        session=request.headers.get(SESSION_HEADER, ""),
    )


def _attributes(request: web.Request, protocol: str) -> dict[str, str]:
    """What a turn's span says of its request."""
    return {
        "http.request.method": request.method,
        "http.route": request.path,
        "url.path": request.path,
        "url.scheme": request.scheme,
        "network.protocol.name": protocol,
    }


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises CallerError: 400 for what is no JSON object, 408 when it does not arrive, 413 when it is
    too large, 415 when it is said to be something else.
    """
    settings = request.app[GATEWAY].settings
    _check_content_type(request)
    if (request.content_length or 0) > settings.body_bytes_max:
        raise http_error(413, f"the body exceeds {settings.body_bytes_max} bytes")
    try:
        if request.content.is_eof():  # it came with its head, as most do: nothing to wait for
            body = request.content.read_nowait(-1)
            if len(body) > settings.body_bytes_max:  # in chunks, whose sum no header told
                raise http_error(413, f"the body exceeds {settings.body_bytes_max} bytes")
        else:
            async with asyncio.timeout(settings.body_read_ms / 1000):
                body = await request.read()
    except TimeoutError as error:
        raise http_error(
            408, f"the body did not arrive within {settings.body_read_ms} ms"
        ) from error
    except web.RequestPayloadError as error:
        raise http_error(400, f"the body cannot be read: {error}") from error
    return parse_object(body)


def _check_content_type(request: web.Request) -> None:
    # A web page may send text/plain to any host without asking it first, JSON it may not: a
    # gateway without keys on somebody's machine must not answer the pages they visit.
    kind = request.content_type
    if "Content-Type" in request.headers and kind != "application/json" and "+json" not in kind:
        raise http_error(415, f"send Content-Type: application/json, not {kind[:100]!r}")
