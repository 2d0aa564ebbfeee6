"""Grammars that hold a model to calling as it was told to.

Invariant: whatever one of these grammars allows, the parser of the same format reads as calls of
offered functions, complete, with arguments valid under each function's schema, and as nothing else
where only calls are wanted.

A function that is not `strict` and whose schema cannot be enforced may have any JSON object as its
arguments; a strict one is refused by name. With freedom AUTO there is a grammar only where there is
something to hold: text stays free until a call begins. Rejected: holding AUTO always. A model could
then no longer write about a marker, and what goes wrong in a call that nobody asked to be strict is
the client's to see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace import grammars
from headrace.errors import CallerError
from headrace_gateway.tools import hermes, llama, mistral
from headrace_gateway.tools.formats import Format
from headrace_gateway.tools.offer import Freedom, Function, Offer

Tokens = Mapping[str, int]
"""The markers that are tokens added to the model's vocabulary, with their ids: llguidance never
takes those for the text that they spell, whether they are special or not."""

REQUIRED_CALLS_MAX = 8
"""Calls in a message that may hold nothing else: small models know no reason to stop."""

_TEXT = r"TEXT: /(.|\n)*/"
_ANSWER = r"ANSWER: /[^{ \t\r\n](.|\n)*/"


def grammar_for(
    format: Format, tokens: Tokens, offer: Offer, answer: str | None = None
) -> str | None:
    """The serialized grammar of one message; None where it may be anything.

    `answer` is a Lark expression for what the message has to be if it calls nothing. Raises
    CallerError naming the field of a strict function whose schema cannot be enforced.
    """
    required = offer.freedom is Freedom.REQUIRED
    functions = offer.callable_functions
    if not required and answer is None and not any(f.strict for f in functions):
        return None
    way = _way(format, tokens, functions, parallel=offer.parallel)
    arguments = [f"arguments_{at}: {_arguments(f)}" for at, f in enumerate(functions)]
    if required:
        rules = [f"start: {way.calls}"]
    elif answer is not None:
        rules = [f"start: {_beside_answers(format, tokens, way)} | answer", f"answer: {answer}"]
    else:
        rules = way.in_text
    return grammars.lark("\n".join([*rules, *way.rules, *arguments]))


def _beside_answers(format: Format, tokens: Tokens, way: _Way) -> str:
    """Calls that no answer in JSON can be taken for."""
    if format is not Format.LLAMA:
        return way.calls
    if llama.MARKER not in tokens:
        raise CallerError(
            "this model cannot be offered tools and held to a response format in one request",
            param="response_format",
            code="unsupported_parameter",
        )
    return f"<[{tokens[llama.MARKER]}]> calls"


def _arguments(function: Function) -> str:
    try:
        return grammars.json_in_lark(function.parameters)
    except CallerError as error:
        if function.strict:
            raise CallerError(
                f"{function.param}: {error.message}", param=function.param, code=error.code
            ) from error
        return grammars.json_in_lark({"type": "object"})


@dataclass(frozen=True, slots=True)
class _Way:
    """`calls`: a message of nothing but calls; `in_text`: the rule `start` with text around them.

    `rules` are those that both use, besides `arguments_N` for the function N.
    """

    calls: str
    in_text: list[str]
    rules: list[str]


def _way(format: Format, tokens: Tokens, functions: Sequence[Function], *, parallel: bool) -> _Way:
    def mark(marker: str) -> str:
        return f"<[{tokens[marker]}]>" if marker in tokens else json.dumps(marker)

    def repeated(part: str, separator: str) -> str:
        return f"{part} ({separator} {part}){{0,{REQUIRED_CALLS_MAX - 1}}}" if parallel else part

    if format is Format.LLAMA:
        calls = repeated("object", '"; "')
        rules = [_objects(functions, "parameters"), f"calls: {calls}"]
        if llama.MARKER not in tokens:
            return _Way("calls", ["start: ANSWER? | calls", _ANSWER], rules)
        tag = mark(llama.MARKER)
        return _Way(f"{tag}? calls", [f"start: ANSWER? | (ANSWER? {tag})? calls", _ANSWER], rules)
    if format is Format.HERMES:
        rules = [_objects(functions, "arguments")]
        body = f'"\\n" object "\\n" {mark(hermes.CLOSE)}'
        calls = repeated("call", '"\\n"')
        marker = hermes.OPEN
    elif format is Format.MISTRAL_LIST:
        rules = [_objects(functions, "arguments")]
        listed = repeated("object", '", "')
        body = f'" "? "[" {listed} "]"'
        calls, marker = "call", mistral.MARKER
    else:
        named = [f"{json.dumps(f.name)} args arguments_{at}" for at, f in enumerate(functions)]
        rules = [f"args: {mark(mistral.ARGS)}", f"named: {' | '.join(named)}"]
        body, calls, marker = "named", repeated("call", ""), mistral.MARKER
    rules += [f"body: {body}", f"call: {mark(marker)} body"]
    lead = [f"spelled[lazy]: TEXT {json.dumps(marker)}", "lead: spelled"]
    if marker in tokens:
        lead[1] += f" | TEXT {mark(marker)}"
    start = "start: (lead body)* TEXT" if parallel else "start: TEXT | lead body"
    return _Way(calls, [start, *lead, _TEXT], rules)


def _objects(functions: Sequence[Function], key: str) -> str:
    """The rule `object`: one call as a JSON object."""
    ways = [
        f'{json.dumps(_beginning(function.name, key))} arguments_{at} "}}"'
        for at, function in enumerate(functions)
    ]
    return f"object: {' | '.join(ways)}"


def _beginning(name: str, key: str) -> str:
    return f'{{"name": "{name}", "{key}": '
