"""One JSON value, read as it comes: where it ends, or where it stops being JSON.

Invariant: how far `scan` reads and what it finds depend on the characters alone, not on how they
are cut. Nothing of the value is kept but its open brackets, at most DEPTH_MAX. Rejected: trying
`json.loads` on ever longer prefixes, which is quadratic and cannot tell broken from unfinished.
"""

from __future__ import annotations

import re
from collections.abc import Callable

DEPTH_MAX = 64
WHITESPACE = " \t\n\r"

_SPACES = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPED = frozenset('"\\/bfnrt')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}

# the automaton of a number: state → kind of character → next state (RFC 8259, section 6)
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", "digit": "integer"},
    "zero": {".": "point", "e": "exponent"},
    "integer": {"0": "integer", "digit": "integer", ".": "point", "e": "exponent"},
    "point": {"0": "fraction", "digit": "fraction"},
    "fraction": {"0": "fraction", "digit": "fraction", "e": "exponent"},
    "exponent": {"sign": "signed", "0": "power", "digit": "power"},
    "signed": {"0": "power", "digit": "power"},
    "power": {"0": "power", "digit": "power"},
}
_WHOLE_NUMBERS = frozenset({"zero", "integer", "fraction", "power"})
_KINDS = {"0": "0", ".": ".", "e": "e", "E": "e", "+": "sign", "-": "sign"} | dict.fromkeys(
    "123456789", "digit"
)

_State = Callable[[str, int], int]


def skip_spaces(text: str, at: int, end: int) -> int:
    """The position of the first character of text[at:end] that is no JSON whitespace, or `end`."""
    match = _SPACES.match(text, at, end)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


class JsonScanner:
    """Reads one value; afterwards `done`, or `broken` at a character that cannot stand there."""

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []
        self._key = False
        self._left = ""
        self._number = ""
        self._end = 0
        self._state: _State = self._value

    def scan(self, text: str, at: int, end: int) -> int:
        """Read text[at:end]; returns the position after the last character that belongs to it.

        A number's end is only known from the character after it, which is not read.
        """
        self._end = end
        while at < end and not self.done and not self.broken:
            at = self._state(text, at)
        return at

    def _value(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at == self._end:
            return at
        char = text[at]
        if char in "{[":
            return self._enter(char, at)
        if char == '"':
            self._key = False
            self._state = self._string
        elif char in _LITERALS:
            self._left = _LITERALS[char]
            self._state = self._literal
        elif char == "-" or char in "0123456789":
            self._number = "minus" if char == "-" else _NUMBER["minus"][_KINDS[char]]
            self._state = self._digits
        else:
            return self._fail(at)
        return at + 1

    def _enter(self, bracket: str, at: int) -> int:
        if len(self._open) == DEPTH_MAX:
            return self._fail(at)
        self._open.append(bracket)
        self._state = self._first_key if bracket == "{" else self._first_item
        return at + 1

    def _first_key(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at < self._end and text[at] == "}":
            return self._leave(at)
        return self._next_key(text, at)

    def _next_key(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at == self._end:
            return at
        if text[at] != '"':
            return self._fail(at)
        self._key = True
        self._state = self._string
        return at + 1

    def _first_item(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at < self._end and text[at] == "]":
            return self._leave(at)
        return self._value(text, at)

    def _string(self, text: str, at: int) -> int:
        match = _PLAIN.match(text, at, self._end)
        assert match is not None, "the pattern matches the empty string"
        at = match.end()
        if at == self._end:
            return at
        if text[at] == '"':
            if self._key:
                self._state = self._colon
            else:
                self._close()
        elif text[at] == "\\":
            self._state = self._escape
        else:
            return self._fail(at)
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        if text[at] == "u":
            self._left = "hhhh"
            self._state = self._hex
        elif text[at] in _ESCAPED:
            self._state = self._string
        else:
            return self._fail(at)
        return at + 1

    def _hex(self, text: str, at: int) -> int:
        if text[at] not in _HEX:
            return self._fail(at)
        self._left = self._left[1:]
        if not self._left:
            self._state = self._string
        return at + 1

    def _colon(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at == self._end:
            return at
        if text[at] != ":":
            return self._fail(at)
        self._state = self._value
        return at + 1

    def _literal(self, text: str, at: int) -> int:
        if text[at] != self._left[0]:
            return self._fail(at)
        self._left = self._left[1:]
        if not self._left:
            self._close()
        return at + 1

    def _digits(self, text: str, at: int) -> int:
        following = _NUMBER[self._number].get(_KINDS.get(text[at], ""))
        if following is not None:
            self._number = following
            return at + 1
        if self._number not in _WHOLE_NUMBERS:
            return self._fail(at)
        self._close()
        return at

    def _after(self, text: str, at: int) -> int:
        at = skip_spaces(text, at, self._end)
        if at == self._end:
            return at
        in_object = self._open[-1] == "{"
        if text[at] == ",":
            self._state = self._next_key if in_object else self._value
            return at + 1
        if text[at] == ("}" if in_object else "]"):
            return self._leave(at)
        return self._fail(at)

    def _leave(self, at: int) -> int:
        self._open.pop()
        self._close()
        return at + 1

    def _close(self) -> None:
        """A value is complete: the whole one, or one inside of it."""
        self.done = not self._open
        self._state = self._after

    def _fail(self, at: int) -> int:
        self.broken = True
        return at
