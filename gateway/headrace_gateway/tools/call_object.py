"""One call written as a JSON object, `{"name": "f", "arguments": {…}}`, read as it comes.

Invariant: `name` is only ever one of the offered functions, and the pieces that `take_arguments`
hands out, joined, are the arguments' text as the model wrote it. The keys may stand in any order;
`parameters` means `arguments`; other keys are read over; a call without arguments has `{}`.
Arguments that are no JSON object, a second name or second arguments break it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from headrace_gateway.tools.json_scan import JsonScanner, skip_spaces

TAIL_CHARS_MAX = 1_024
"""What may follow the arguments inside the object (an id, a type), as the model's text."""
NO_ARGUMENTS = "{}"

_ARGUMENTS = frozenset({"arguments", "parameters"})


class CallObject:
    """Feed it with `scan`; `done` after the closing brace, `broken` where it cannot go on.

    `tail` is what came after complete arguments: part of the object, unless that breaks.
    `first_keys`, where given, are the keys that may stand first.
    """

    def __init__(self, names: frozenset[str], first_keys: frozenset[str] = frozenset()) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self.arguments_done = False
        self.tail = ""
        self.done = False
        self.broken = False
        self._names = names
        self._keys = first_keys
        self._fresh = ""
        self._key = ""
        self._piece = ""
        self._scanner = JsonScanner()
        self._state: Callable[[str, int, int], int] = self._opening

    @property
    def certain(self) -> bool:
        """It is a call whatever follows: an offered function's name, and arguments that began."""
        return self.name is not None and self.has_arguments

    def take_arguments(self) -> str:
        """The arguments' text that came since the last time."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    def scan(self, text: str, at: int, end: int) -> int:
        """Read text[at:end]; returns the position after the last character that belongs to it."""
        while at < end and not self.done and not self.broken:
            limit = end
            if self.arguments_done:
                limit = min(end, at + TAIL_CHARS_MAX - len(self.tail))
                if limit == at:
                    return self._fail(at)
            in_tail = self.arguments_done
            start, at = at, self._state(text, at, limit)
            if in_tail:
                self.tail += text[start:at]
        return at

    def _opening(self, text: str, at: int, end: int) -> int:
        at = skip_spaces(text, at, end)
        if at == end:
            return at
        if text[at] != "{":
            return self._fail(at)
        self._state = self._before_key
        return at + 1

    def _before_key(self, text: str, at: int, end: int) -> int:
        at = skip_spaces(text, at, end)
        if at == end:
            return at
        if text[at] != '"':  # also `}`: an empty object names no function
            return self._fail(at)
        self._start_value(self._in_key)
        return at

    def _start_value(self, state: Callable[[str, int, int], int]) -> None:
        self._scanner = JsonScanner()
        self._piece = ""
        self._state = state

    def _in_key(self, text: str, at: int, end: int) -> int:
        at = self._scan_piece(text, at, end)
        if self._scanner.done:
            self._key = str(json.loads(self._piece))
            if self._keys and self._key not in self._keys:
                return self._fail(at)
            self._keys = frozenset()
            self._state = self._colon
        return at

    def _scan_piece(self, text: str, at: int, end: int) -> int:
        start, at = at, self._scanner.scan(text, at, end)
        self._piece += text[start:at]
        self.broken = self._scanner.broken
        return at

    def _colon(self, text: str, at: int, end: int) -> int:
        at = skip_spaces(text, at, end)
        if at == end:
            return at
        if text[at] != ":":
            return self._fail(at)
        self._state = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int, end: int) -> int:
        at = skip_spaces(text, at, end)
        if at == end:
            return at
        if self._key == "name":
            if self.name is not None or text[at] != '"':
                return self._fail(at)
            self._start_value(self._in_name)
        elif self._key in _ARGUMENTS:
            if self.has_arguments or text[at] != "{":
                return self._fail(at)
            self._start_value(self._in_arguments)
        else:
            self._start_value(self._in_other)
        return at

    def _in_name(self, text: str, at: int, end: int) -> int:
        at = self._scan_piece(text, at, end)
        if self._scanner.done:
            name = str(json.loads(self._piece))
            if name not in self._names:
                return self._fail(at)
            self.name = name
            self._state = self._after_value
        return at

    def _in_arguments(self, text: str, at: int, end: int) -> int:
        start, at = at, self._scanner.scan(text, at, end)
        self.broken = self._scanner.broken
        self.has_arguments = self.has_arguments or at > start
        self._fresh += text[start:at]
        if self._scanner.done:
            self.arguments_done = True
            self._state = self._after_value
        return at

    def _in_other(self, text: str, at: int, end: int) -> int:
        at = self._scanner.scan(text, at, end)
        self.broken = self._scanner.broken
        if self._scanner.done:
            self._state = self._after_value
        return at

    def _after_value(self, text: str, at: int, end: int) -> int:
        at = skip_spaces(text, at, end)
        if at == end:
            return at
        if text[at] == ",":
            self._state = self._before_key
            return at + 1
        if text[at] != "}" or self.name is None:
            return self._fail(at)
        if not self.has_arguments:
            self.has_arguments = self.arguments_done = True
            self._fresh = NO_ARGUMENTS
        self.done = True
        return at + 1

    def _fail(self, at: int) -> int:
        self.broken = True
        return at
