"""Calls as Llama 3 models write them: the message is `{"name": …, "parameters": …}`.

Several are separated by `;` or white space; `<|python_tag|>` may stand before them. Without it only
an object at the very beginning of the message is a call, and only one whose first key says so: an
answer that is JSON itself is text, and is not held back.
"""

from __future__ import annotations

import re

from headrace_gateway.tools.call_object import CallObject
from headrace_gateway.tools.call_parser import SPACES_MAX, CallParser, State
from headrace_gateway.tools.json_scan import skip_spaces

MARKER = "<|python_tag|>"

_FIRST_KEYS = frozenset({"name", "type"})
_SEPARATOR = re.compile(r"[ \t\n\r;]*")


class LlamaParser(CallParser):
    """`names`: the offered functions."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names, MARKER)
        self._state = self._start

    def _start(self) -> bool:
        return self._maybe_object(skip_spaces(self._buffer, 0, len(self._buffer)))

    def _opened(self) -> bool:
        return self._expect(CallObject(self._names))

    def _object_done(self) -> State:
        return self._separator

    def _separator(self) -> bool:
        match = _SEPARATOR.match(self._buffer)
        assert match is not None, "the pattern matches the empty string"
        return self._maybe_object(match.end())

    def _maybe_object(self, at: int) -> bool:
        """A call, if the character at `at`, behind white space or a separator, opens an object."""
        if at <= SPACES_MAX and at == len(self._buffer):
            return False
        if at > SPACES_MAX or self._buffer[at] != "{":
            self._state = self._text
            return True
        self._at = at
        self._head = at + 1
        return self._expect(CallObject(self._names, _FIRST_KEYS))
