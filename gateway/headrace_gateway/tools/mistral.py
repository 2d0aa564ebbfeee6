"""Calls as Mistral models write them, in the older and in the newer way.

Older: `[TOOL_CALLS] [{"name": …, "arguments": …}, …]`. Newer: `[TOOL_CALLS]name[ARGS]{…}` for each
call; `[CALL_ID]…` may stand before `[ARGS]`, and `[ARGS]` may be missing.
"""

from __future__ import annotations

import re

from headrace_gateway.tools.call_object import CallObject
from headrace_gateway.tools.call_parser import SPACES_MAX, CallParser, State
from headrace_gateway.tools.json_scan import JsonScanner, skip_spaces

MARKER = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
HEADER_CHARS_MAX = 256
"""What may stand between a marker and the brace of the arguments."""

_HEADER = re.compile(
    r"\s*([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\][A-Za-z0-9_-]{1,64})?(?:\[ARGS\])?\s*"
)


class _BareArguments:
    """Arguments of a call whose name stands before them."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.tail = ""
        self._fresh = ""
        self._scanner = JsonScanner()

    @property
    def certain(self) -> bool:
        return True

    @property
    def arguments_done(self) -> bool:
        return self._scanner.done

    @property
    def done(self) -> bool:
        return self._scanner.done

    @property
    def broken(self) -> bool:
        return self._scanner.broken

    def take_arguments(self) -> str:
        fresh, self._fresh = self._fresh, ""
        return fresh

    def scan(self, text: str, at: int, end: int) -> int:
        start, at = at, self._scanner.scan(text, at, end)
        self._fresh += text[start:at]
        return at


class MistralParser(CallParser):
    """`names`: the offered functions."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names, MARKER)
        self._listed = False

    def _opened(self) -> bool:
        assert self._head is not None, "a marker is not yet a call"
        end = min(len(self._buffer), self._head + HEADER_CHARS_MAX)
        at = skip_spaces(self._buffer, self._head, end)
        if at < end and self._buffer[at] == "[":
            self._listed = True
            self._at = at + 1
            return self._expect(CallObject(self._names))
        brace = self._buffer.find("{", at, end)
        if brace < 0:
            return end == self._head + HEADER_CHARS_MAX and self._refuse()
        header = _HEADER.fullmatch(self._buffer, self._head, brace)
        if header is None or header[1] not in self._names:
            return self._refuse()
        self._listed = False
        self._at = brace
        return self._expect(_BareArguments(header[1]))

    def _object_done(self) -> State:
        return self._between if self._listed else self._text

    def _between(self) -> bool:
        at = skip_spaces(self._buffer, 0, len(self._buffer))
        if at <= SPACES_MAX and at == len(self._buffer):
            return False
        following = self._buffer[at] if at <= SPACES_MAX else ""
        if following == ",":
            self._head = self._at = at + 1
            return self._expect(CallObject(self._names))
        if following == "]":
            self._buffer = self._buffer[at + 1 :]
        self._state = self._text
        return True
