"""Bytes from a client → a JSON object, strictly and bounded.

Invariant: what comes out holds no NaN or infinity, no duplicate keys, no lone surrogates, and is at
most `DEPTH_MAX` deep; everything else is a CallerError that says why. Rejected: taking the last of
duplicate keys, as Python does, where another parser in the path may take the first.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from headrace.errors import CallerError

DEPTH_MAX = 64
CODE = "invalid_json"


def _refuse(message: str) -> NoReturn:
    raise CallerError(f"the body is not acceptable JSON: {message}", code=CODE)


def _refuse_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse(f"the number {text[:40]} is out of range")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _refuse(f"the key {key[:80]!a} stands twice in one object")
            seen.add(key)
    return made


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
)


def parse_object(body: bytes | str) -> dict[str, Any]:
    """The JSON object in `body`. Raises CallerError (400, code invalid_json)."""
    if isinstance(body, bytes):
        try:
            body = body.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(f"byte {error.start} is not UTF-8")
    try:
        value = _decoder.decode(body)
    except RecursionError:
        _refuse(f"it is nested deeper than {DEPTH_MAX} levels")
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        _refuse(str(error)[:200])
    if not isinstance(value, dict):
        _refuse(f"expected an object, got {_kind(value)}")
    _check_depth(value, body)
    _check_surrogates(value, body)
    return value


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(
        type(value), "a number"
    )


def _check_depth(value: dict[str, Any], text: str) -> None:
    # most bodies have fewer brackets than allowed levels: nothing to walk
    if text.count("[") + text.count("{") <= DEPTH_MAX:
        return
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    _refuse(f"it is nested deeper than {DEPTH_MAX} levels")


def _check_surrogates(value: dict[str, Any], text: str) -> None:
    if "\\u" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        _refuse("a string holds half of a surrogate pair")
