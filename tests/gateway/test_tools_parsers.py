"""Calls in a model's text: found in every format, however it is cut, and nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_gateway.tools import call_object, call_parser
from headrace_gateway.tools.events import (
    Arguments,
    CallBegins,
    CallEnds,
    Event,
    Text,
    ToolParser,
    joined,
)
from headrace_gateway.tools.hermes import HermesParser
from headrace_gateway.tools.json_scan import DEPTH_MAX, JsonScanner
from headrace_gateway.tools.llama import LlamaParser
from headrace_gateway.tools.mistral import MistralParser

EXAMPLES = int(os.environ.get("HEADRACE_TOOL_EXAMPLES", "150"))
NAMES = frozenset({"get_weather", "f", "name"})
MakeParser = Callable[[frozenset[str]], ToolParser]
PARSERS: list[MakeParser] = [HermesParser, LlamaParser, MistralParser]


def parse(make: MakeParser, pieces: Sequence[str]) -> list[Event]:
    """The joined events of a message that comes in `pieces`."""
    parser = make(NAMES)
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined(events + parser.finish())


def call(index: int, arguments: str, name: str = "get_weather") -> list[Event]:
    return [CallBegins(index, name), Arguments(index, arguments), CallEnds(index, True)]


PARIS = '{"city": "Paris"}'
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
LLAMA = f'{{"name": "get_weather", "parameters": {PARIS}}}'
MISTRAL = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}, "id": "abc123XYZ"}}]'
MISTRAL_NEW = f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"
TRICKY = (
    r'{"a": "</tool_call> {[TOOL_CALLS]} \" \\", "b": [1.5e-3, true, {"é": "\u00e9😀"}], "c": {}}'
)

WHOLE: list[tuple[MakeParser, str, list[Event]]] = [
    (HermesParser, HERMES, call(0, PARIS)),
    (HermesParser, f"{HERMES}\n{HERMES}", [*call(0, PARIS), *call(1, PARIS)]),
    (HermesParser, f"{HERMES}{HERMES}  \n", [*call(0, PARIS), *call(1, PARIS)]),
    (HermesParser, f"Let me see.\n\n{HERMES}", [Text("Let me see."), *call(0, PARIS)]),
    (
        HermesParser,
        f"a {HERMES}\nb {HERMES} c",
        [Text("a"), *call(0, PARIS), Text("\nb"), *call(1, PARIS), Text(" c")],
    ),
    (HermesParser, f"{HERMES} b \n", [*call(0, PARIS), Text(" b \n")]),
    (
        HermesParser,  # the order that the first Hermes models were trained on
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        call(0, '{"x": 1}', "f"),
    ),
    (
        HermesParser,
        f'<tool_call>{{"id": [1, {{}}], "name": "f", "arguments": {TRICKY}, "x": 0}} </tool_call>!',
        [*call(0, TRICKY, "f"), Text("!")],
    ),
    (HermesParser, '<tool_call>{"name": "f"}</tool_call>', call(0, "{}", "f")),
    (HermesParser, r'<tool_call>{"n\u0061me": "\u0066", "parameters": {}}', call(0, "{}", "f")),
    # closing tag forgotten, at the end and before more
    (HermesParser, HERMES.removesuffix("\n</tool_call>"), call(0, PARIS)),
    (HermesParser, HERMES.removesuffix("tool_call>"), call(0, PARIS)),
    (
        HermesParser,
        HERMES.removesuffix("</tool_call>") + HERMES + "text",
        [*call(0, PARIS), *call(1, PARIS), Text("text")],
    ),
    (LlamaParser, LLAMA, call(0, PARIS)),
    (LlamaParser, f"<|python_tag|>{LLAMA}", call(0, PARIS)),
    (LlamaParser, f"\n <|python_tag|>{LLAMA}; {LLAMA}", [*call(0, PARIS), *call(1, PARIS)]),
    (LlamaParser, f"{LLAMA}\n{LLAMA};", [*call(0, PARIS), *call(1, PARIS)]),
    (LlamaParser, f"{LLAMA} {LLAMA} ok", [*call(0, PARIS), *call(1, PARIS), Text(" ok")]),
    (LlamaParser, f"Sure. <|python_tag|>{LLAMA}", [Text("Sure."), *call(0, PARIS)]),
    (
        LlamaParser,
        f'{{"type": "function", "name": "f", "parameters": {TRICKY}}}',
        call(0, TRICKY, "f"),
    ),
    (MistralParser, MISTRAL, call(0, PARIS)),
    (
        MistralParser,
        f'x [TOOL_CALLS][{{"name": "f", "arguments": {TRICKY}}} ,\n{MISTRAL[14:]} y',
        [Text("x"), *call(0, TRICKY, "f"), *call(1, PARIS), Text(" y")],
    ),
    (MistralParser, MISTRAL_NEW, call(0, PARIS)),
    (MistralParser, f"{MISTRAL_NEW}{MISTRAL_NEW}", [*call(0, PARIS), *call(1, PARIS)]),
    (
        MistralParser,
        f"{MISTRAL}{MISTRAL_NEW}]",
        [*call(0, PARIS), *call(1, PARIS), Text("]")],
    ),
    (MistralParser, f"[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{TRICKY}", call(0, TRICKY, "f")),
    (MistralParser, f"[TOOL_CALLS] f{TRICKY}!", [*call(0, TRICKY, "f"), Text("!")]),
]


@pytest.mark.parametrize(("make", "message", "expected"), WHOLE)
def test_calls_are_found_whole_and_letter_by_letter(
    make: MakeParser, message: str, expected: list[Event]
) -> None:
    """Around them the text stays; white space that belongs to the format does not."""
    assert parse(make, [message]) == expected
    assert parse(make, list(message)) == expected


NOT_CALLS: list[tuple[MakeParser, str]] = [
    (HermesParser, "<tool_call>\nhello\n</tool_call>"),
    (HermesParser, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # not offered
    (HermesParser, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": null}</tool_call>'),
    (HermesParser, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"arguments": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"arguments": {}, "parameters": {}, "name": "f"}</tool_call>'),
    (HermesParser, '<tool_call>{"arguments": {}, "name": "rm"}</tool_call>'),
    (HermesParser, "<tool_call>{}</tool_call>"),
    (HermesParser, '<tool_call>{"name": "f", }</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f"'),
    (HermesParser, "  <tool_call>  "),
    (HermesParser, "\n \n"),
    (HermesParser, "a <tool_cal> b <tool_call"),
    (HermesParser, "</tool_call>"),
    (LlamaParser, '{"answer": 42}'),
    (LlamaParser, '{"name": "Bob", "parameters": {}}'),
    (LlamaParser, '{"parameters": {}, "name": "f"}'),
    (LlamaParser, f"Here: {LLAMA}"),
    (LlamaParser, '<|python_tag|>print("hello")'),
    (LlamaParser, " "),
    (LlamaParser, "{"),
    (LlamaParser, ""),
    (MistralParser, "[TOOL_CALLS] []"),
    (MistralParser, "[TOOL_CALLS] sorry, {nothing}"),
    (MistralParser, "[TOOL_CALLS]rm[ARGS]{}"),
    (MistralParser, "[TOOL_CALLS]" + "f" * 65 + "[ARGS]{}"),
    (MistralParser, "[TOOL_CALLS]" + " " * 300 + "f{}"),
    (MistralParser, "[TOOL_CALLS]f"),
    (MistralParser, "[TOOL_CALLS] [[]]"),
]


@pytest.mark.parametrize(("make", "message"), NOT_CALLS)
def test_what_proves_no_call_is_text_to_the_letter(make: MakeParser, message: str) -> None:
    expected = [Text(message)] if message else []
    assert parse(make, [message]) == expected
    assert parse(make, list(message)) == expected


def test_a_call_inside_of_what_proved_none_is_found() -> None:
    """A model that begins anew: the false start is text, the call is a call."""
    message = f'<tool_call>{{"name": "f", <tool_call> {HERMES}'
    expected = [Text('<tool_call>{"name": "f", <tool_call>'), *call(0, PARIS)]
    assert parse(HermesParser, [message]) == expected
    assert parse(HermesParser, list(message)) == expected


def test_a_false_start_that_never_ends_is_read_again_at_the_end() -> None:
    message = '[TOOL_CALLS] [{"arguments": {"a": "[TOOL_CALLS]f{} '
    expected = [Text('[TOOL_CALLS] [{"arguments": {"a": "'), *call(0, "{}", "f")]
    assert parse(MistralParser, [message]) == expected
    assert parse(MistralParser, list(message)) == expected


def test_arguments_that_break_off_end_the_call_incomplete() -> None:
    """A token limit in the middle: the client has what there was."""
    assert parse(HermesParser, [HERMES[:55]]) == [
        CallBegins(0, "get_weather"),
        Arguments(0, '{"city'),
        CallEnds(0, False),
    ]


def test_arguments_that_go_wrong_end_the_call_where_they_do() -> None:
    """They were streamed already; the rest is text, and the next call counts on."""
    message = f'<tool_call>{{"name": "f", "arguments": {{"a": nil}}}}</tool_call>{HERMES}'
    expected = [
        CallBegins(0, "f"),
        Arguments(0, '{"a": n'),
        CallEnds(0, False),
        Text("il}}</tool_call>"),
        *call(1, PARIS),
    ]
    assert parse(HermesParser, [message]) == expected
    assert parse(HermesParser, list(message)) == expected


def test_white_space_behind_a_call_that_went_wrong_is_text() -> None:
    """A line break within a string is no JSON; it is not the format's either."""
    expected = [CallBegins(0, "f"), Arguments(0, '{"a": "'), CallEnds(0, False), Text("\n ")]
    assert parse(HermesParser, ['<tool_call>{"name": "f", "arguments": {"a": "\n ']) == expected


def test_an_object_that_breaks_behind_its_arguments_is_a_call_and_text() -> None:
    message = '[TOOL_CALLS] [{"name": "f", "arguments": {}, oops}] and more'
    expected = [*call(0, "{}", "f"), Text(", oops}] and more")]
    assert parse(MistralParser, [message]) == expected
    assert parse(MistralParser, list(message)) == expected


def test_text_and_arguments_are_not_held_back_longer_than_needed() -> None:
    """A begun marker and white space wait; a letter of an argument does not."""
    parser = HermesParser(NAMES)
    assert parser.push("Hello <to") == [Text("Hello")]
    assert parser.push("ol> \n") == [Text(" <tool>")]
    assert parser.push('<tool_call>{"name": "f", "arguments":') == []
    assert parser.push("{") == [CallBegins(0, "f"), Arguments(0, "{")]
    assert parser.push('"a') == [Arguments(0, '"a')]
    assert parser.push('": 1}') == [Arguments(0, '": 1}'), CallEnds(0, True)]
    assert parser.push("}\n</tool_") == []
    assert parser.push("call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize("step", [1_000, 70_000, 300_000])
def test_what_is_held_is_bounded(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments before the name can only be held; past the limit it is text, however it comes."""
    monkeypatch.setattr(call_parser, "HELD_CHARS_MAX", 2_000)
    body = "x" * 200_000
    message = f'<tool_call>{{"arguments": {{"a": "{body}"}}, "name": "f"}}</tool_call>'
    parser = HermesParser(NAMES)
    events: list[Event] = []
    for at in range(0, len(message), step):
        events += parser.push(message[at : at + step])
        assert len(parser._buffer) <= 2_000
    assert joined(events + parser.finish()) == [Text(message)]


def test_what_follows_the_arguments_is_bounded() -> None:
    long = "x" * call_object.TAIL_CHARS_MAX
    message = f'<tool_call>{{"name": "f", "arguments": {{}}, "id": "{long}"}}</tool_call>'
    expected = [*call(0, "{}", "f"), Text(f', "id": "{long}"}}</tool_call>')]
    assert parse(HermesParser, [message]) == expected
    assert parse(HermesParser, list(message)) == expected


@pytest.mark.parametrize("spaces", [63, 64, 65, 200])
def test_a_long_run_of_white_space_is_text(spaces: int) -> None:
    message = f"a{' ' * spaces}{HERMES}{' ' * spaces}b"
    kept = " " * spaces if spaces > call_parser.SPACES_MAX else ""
    expected = [Text(f"a{kept}"), *call(0, PARIS), Text(f"{' ' * spaces}b")]
    assert parse(HermesParser, [message]) == expected
    assert parse(HermesParser, list(message)) == expected


@pytest.mark.parametrize(("spaces", "kept"), [(64, False), (65, True)])
def test_a_closing_tag_behind_a_long_run_of_white_space_is_text(spaces: int, kept: bool) -> None:
    message = HERMES.replace("\n</", " " * spaces + "</")
    tail = [Text(f"{' ' * spaces}</tool_call>")] if kept else []
    assert parse(HermesParser, [message]) == [*call(0, PARIS), *tail]
    assert parse(HermesParser, list(message)) == [*call(0, PARIS), *tail]


LONG = " " * (call_parser.SPACES_MAX + 1)


@pytest.mark.parametrize(
    ("make", "before", "more"),
    [
        (HermesParser, "", LONG), (HermesParser, HERMES.removesuffix("\n</tool_call>"), LONG),
        (LlamaParser, "", LONG), (LlamaParser, LLAMA, LONG), (MistralParser, MISTRAL[:-1], LONG),
        (MistralParser, "", "[TOOL_CALLS]" + "x" * 300),
        (MistralParser, "", f"[TOOL_CALLS]{LONG * 9}"),
    ],
)  # fmt: skip
def test_what_can_be_no_call_any_more_is_shown_at_once(
    make: MakeParser, before: str, more: str
) -> None:
    """Not at the end of the message: somebody is reading."""
    parser = make(NAMES)
    parser.push(before)
    assert parser.push(more) == [Text(more)]


def test_white_space_behind_a_long_run_and_a_call_belongs_to_the_format() -> None:
    message = f"{' ' * 65}{HERMES}\n{HERMES}"
    expected = [Text(" " * 65), *call(0, PARIS), *call(1, PARIS)]
    assert parse(HermesParser, [message]) == expected
    assert parse(HermesParser, list(message)) == expected


# --- properties -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """`text` in any pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def written(draw: st.DrawFn) -> str:
    """An object's JSON text, as some model may space and escape it."""
    return json.dumps(
        draw(OBJECTS),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([None, (",", ":"), (" , ", " : ")])),
    )


def hermes(calls: list[tuple[str, str]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls
    )


def llama(calls: list[tuple[str, str]]) -> str:
    return "<|python_tag|>" + "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


def mistral(calls: list[tuple[str, str]]) -> str:
    listed = ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls)
    return f"[TOOL_CALLS] [{listed}]"


def mistral_new(calls: list[tuple[str, str]]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in calls)


WRITERS: list[tuple[MakeParser, Callable[[list[tuple[str, str]]], str]]] = [
    (HermesParser, hermes), (LlamaParser, llama), (MistralParser, mistral),
    (MistralParser, mistral_new),
]  # fmt: skip
CALLS = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), written()), min_size=1, max_size=3)
PLAIN = st.text(st.sampled_from("ab é😀.,:!?\n{}\"'\\"), max_size=20).filter(
    lambda text: not text[:1].isspace() and not text[-1:].isspace() and text[:1] not in ("{", "")
)


@given(st.sampled_from(WRITERS), PLAIN, CALLS, PLAIN, st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_calls_come_out_as_they_were_written(
    writer: tuple[MakeParser, Callable[[list[tuple[str, str]]], str]],
    before: str,
    calls: list[tuple[str, str]],
    after: str,
    data: st.DataObject,
) -> None:
    """Names and arguments' text to the letter, in order, with the text around them."""
    make, write = writer
    pieces = data.draw(cut(f"{before}\n{write(calls)}{after}"))
    events = parse(make, pieces)
    expected: list[Event] = [Text(before)]
    for index, (name, arguments) in enumerate(calls):
        expected += call(index, arguments, name)
        json.loads(arguments)
    assert events == [*expected, Text(after)]


FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    '{"name": "f", ', '"arguments": ', '"parameters": {', '{"a": 1}', "}", "{", "[", "]", ",", ";",
    " ", "\n", "f", "get_weather", '"', "\\", "x", '"name": "f"', "{}", "é", ":", "\x01", "1", "-",
    HERMES, LLAMA, MISTRAL, MISTRAL_NEW, " " * 40,
])  # fmt: skip


@given(st.sampled_from(PARSERS), st.lists(FRAGMENTS, max_size=14).map("".join), st.data())
@settings(max_examples=2 * EXAMPLES, deadline=None)
def test_the_result_does_not_depend_on_the_cuts(
    make: MakeParser, message: str, data: st.DataObject
) -> None:
    """Also for text that nearly is a call; and what is shown stands in the text, in order."""
    whole = parse(make, [message])
    assert parse(make, data.draw(cut(message))) == whole
    assert parse(make, list(message)) == whole
    check_events(whole)
    at = 0
    for event in whole:
        shown = event.text if isinstance(event, Text) else getattr(event, "delta", "")
        if shown and not (shown == call_object.NO_ARGUMENTS and shown not in message[at:]):
            found = message.find(shown, at)
            assert found >= 0, (shown, message)
            at = found + len(shown)
    if not any(isinstance(event, CallBegins) for event in whole):
        assert whole == ([Text(message)] if message else [])


def check_events(events: list[Event]) -> None:
    """The invariant of the events: calls are begun and ended in turn, complete ones are objects."""
    running: int | None = None
    begun = 0
    text = ""
    for event in events:
        if isinstance(event, CallBegins):
            assert running is None
            assert event.index == begun
            running, begun, text = event.index, begun + 1, ""
        elif isinstance(event, Text):
            assert running is None
            assert event.text
        else:
            assert event.index == running
            if isinstance(event, Arguments):
                text += event.delta
                continue
            assert not event.complete or isinstance(json.loads(text), dict)
            running = None
    assert running is None


@given(JSON, st.sampled_from([None, 2]), st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_scanner_ends_where_the_value_does(value: Any, indent: int | None, data: Any) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    scanner, read = JsonScanner(), 0
    for piece in data.draw(cut(text)):
        read += scanner.scan(piece, 0, len(piece))
    assert not scanner.broken
    if not scanner.done:  # a number ends with the character after it
        assert isinstance(value, int | float)
        assert scanner.scan(",", 0, 1) == 0
    assert scanner.done
    assert read == len(text)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("[1,]", "[1,"), ('{"a":1,}', '{"a":1,'), ("{'a'", "{"), ("[01]", "[0"), ("[1.]", "[1."),
        ("[-]", "[-"), ("[1e+]", "[1e+"), ("[.5]", "["), ("[+1]", "["), ("[tru3]", "[tru"),
        ('["\n"]', '["'), (r'["\x"]', '["\\'), (r'["\u12g4"]', '["\\u12'), ('{"a" 1}', '{"a" '),
        ("[1 2]", "[1 "), ("[}", "["), ("NaN", ""), ("[" * (DEPTH_MAX + 1), "[" * DEPTH_MAX),
    ],
)  # fmt: skip
def test_a_scanner_breaks_at_the_character_that_is_no_json(text: str, good: str) -> None:
    for pieces in ([text], list(text)):
        scanner, read = JsonScanner(), 0
        for piece in pieces:
            read += scanner.scan(piece, 0, len(piece))
        assert scanner.broken
        assert not scanner.done
        assert read == len(good)
