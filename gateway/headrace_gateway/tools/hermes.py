"""Calls as Hermes and Qwen models write them, each between `<tool_call>` and `</tool_call>`.

What stands between them is `{"name": …, "arguments": {…}}`. A forgotten closing tag is forgiven;
whatever stands in its place is read as text.
"""

from __future__ import annotations

from headrace_gateway.tools.call_object import CallObject
from headrace_gateway.tools.call_parser import SPACES_MAX, CallParser, State
from headrace_gateway.tools.json_scan import skip_spaces

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesParser(CallParser):
    """`names`: the offered functions."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names, OPEN)

    def _opened(self) -> bool:
        return self._expect(CallObject(self._names))

    def _object_done(self) -> State:
        return self._closing

    def _closing(self) -> bool:
        at = skip_spaces(self._buffer, 0, len(self._buffer))
        rest = self._buffer[at : at + len(CLOSE)]
        if at <= SPACES_MAX and rest != CLOSE and CLOSE.startswith(rest):
            return False
        if at <= SPACES_MAX and rest == CLOSE:
            self._buffer = self._buffer[at + len(CLOSE) :]
        self._state = self._text
        return True
