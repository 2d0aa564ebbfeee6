"""Every failure → OpenAI's error object, by one middleware around all routes; keys are its as well.

Invariant: no answer with a status of 400 or more leaves without `{"error": {message, type, param,
code}}`, and an exception that nobody raised on purpose is answered 500 and logged with its
traceback, never shown to the client.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from headrace.errors import CallerError, HeadraceError, OverloadError
from headrace_gateway.api.context import GATEWAY, REPLY_HEADERS, TENANT
from headrace_gateway.api.turn import STATUS_CLIENT_GONE, ClientGoneError

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CODES = {
    400: "bad_request",
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    426: "upgrade_required",
}


class StreamGoneError(ClientGoneError):
    """The client left after headers were sent; `response` is what was being written."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__("the client went away")
        self.response = response


def unexpected() -> HeadraceError:
    """What a client is told of our bug: nothing but where to look for it."""
    return HeadraceError(
        "an unexpected error of this gateway; its log has the details", code="internal_error"
    )


def as_headrace_error(error: Exception, what: str) -> HeadraceError:
    """`error` itself when it was raised on purpose; else it is logged and hidden."""
    if isinstance(error, HeadraceError):
        return error
    log.error("unexpected error", what=what, exc_info=error)
    return unexpected()


def retry_headers(error: HeadraceError) -> dict[str, str]:
    """`retry-after-ms` and, rounded up, the standard header, where a wait is known.

    An overload that no wait ends is not to be tried again.
    """
    if error.retry_after_ms is None:
        return {"x-should-retry": "false"} if isinstance(error, OverloadError) else {}
    seconds = math.ceil(error.retry_after_ms / 1000)
    return {"retry-after-ms": str(error.retry_after_ms), "retry-after": str(seconds)}


def error_response(error: HeadraceError) -> web.Response:
    return web.json_response(error.body(), status=error.status, headers=retry_headers(error))


def http_error(status: int, message: str, code: str | None = None) -> CallerError:
    return CallerError(message, status=status, code=code or _CODES.get(status, "bad_request"))


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers every failure, also of a key that is missing or wrong; counts every answer."""
    request[REPLY_HEADERS] = {}
    gateway = request.app[GATEWAY]
    status = STATUS_CLIENT_GONE
    try:
        response = await _answer(request, handler)
        status = response.status
    except StreamGoneError as gone:
        response = gone.response
    finally:
        gateway.metrics.requests.labels(_route(request), str(status)).inc()
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        if request.path.startswith("/v1/"):
            _identify(request)
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _answer_http(request, error)
    except (ClientGoneError, ConnectionError):
        raise
    except Exception as error:
        known = as_headrace_error(error, f"{request.method} {request.path}")
        if isinstance(error, HeadraceError) and error.status >= 500:
            log.warning("refused", path=request.path, code=error.code, reason=error.message)
        return error_response(known)


def _answer_http(request: web.Request, error: web.HTTPException) -> web.Response:
    messages = {
        404: f"there is nothing at {request.method} {request.path[:200]!r}",
        405: f"{request.method} is not allowed at {request.path[:200]!r}",
        413: f"the body exceeds {request.app[GATEWAY].settings.body_bytes_max} bytes",
    }
    response = error_response(http_error(error.status, messages.get(error.status, error.reason)))
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


async def add_reply_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The `on_response_prepare` signal: also streams and upgrades carry the request's headers."""
    response.headers.update(request.get(REPLY_HEADERS, {}))
    given = request.headers.get(REQUEST_ID, "")
    known = given and _REQUEST_ID.fullmatch(given)
    response.headers[REQUEST_ID] = given if known else f"req_{os.urandom(16).hex()}"


def _identify(request: web.Request) -> None:
    """Whatever lies under /v1/ needs a key, where keys are set; its limits are told every time."""
    gateway = request.app[GATEWAY]
    tenant = gateway.tenants.identify(request.headers.get("Authorization"))
    request[TENANT] = tenant
    if tenant.limits is not None:
        request[REPLY_HEADERS].update(gateway.fleet.limiter.headers(tenant.limits))
