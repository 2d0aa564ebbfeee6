"""From a JSON object to a checked request, or to an error that names the field.

Invariant: a CallerError from here names a field of the body in `param` and says what was wrong with
it, never what pydantic calls its parts. Rejected: reporting all problems at once, which OpenAI's
error object has no place for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace.errors import CallerError

STRICT = ConfigDict(extra="allow", strict=True, frozen=True)

R = TypeVar("R", bound=BaseModel)


def bad_value(param: str, reason: str) -> CallerError:
    """The error for a value that is understood and cannot be served."""
    return CallerError(f"{param}: {reason}"[:1_000], param=param, code="invalid_value")


def missing(param: str) -> CallerError:
    """The error for a field that has to be there, because of what the others say."""
    return CallerError(f"{param}: Field required", param=param, code="missing_required_parameter")


def validate(kind: type[R], body: Mapping[str, Any]) -> R:
    """`body`, or a query, as a `kind`. Raises CallerError naming the field in `param`."""
    fields = dict(body)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error, fields) from error


def _field_error(error: ValidationError, body: Mapping[str, Any]) -> CallerError:
    """The problem deepest in the body: with alternatives (string or list) it is what was meant."""
    problems = [
        (_field_path(e["loc"], body, missing=e["type"] == "missing"), e["type"], _reason(e["msg"]))
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    path, kind, _ = max(problems, key=lambda problem: len(problem[0]))
    reasons = dict.fromkeys(message for where, _, message in problems if where == path)
    where = _spell(path)
    return CallerError(
        f"{where or 'body'}: {'; or '.join(reasons)}"[:1_000],
        param=where or None,
        code="missing_required_parameter" if kind == "missing" else "invalid_value",
    )


def _reason(message: str) -> str:
    """Without pydantic's word for what our own checks said."""
    return message.removeprefix("Value error, ")


def _field_path(
    loc: tuple[int | str, ...], body: Mapping[str, Any], *, missing: bool
) -> tuple[int | str, ...]:
    """`loc` without the names of union members, which stand in no body."""
    path: list[int | str] = []
    here: Any = body
    for at, part in enumerate(loc):
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            here = here[part]
            path.append(part)
        elif isinstance(part, str) and isinstance(here, dict):
            if part in here:
                here = here[part]
                path.append(part)
            elif missing and at == len(loc) - 1:
                path.append(part)
    return tuple(path)


def _spell(path: tuple[int | str, ...]) -> str:
    spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return spelled.lstrip(".")[:200]
