"""Errors by blame: the caller's, a dependency's, ours. Each carries what the caller is told.

Invariant: an exception that is not a `HeadraceError` is our bug, answered 500 and logged with
its traceback; `assert` states only what a bug of ours would break.
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of everything raised on purpose.

    `status` is the HTTP status; `type`, `code`, `param` fill OpenAI's error object;
    `retry_after_ms` becomes the `retry-after-ms` header.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error shape: all four fields, always."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class CallerError(HeadraceError):
    """The request is wrong; sending it again unchanged will fail again."""

    status = 400
    type = "invalid_request_error"


class AuthError(CallerError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(CallerError):
    status = 404
    code = "not_found"


class OverloadError(HeadraceError):
    """The request is fine, there is no room: try again after `retry_after_ms`."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class DependencyError(HeadraceError):
    """Something Headrace needs (a worker, Redis) is away."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class JobFailedError(HeadraceError):
    """A job that ended in an error on the worker's side."""

    status = 500
    code = "generation_failed"


class WireError(HeadraceError):
    """Bytes that are not what the wire format says; the entry is dropped, never the process."""

    code = "bad_wire_format"


class ModelError(HeadraceError):
    """A model that cannot be loaded: names what is wrong and what would work."""

    code = "model_unusable"


class SettingsError(HeadraceError):
    """A setting with a bad value; names the variable. Stops start-up."""

    code = "bad_setting"
