"""Grammars for calls: what they allow, the parser reads as the calls that were wanted."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from tokenizers import Tokenizer

from headrace.errors import CallerError
from headrace.grammars import Grammars, Matcher, json_in_lark
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.enforcing import REQUIRED_CALLS_MAX, grammar_for
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds, Event, Text, joined
from headrace_gateway.tools.formats import Format, parser_for
from headrace_gateway.tools.markers import MarkedSpeller, marker_tokens
from headrace_gateway.tools.offer import Freedom, Function, Offer
from support import tools as t
from support.api import make_record, tiny_tokenizer

END = 2


class Vocabulary:
    """A model's tokens, with the markers among them or without."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.record = make_record(chat_template="", tokenizer=tokenizer)
        self.grammars = Grammars(self.record)
        self.tokenizer = ModelTokenizer(self.record)
        self._encoder = tokenizer

    def tokens_of(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def markers(self, format: Format) -> dict[str, int]:
        return marker_tokens(self.tokenizer, format)

    def matcher(self, format: Format, offer: Offer, answer: str | None = None) -> Matcher:
        grammar = grammar_for(format, self.markers(format), offer, answer)
        assert grammar is not None
        return self.grammars.compile(grammar)

    def takes(self, match: Matcher, text: str) -> bool:
        """Whether `text` may be said and end there."""
        return all(map(match.accept, self.tokens_of(text))) and match.accept(END)

    def babble(self, match: Matcher, chance: random.Random, *, tokens: int) -> list[int]:
        """A text that the grammar allows, each token drawn from all that it allows."""
        said: list[int] = []
        while len(said) < tokens:
            mask = match.mask()
            size = self.record.vocab_size
            choices = [token for token in range(size) if mask[token // 8] >> token % 8 & 1]
            token = END if END in choices and chance.random() < 0.5 else chance.choice(choices)
            if token == END:
                return said
            assert match.accept(token)
            said.append(token)
        raise AssertionError("no end in sight")

    def read(self, format: Format, tokens: list[int], names: frozenset[str]) -> list[Event]:
        """What a client is told of `tokens`: detokenized with the markers shown, then parsed."""
        speller = MarkedSpeller(self.tokenizer, self.markers(format))
        detokenizer, parser = speller.detokenizer(), parser_for(format, names)
        events = [event for token in tokens for event in parser.push(detokenizer.push(token))]
        return joined([*events, *parser.push(detokenizer.flush()), *parser.finish()])


@pytest.fixture(scope="module", params=["marked", "spelled"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(t.tool_tokenizer() if request.param == "marked" else tiny_tokenizer())


@pytest.fixture(scope="module")
def marked() -> Vocabulary:
    return Vocabulary(t.tool_tokenizer())


ROOM = {
    "type": "object",
    "properties": {
        "beds": {"type": "integer", "minimum": 1, "maximum": 4},
        "view": {"enum": ["sea", "</tool_call>", "[TOOL_CALLS] {"]},
        "with": {"$ref": "#/$defs/guest"},
    },
    "required": ["beds", "view"],
    "additionalProperties": False,
    "$defs": {
        "guest": {
            "type": "object",
            "properties": {"vip": {"type": "boolean"}},
            "required": ["vip"],
            "additionalProperties": False,
        }
    },
}
BOOK = Function("book_room", "Books", ROOM, True, "tools[0].function.parameters")
PING = t.time()
BOTH = (BOOK, PING)
BY_NAME = {function.name: function for function in BOTH}


def check_calls(events: list[Event]) -> list[str]:
    """All of `events` are complete calls with valid arguments; their names."""
    names: list[str] = []
    for begins, arguments, ends in zip(events[::3], events[1::3], events[2::3], strict=True):
        assert isinstance(begins, CallBegins), events
        assert isinstance(arguments, Arguments), events
        assert ends == CallEnds(begins.index, True), events
        schema = BY_NAME[begins.name].parameters
        jsonschema.validate(json.loads(arguments.delta), schema)
        names.append(begins.name)
    return names


def test_required_calls_come_to_an_end(marked: Vocabulary) -> None:
    """A model that would call for ever may not: small ones know no reason to stop."""
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    offer = Offer(BOTH, Freedom.REQUIRED)
    for calls in (1, REQUIRED_CALLS_MAX, REQUIRED_CALLS_MAX + 1):
        match = marked.matcher(Format.HERMES, offer)
        fits = marked.takes(match, "\n".join([call] * calls))
        assert fits is (calls <= REQUIRED_CALLS_MAX)


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_required_allows_is_calls_and_nothing_else(
    vocabulary: Vocabulary, format: Format, parallel: bool
) -> None:
    """Random texts that the grammar allows, through detokenizer and parser."""
    offer = Offer(BOTH, Freedom.REQUIRED, None, parallel)
    counts = set()
    for seed in range(12):
        match = vocabulary.matcher(format, offer)
        said = vocabulary.babble(match, random.Random(seed), tokens=900)
        names = check_calls(vocabulary.read(format, said, offer.names))
        assert names
        counts.add(len(names))
    assert counts == {1} if not parallel else max(counts) > 1


@pytest.mark.parametrize("format", Format)
def test_a_named_function_is_the_only_one_called(vocabulary: Vocabulary, format: Format) -> None:
    """What can only be one text is forced: the engine need not sample it."""
    offer = Offer(BOTH, Freedom.REQUIRED, "get_time", parallel=False)
    match = vocabulary.matcher(format, offer)
    forced = match.forced()
    if format in (Format.HERMES, Format.MISTRAL_NAMED):
        assert all(map(match.accept, forced))
        assert match.ended
        assert check_calls(vocabulary.read(format, forced, offer.names)) == ["get_time"]
    said = vocabulary.babble(vocabulary.matcher(format, offer), random.Random(5), tokens=200)
    assert check_calls(vocabulary.read(format, said, offer.names)) == ["get_time"]


GOOD = '{"beds": 2, "view": "sea"}'
BAD = '{"beds": 9, "view": "sea"}'
WRITTEN: dict[Format, str] = {
    Format.HERMES: '<tool_call>\n{"name": "book_room", "arguments": ARGUMENTS}\n</tool_call>',
    Format.LLAMA: '{"name": "book_room", "parameters": ARGUMENTS}',
    Format.MISTRAL_LIST: '[TOOL_CALLS] [{"name": "book_room", "arguments": ARGUMENTS}]',
    Format.MISTRAL_NAMED: "[TOOL_CALLS]book_room[ARGS]ARGUMENTS",
}
LLAMA_TAG = "<|python_tag|>"


@pytest.mark.parametrize("format", Format)
def test_auto_leaves_text_free_and_holds_calls_of_strict_functions(
    vocabulary: Vocabulary, format: Format
) -> None:
    """Lazily: nothing is held before a marker has been written."""

    def takes(text: str, offer: Offer | None = None) -> bool:
        return vocabulary.takes(vocabulary.matcher(format, offer or Offer(BOTH)), text)

    good = WRITTEN[format].replace("ARGUMENTS", GOOD)
    for text in ("", "Hello, {world}!", "a <tool_cal", "[TOOL", good):
        assert takes(text), text
    for text in (good.replace(GOOD, BAD), good.replace("book_room", "rm")):
        assert not takes(text), text
    one = Offer(BOTH, parallel=False)
    assert takes(good, one)
    if format is Format.LLAMA:
        assert takes(f"{good}; {good}")
        assert not takes(f"{good}; {good}", one)
        assert not takes('{"a": 1}')
        if vocabulary.markers(format):
            assert takes(f"Let me see. {LLAMA_TAG}{good}")
        return
    assert takes(f"Let me see. {good} And {good} done.")
    assert takes(f"x {good}", one)
    assert not takes(f"x {good} and", one)


@pytest.mark.parametrize("format", Format)
def test_auto_with_a_response_format_is_calls_or_the_answer(
    marked: Vocabulary, format: Format
) -> None:
    """Where both are JSON from their first character, calls have to be marked."""
    answer = json_in_lark({"type": "object", "properties": {"ok": {"type": "boolean"}}})
    good = WRITTEN[format].replace("ARGUMENTS", GOOD)
    good = LLAMA_TAG + good if format is Format.LLAMA else good
    for text, good_enough in (
        (good, True),
        ('{"ok": true}', True),
        ("Hi", False),
        (f"x{good}", False),
    ):
        assert marked.takes(marked.matcher(format, Offer(BOTH), answer), text) == good_enough, text


def test_llama_without_its_marker_cannot_tell_calls_from_answers() -> None:
    with pytest.raises(CallerError) as caught:
        grammar_for(Format.LLAMA, {}, Offer(BOTH), json_in_lark({"type": "object"}))
    assert caught.value.param == "response_format"


def test_auto_without_strict_functions_needs_no_grammar() -> None:
    assert grammar_for(Format.HERMES, {}, Offer((t.weather(), t.time()))) is None


def test_a_schema_that_cannot_be_enforced_is_refused_only_where_it_is_strict(
    marked: Vocabulary,
) -> None:
    """Otherwise the call is held to being one, with any object as its arguments."""
    odd = {"type": "object", "not": {"required": ["a"]}}
    for strict in (True, False):
        function = Function("f", "", odd, strict, "tools[4].function.parameters")
        offer = Offer((function,), Freedom.REQUIRED, "f", parallel=False)
        if strict:
            with pytest.raises(
                CallerError, match=r"tools\[4\]\.function\.parameters.*not"
            ) as caught:
                grammar_for(Format.HERMES, {}, offer)
            assert caught.value.param == "tools[4].function.parameters"
            continue
        text = '<tool_call>\n{"name": "f", "arguments": {"b": [1]}}\n</tool_call>'
        assert marked.takes(marked.matcher(Format.HERMES, offer), text)
        wrong = text.replace('{"b": [1]}', "5")
        assert not marked.takes(marked.matcher(Format.HERMES, offer), wrong)


def test_markers_that_are_special_tokens_are_seen_and_others_stay_hidden(
    marked: Vocabulary,
) -> None:
    """Characters begun before a marker end there, and nothing is carried over it."""
    markers = marked.markers(Format.MISTRAL_NAMED)
    assert list(markers) == ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
    speller = MarkedSpeller(marked.tokenizer, markers)
    begun = marked.tokens_of("é")[:1]
    tokens = [*marked.tokens_of("a"), *begun, markers["[ARGS]"]]
    tokens += [*marked.tokens_of("<|im_start|>b"), *begun]
    detokenizer = speller.detokenizer()
    said = [detokenizer.push(token) for token in tokens]
    assert said == ["a", "", "\ufffd[ARGS]", "", "b", ""]
    assert detokenizer.flush() == "\ufffd"
    assert speller.bytes_of(markers["[ARGS]"]) == b"[ARGS]"


def test_text_and_calls_are_shown_for_what_they_are(vocabulary: Vocabulary) -> None:
    text = f"Let me see. {WRITTEN[Format.MISTRAL_NAMED].replace('ARGUMENTS', GOOD)}"
    tokens, names = vocabulary.tokens_of(text), frozenset({"book_room"})
    assert vocabulary.read(Format.MISTRAL_NAMED, tokens, names) == [
        Text("Let me see."),
        CallBegins(0, "book_room"),
        Arguments(0, GOOD),
        CallEnds(0, True),
    ]
