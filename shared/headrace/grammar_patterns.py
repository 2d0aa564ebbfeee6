"""Regular expressions inside JSON schemas, written so that every validator reads them the same.

JSON Schema means ECMA-262; Python's validators read Python's dialect; the grammar compiler reads
Rust's `regex` crate. Invariant: what the rewritten pattern matches, ECMA-262 and Python match too.
Where they differ (`\\w` and `\\s` beyond ASCII, what `.` leaves out) the narrower reading is taken;
what only one of them knows is refused by name.

Rewriting a rewritten pattern changes nothing.

Rejected: handing the pattern over as it is, where `[a&&b]`, `\\W` or `\\A` quietly mean something
else than in the caller's validator.
"""

from __future__ import annotations

from headrace.errors import CallerError

_NARROW = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\t\n\x0b\f\r ",
    "D": r"\P{N}",
    "W": r"\p{Pd}\p{Ps}\p{Pe}\p{Pi}\p{Pf}\p{Po}\p{Sm}\p{Sc}\p{Sk}\p{Z}\p{Cc}",
    "S": r"\p{L}\p{M}\p{N}\p{P}\p{S}\u{200d}",
}
"""What an escape surely stands for, as part of a character class."""
_WIDE = {
    "d": r"\p{N}",
    "w": r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\u{200c}\u{200d}",
    "s": r"\t-\r\x1c-\x20\u{85}\u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}"
    r"\u{3000}\u{feff}",
    "D": r"\x00-\x2f\x3a-\u{10ffff}",
    "W": r"\x00-\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\u{10ffff}",
    "S": r"\x00-\x08\x0e-\x1f\x21-\u{10ffff}",
}
"""What it may stand for: left out where a class is negated."""
_KEPT_ESCAPES = frozenset("nrtfvxupP")
_DOT = r"[^\n\r\u{2028}\u{2029}]"
_GROUPS = ("(?:", "(?<", "(?P<")
_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")


def portable_pattern(pattern: str) -> str:
    """`pattern` in Rust's syntax; it is searched for in a text, as before, not anchored.

    Raises CallerError `invalid_grammar` for what is not portable or cannot be compiled.
    """
    return _Rewriter(pattern).rewritten()


class _Rewriter:
    """One pass from left to right; `_at` is the next character."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._out: list[str] = []

    def rewritten(self) -> str:
        quantified = False
        while self._at < len(self._pattern):
            character = self._pattern[self._at]
            if character == "+" and quantified:
                raise self._refusal("possessive quantifiers are")
            quantified = character in "*+?}"
            if character == "\\":
                self._escape(_NARROW, "[", "]")
            elif character == "[":
                self._character_class()
            elif character == "(":
                self._group()
            elif self._pattern.startswith("{,", self._at):
                raise self._refusal("quantifiers without a lower bound are")
            else:
                self._take(_DOT if character == "." else character)
        return "".join(self._out)

    def _take(self, written: str, characters: int = 1) -> None:
        self._out.append(written)
        self._at += characters

    def _refusal(self, what: str) -> CallerError:
        return CallerError(
            f"pattern {self._pattern[:200]!r}: {what} not supported (character {self._at + 1})",
            code="invalid_grammar",
        )

    def _group(self) -> None:
        rest = self._pattern[self._at : self._at + 4]
        if rest.startswith(_LOOKS):
            raise self._refusal("look-ahead and look-behind are")
        if rest.startswith("(?") and not rest.startswith(_GROUPS):
            raise self._refusal(f"groups that begin with {rest[:3]!r} are")
        # the question mark belongs to the group, it does not quantify
        self._take(*(("(?", 2) if rest.startswith("(?") else ("(", 1)))

    def _escape(self, classes: dict[str, str], opening: str = "", closing: str = "") -> None:
        named = self._pattern[self._at + 1 : self._at + 2]
        if not named:
            raise self._refusal("a backslash at the end is")
        if named in classes:
            self._take(f"{opening}{classes[named]}{closing}", 2)
        elif named == "0":
            self._take(r"\x00", 2)
        elif named in "123456789k":
            raise self._refusal("backreferences are")
        elif named in "bB":
            raise self._refusal("word boundaries are")
        elif named.isascii() and named.isalpha() and named not in _KEPT_ESCAPES:
            raise self._refusal(f"the escape \\{named} is")
        elif named in "<>":
            self._take(named, 2)
        else:
            self._take(f"\\{named}", 2)

    def _character_class(self) -> None:
        negated = self._pattern.startswith("[^", self._at)
        self._take("[^" if negated else "[", 2 if negated else 1)
        if self._pattern.startswith("]", self._at):
            raise self._refusal("empty character classes are")
        while not self._pattern.startswith("]", self._at):
            character = self._pattern[self._at : self._at + 1]
            if not character:
                raise self._refusal("a character class without an end is")
            if self._pattern.startswith("--", self._at):
                raise self._refusal("'--' in a character class is")
            if self._pattern.startswith("\\b", self._at):
                self._take(r"\x08", 2)
            elif character == "\\":
                self._escape(_WIDE if negated else _NARROW)
            else:
                # these make sets of sets in Rust, and stand for themselves elsewhere
                self._take(f"\\{character}" if character in "[&~" else character)
        self._take("]")


_FULL_DATE = (
    r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29"
)
_FULL_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%\&'*+/=?^_`{|}\~-]+"

FORMAT_PATTERNS = {
    "date": f"^(?:{_FULL_DATE})$",
    "time": f"^{_FULL_TIME}$",
    "date-time": f"^(?:{_FULL_DATE})T{_FULL_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,3}}$",
    "email": rf"^{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL}){{1,2}}$",
}
"""Formats that the compiler takes too widely, as patterns: days that exist in years 1 to 9999 and
no leap seconds (RFC 3339), host names of at most four labels, which keeps them within 255
characters (RFC 1123), mail addresses at a domain (RFC 5321)."""

FORMATS = frozenset({*FORMAT_PATTERNS, "duration", "ipv4", "ipv6", "uuid", "uri"})
"""String formats that are enforced."""
