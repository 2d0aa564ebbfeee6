"""Structured output: what a text must match, and which tokens may come next (llguidance).

Invariants:
- a grammar travels as text (`Sampling.grammar`), in llguidance's serialized form, with all options
  written into it: gateways and workers compile the same thing;
- the mask of a state, and so its forced tokens, depend on the tokens so far alone: sampling them
  one by one, accepting a forced run, checking a draft and resuming after a crash all agree;
- compiling and each mask are bounded by fuel, which is counted in steps and not in time.

JSON is written as Python's `json.dumps` writes it: one space after `:` and `,`, no other
whitespace. Free whitespace is where small models get lost, every optional space is a place where
nothing is forced, and a text with these spaces is more probable to models than one without.

Rejected: masks as NumPy arrays (gateways compile too, and have no NumPy), and letting llguidance
take whatever text it is given (a bare Lark text and JSON are told apart by guessing).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from headrace.errors import CallerError
from headrace.grammar_schemas import checked_schema, invalid
from headrace.types import ModelRecord

GRAMMAR_BYTES_MAX = 256 * 1024
"""Longest serialized grammar: it travels inside every job that uses it."""
COMPILED_MAX = 64
"""Compiled grammars kept per model; the least recently used one goes."""
ERROR_CHARS_MAX = 1_000

_JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    # each character has one spelling, so that no key can come twice under two
    "json_allowed_escapes": 'nrbtf\\"',
}
_TOO_COMPLEX = ("fuel", "too large", "too complex", "toocomplex", "limit", "exceed", "too many")


def json_schema(schema: Mapping[str, Any] | bool) -> str:
    """Texts that are JSON and valid under `schema`; `headrace.grammar_schemas` says which.

    Raises CallerError naming the place and the keyword that is wrong or not supported.
    """
    return _serialized({"json_schema": {**checked_schema(schema), "x-guidance": _JSON_STYLE}})


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> str:
    """Texts that `pattern` matches from their first to their last character.

    The syntax is that of Rust's `regex` crate, without word boundaries and without anchors in the
    middle; look-around and backreferences are no part of it. Compiling refuses them, and says so.
    """
    if not pattern:
        raise invalid("a regular expression needs at least one character")
    return _serialized({"lark_grammar": f"start: /{_between_slashes(pattern)}/"})


def _between_slashes(pattern: str) -> str:
    written: list[str] = []
    escaped = False
    for character in pattern:
        written.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    if escaped:
        raise invalid("a regular expression cannot end with a backslash")
    return "".join(written)


def choice(texts: Iterable[str]) -> str:
    """One of `texts`, character by character: nothing in them has a special meaning."""
    options = list(texts)
    if not options:
        raise invalid("a choice needs at least one text")
    if not all(isinstance(text, str) and text for text in options):
        raise invalid("the texts of a choice are strings that are not empty")
    if len(set(options)) < len(options):
        raise invalid("the texts of a choice differ from each other")
    return _serialized({"lark_grammar": "start: " + " | ".join(map(json.dumps, options))})


def lark(text: str) -> str:
    """Texts that the rule `start` of a Lark grammar derives, in llguidance's dialect of Lark."""
    return _serialized({"lark_grammar": text})


def json_in_lark(schema: Mapping[str, Any] | bool) -> str:
    """What stands for JSON under `schema` within a Lark rule; the same checks as `json_schema`."""
    return "%json " + _json({**checked_schema(schema), "x-guidance": _JSON_STYLE})


def _serialized(grammar: dict[str, Any]) -> str:
    text = _json({"grammars": [grammar]})
    if len(text) > GRAMMAR_BYTES_MAX:
        raise CallerError(
            f"the grammar has {len(text)} bytes; at most {GRAMMAR_BYTES_MAX} are allowed",
            code="grammar_too_complex",
        )
    return text


def _json(value: dict[str, Any]) -> str:
    """ASCII. Raises CallerError for characters that are half of a surrogate pair."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except ValueError as error:
        raise invalid(f"the grammar is not Unicode text: {error}") from error
    return json.dumps(value, separators=(",", ":"))


LIMITS = LLParserLimits(verbose_errors=False)
"""llguidance's own: 1,000,000 units of fuel to build the lexer, 200,000 units and 50,000 items for
one mask, 250,000 lexer states."""


class Grammars:
    """Compiles grammars for one model. Any thread may call it."""

    def __init__(self, record: ModelRecord) -> None:
        """Takes a quarter of a second for 50,000 tokens. Raises CallerError `grammar_unsupported`
        when the model's vocabulary cannot be read."""
        self._vocabulary = _Vocabulary(record)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> Matcher:
        """A new Matcher at the start of `grammar`, which is what the functions above return.

        Raises CallerError `invalid_grammar` (the text is wrong, or no text matches it) or
        `grammar_too_complex` (it ran out of fuel).
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
        if not grammar.startswith('{"grammars":'):
            raise invalid("not a serialized grammar")
        compiled = LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS)
        # a grammar that nothing matches shows only here
        compiled.deep_copy().compute_bitmask()
        probe = compiled.deep_copy()
        if not compiled.is_error():
            probe.compute_bitmask()
        if probe.is_error():
            raise _failure(compiled if compiled.is_error() else probe)
        return compiled

    def _forget(self, grammar: str) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)


def _failure(matcher: LLMatcher) -> CallerError:
    message, reason = matcher.get_error().strip(), matcher.stop_reason()
    if reason == "NoExtensionBias":
        return invalid("no text matches the grammar")
    complex_ = any(sign in f"{message} {reason}".lower() for sign in _TOO_COMPLEX)
    code = "grammar_too_complex" if complex_ else "invalid_grammar"
    return CallerError(message[:ERROR_CHARS_MAX], code=code)


class _Vocabulary:
    """A model's tokens as llguidance needs them, and the mask that allows only the end."""

    def __init__(self, record: ModelRecord) -> None:
        self.size = record.vocab_size
        self.ends = frozenset(record.eos_token_ids)
        self.mask_bytes = (record.vocab_size + 31) // 32 * 4
        self.tokenizer = LLTokenizer(
            record.tokenizer_json.decode(),
            n_vocab=record.vocab_size,
            eos_token=list(record.eos_token_ids),
        )
        self.end_mask = bytearray(self.mask_bytes)
        for end in self.ends:
            self.end_mask[end // 8] |= 1 << end % 8


class Matcher:
    """One text on its way through a grammar. For one thread at a time."""

    def __init__(
        self, compiled: LLMatcher, vocabulary: _Vocabulary, on_failure: Callable[[], None]
    ) -> None:
        self._compiled = compiled
        self._inner = compiled.deep_copy()
        self._vocabulary = vocabulary
        self._on_failure = on_failure
        self._tokens: list[int] = []
        self._over = False
        self.failure = ""
        """Why the grammar gave up (it ran out of fuel); '' while it has not."""

    def mask(self) -> bytearray:
        """The tokens that may come next: int32 words [ceil(vocab_size / 32)], little-endian, token
        t is bit t % 32 of word t // 32. The caller owns the buffer.

        Where a token is forced, it is the only one. All zero after a failure.
        """
        if self.failure:
            return bytearray(self._vocabulary.mask_bytes)
        if self._over:
            return bytearray(self._vocabulary.end_mask)
        mask = bytearray(self._inner.compute_bitmask())
        if self._inner.is_error():
            self._fail()
            return bytearray(self._vocabulary.mask_bytes)
        del mask[self._vocabulary.mask_bytes :]
        return mask

    def accept(self, token: int) -> bool:
        """Takes `token`, if the grammar allows it; else False, and nothing has changed.

        Also takes tokens that a mask left out only because another spelling was forced.
        """
        if self.failure or not 0 <= token < self._vocabulary.size:
            return False
        if token in self._vocabulary.ends and (self._over or self._inner.is_accepting()):
            self._over = True
        elif self._over or not self._inner.try_consume_tokens([token]):
            self._check()
            return False
        self._tokens.append(token)
        return True

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as one follows the other; [] where there is room.

        They are how the model's tokenizer writes the only text that the grammar allows here, never
        an end token, and never a token that a longer text might have merged with what follows.
        After accepting them the text so far is a beginning of one that the grammar allows. They are
        a function of the tokens so far: after the first n of them the rest is forced.
        """
        run: list[int] = []
        while not self.failure and not self._over:
            ahead = self._inner.compute_ff_tokens()
            if not ahead or ahead[0] in self._vocabulary.ends or not self._advance(ahead[0]):
                break
            run.append(ahead[0])
        self._return(len(run))
        return run

    def masks(self, draft: Sequence[int]) -> list[bytearray]:
        """Masks before draft[0], after draft[0], and so on, up to the first token that is refused.

        The state stays as it is, also when a draft leads where the grammar gives up.
        """
        masks = [self.mask()]
        taken = 0
        for token in draft:
            if self.failure or token in self._vocabulary.ends or not self._advance(token):
                break
            taken += 1
            mask = bytearray(self._inner.compute_bitmask())
            if self._inner.is_error():
                break
            masks.append(mask[: self._vocabulary.mask_bytes])
        self._return(taken)
        return masks

    @property
    def ended(self) -> bool:
        """Whether nothing but an end may follow."""
        if self._over:
            return True
        if self.failure or not self._inner.is_accepting():
            return False
        return self._inner.is_stopped() or self.mask() == self._vocabulary.end_mask

    def _advance(self, token: int) -> bool:
        in_range = 0 <= token < self._vocabulary.size
        return in_range and self._inner.try_consume_tokens([token]) == 1

    def _return(self, tokens: int) -> None:
        """Back by `tokens`, which were only tried."""
        if self._inner.is_error() or (tokens and not self._inner.rollback(tokens)):
            self._inner = self._compiled.deep_copy()
            self._inner.try_consume_tokens([t for t in self._tokens])
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            self._fail()

    def _fail(self) -> None:
        if not self.failure:
            self.failure = _failure(self._inner).message or "the grammar gave up"
            self._on_failure()
