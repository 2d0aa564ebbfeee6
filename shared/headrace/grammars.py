"""Structured output: what a text must match, and which tokens may come next (llguidance).

Invariants:
- a grammar travels as text (`Sampling.grammar`), in llguidance's serialized form, with all options
  written into it: gateways and workers compile the same thing;
- masks and forced tokens are a function of the tokens so far: sampling one by one, accepting a
  forced run, checking a draft and resuming after a crash all agree;
- compiling and each mask are bounded by fuel, which counts work and not time.

JSON is written as Python's `json.dumps` writes it: one space after `:` and `,`, no other
whitespace. Where whitespace is free, small models write nothing else, and every optional space is
a place where nothing is forced. Over five answers of SmolLM2-135M this form has the logarithm of
probability -107, without spaces -123, indented -102 with a third more tokens.

Rejected: masks as NumPy arrays (gateways compile too, and have no NumPy), and llguidance's guess of
what a text is (a bare Lark grammar and JSON are told apart by their first character).
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from headrace.errors import CallerError
from headrace.grammar_matcher import Matcher, Vocabulary, clear_message
from headrace.grammar_schemas import checked_schema, invalid, too_complex
from headrace.types import ModelRecord

__all__ = [
    "GRAMMAR_BYTES_MAX",
    "Grammars",
    "Matcher",
    "choice",
    "json_in_lark",
    "json_object",
    "json_schema",
    "lark",
    "regex",
]

GRAMMAR_BYTES_MAX = 256 * 1024
"""Longest grammar, as given and as serialized: it travels inside every job that uses it."""
COMPILED_MAX = 64
"""Compiled grammars kept per model; the least recently used one goes."""
ERROR_CHARS_MAX = 1_000

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_items_in_row=2_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""llguidance's own, but half its fuel and a fifth of its items for a mask. A mask then takes 30 ms
at the worst (60 ms once, while its lexer grows), where usual ones take 0.01 to 0.2 ms; JSON written
out character by character, as a grammar, needs a third of these items."""

_JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    # each character has one spelling, so that no key can come twice under two
    "json_allowed_escapes": 'nrbtf\\"',
}
_TOO_COMPLEX = (
    "fuel", "too large", "too big", "too complex", "toocomplex", "limit", "exceed", "too many",
    "too deeply", "unable to determine",
)  # fmt: skip
_ONE_OF = "oneOf constraints are not supported"
_CLEARER_ONE_OF = (
    "oneOf is supported where at most one of its schemas can match: they differ in type, or in the "
    "constant of a required key; else write anyOf"
)
_LARK_PIECES = re.compile(r'"(?:\\.|[^"\\\n])*+"?|//[^\n]*|/(?:\\.|[^/\\\n])*+/?|%json\b\s*')
"""What `%json` is looked for between. A text or expression that its line does not end is a piece
too, which compiling refuses: looking for its end again from each quote in it would take minutes."""


def json_schema(schema: Mapping[str, Any] | bool) -> str:
    """Texts that are JSON and valid under `schema`; `headrace.grammar_schemas` says which.

    Raises CallerError naming the place and the keyword that is wrong or not supported.
    """
    return _serialized({"json_schema": _styled(schema)})


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> str:
    """Texts that `pattern` matches from their first to their last character.

    The syntax is that of Rust's `regex` crate, without word boundaries and without anchors in the
    middle; look-around and backreferences are no part of it. Compiling refuses them, and says so.
    """
    _check_size(pattern)
    if not pattern:
        raise invalid("a regular expression needs at least one character")
    written: list[str] = []
    escaped = False
    for character in pattern:
        written.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    if escaped:
        raise invalid("a regular expression cannot end with a backslash")
    return _serialized({"lark_grammar": f"start: /{''.join(written)}/"})


def choice(texts: Iterable[str]) -> str:
    """One of `texts`, character by character: nothing in them has a special meaning."""
    options = list(texts)
    if not options:
        raise invalid("a choice needs at least one text")
    if not all(isinstance(text, str) and text for text in options):
        raise invalid("the texts of a choice are strings that are not empty")
    if len(set(options)) < len(options):
        raise invalid("the texts of a choice differ from each other")
    _check_size("".join(options))
    # one expression, because each alternative of a rule would count as an item of the parser's
    return regex("|".join(map(_literally, options)))


def lark(text: str) -> str:
    """Texts that the rule `start` of a Lark grammar derives, in llguidance's dialect of Lark.

    JSON schemas in it (`%json {...}`) are held to the same checks as those of `json_schema`.
    """
    _check_size(text)
    written: list[str] = []
    at = schemas = 0
    while (piece := _LARK_PIECES.search(text, at)) is not None:
        written.append(text[at : piece.end()])
        at = piece.end()
        if piece[0].startswith("%json"):
            schema, at = _json_value(text, at)
            written.append(_json(_styled(schema)))
            schemas += len(written[-1])
            _check_length(schemas)
    return _serialized({"lark_grammar": "".join(written) + text[at:]})


def json_in_lark(schema: Mapping[str, Any] | bool) -> str:
    """What stands in a Lark rule for JSON that is valid under `schema`; raises as `json_schema`."""
    return "%json " + _json(_styled(schema))


def _styled(schema: Any) -> dict[str, Any]:
    return {**checked_schema(schema), "x-guidance": _JSON_STYLE}


def _literally(text: str) -> str:
    return "".join(c if c.isalnum() or not c.isascii() else f"\\x{ord(c):02x}" for c in text)


def _json_value(text: str, at: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise invalid(f"%json needs a JSON schema: {error}") from error


def _check_size(text: str) -> None:
    _check_length(len(text))


def _check_length(characters: int) -> None:
    if characters > GRAMMAR_BYTES_MAX:
        raise too_complex(
            f"the grammar has {characters} characters; at most {GRAMMAR_BYTES_MAX} are allowed"
        )


def _serialized(grammar: dict[str, Any]) -> str:
    text = _json({"grammars": [grammar]})
    _check_size(text)
    return text


def _json(value: dict[str, Any]) -> str:
    """In ASCII. Raises CallerError for text with half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise invalid("the grammar is not Unicode text: it has half of a character") from error
    return json.dumps(value, separators=(",", ":"))


class Grammars:
    """Compiles grammars for one model. Any thread may call it.

    Reading the vocabulary takes half a second and 40 MB for 50,000 tokens. Raises
    CallerError `grammar_unsupported` when it cannot be read.
    """

    def __init__(self, record: ModelRecord) -> None:
        self._vocabulary = Vocabulary(record)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> Matcher:
        """A Matcher at the start of `grammar`, which is what the functions above return.

        Raises CallerError: `invalid_grammar` (the text is wrong, or nothing matches it) or
        `grammar_too_complex` (the fuel did not suffice).
        """
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > COMPILED_MAX:
                    self._compiled.popitem(last=False)
        return Matcher(found, self._vocabulary, lambda: self._forget(grammar))

    def _compile(self, grammar: str) -> LLMatcher:
        # anything else would be taken for a Lark grammar
        if not grammar.startswith('{"grammars":'):
            raise invalid("not a serialized grammar")
        compiled = LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS)
        probe = compiled.deep_copy()
        if not compiled.is_error():
            # that nothing matches a grammar shows only here
            probe.compute_bitmask()
        if probe.is_error():
            raise _refusal(probe.get_error())
        return compiled

    def _forget(self, grammar: str) -> None:
        """Copies share a lexer that grows with use: one at its limit is of no use to the next."""
        with self._lock:
            self._compiled.pop(grammar, None)


def _refusal(message: str) -> CallerError:
    if _ONE_OF in message:
        return invalid(_CLEARER_ONE_OF)
    shown = clear_message(message)[:ERROR_CHARS_MAX]
    if any(sign in shown.lower() for sign in _TOO_COMPLEX):
        return too_complex(shown)
    return invalid(shown)
