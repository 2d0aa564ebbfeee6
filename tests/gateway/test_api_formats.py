"""Structured output: each way to ask for it becomes one grammar, checked before any job is made."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from headrace.grammars import Grammars
from headrace.types import FinishReason
from support.api import MODEL, ScriptedFleet, encode, make_record, running_gateway, say

HI = [{"role": "user", "content": "Hi"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": HI},
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}
CHAT, COMPLETIONS, RESPONSES = VALID
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NAMED = {"name": "thing", "schema": SCHEMA, "strict": True}
GOOD, OTHER = '{"a": 5, "b": "x"}', '{"c": [1]}'
LARK = 'start: WORD " " WORD\nWORD: /[a-c]+/'


def matches(grammar: str, text: str) -> bool:
    """Whether a worker that holds to `grammar` can say `text` and end there."""
    matcher = Grammars(make_record()).compile(grammar)
    return all(matcher.accept(token) for token in [*encode(text), 2])


def json_schema(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": NAMED | {"schema": schema} | fields}


ANYWHERE = [
    ({"regex": "[0-9]{3}"}, ["123"], ["12", "1234", "abc"]),
    ({"guided_regex": "[0-9]{3}"}, ["123"], ["12"]),
    ({"structured_outputs": {"regex": "a|b"}}, ["a"], ["c"]),
    ({"choice": ["red", "dark blue"]}, ["red", "dark blue"], ["blue", '"red"']),
    ({"guided_choice": ["red"]}, ["red"], ["blue"]),
    ({"structured_outputs": {"choice": ["red"]}}, ["red"], ["blue"]),
    ({"grammar": LARK}, ["ab c"], ["ab", "ab d"]),
    ({"guided_grammar": LARK}, ["ab c"], ["ab"]),
    ({"structured_outputs": {"grammar": LARK}}, ["ab c"], ["ab"]),
    ({"guided_json": SCHEMA}, [GOOD], [OTHER]),
    ({"guided_json": json.dumps(SCHEMA)}, [GOOD], [OTHER]),
    ({"structured_outputs": {"json": SCHEMA}}, [GOOD], [OTHER]),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, [GOOD], [OTHER]),
    ({"structured_outputs": {"json_object": True}}, [GOOD, OTHER], ["[1]", "x"]),
]  # fmt: skip
OPENAI = [
    (json_schema(), [GOOD], [OTHER]),
    (json_schema(strict=False), [GOOD], [OTHER]),
    (json_schema(strict=None, description="a thing"), [GOOD], [OTHER]),
    ({"type": "json_object"}, [GOOD, OTHER], ["[1]", "x"]),
]  # fmt: skip
CASES = [
    *((path, *case) for path in VALID for case in ANYWHERE),
    *(
        (path, {"response_format": f}, *texts)
        for path in (CHAT, COMPLETIONS)
        for f, *texts in OPENAI
    ),
    *(
        (RESPONSES, {"text": {"format": {"type": f["type"], **f.get("json_schema", {})}}}, *texts)
        for f, *texts in OPENAI
    ),
]


async def test_every_way_to_ask_becomes_a_grammar_in_the_job() -> None:
    """The grammar allows what it should and nothing else; asking twice gives the same one."""
    async with running_gateway() as g:
        for path, fields, fitting, others in CASES:
            status, answer = await g.post(path, VALID[path] | fields)
            assert status == 200, (fields, answer)
            grammar = g.fleet.jobs[-1].sampling.grammar
            assert all(matches(grammar, text) for text in fitting), fields
            assert not any(matches(grammar, text) for text in others), fields
            await g.post(path, VALID[path] | fields)
            assert g.fleet.jobs[-1].sampling.grammar == grammar


@pytest.mark.parametrize("path", VALID)
async def test_plain_text_is_no_form(path: str) -> None:
    neutral: dict[str, Any] = {
        "regex": None, "choice": None, "grammar": None, "structured_outputs": None,
        "guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None,
    }  # fmt: skip
    text = {"type": "text"}
    own = {"text": {"format": text}} if path == RESPONSES else {"response_format": text}
    async with running_gateway() as g:
        for fields in (neutral, own, {"structured_outputs": {}}, {"structured_outputs": neutral}):
            status, answer = await g.post(path, VALID[path] | fields)
            assert status == 200, answer
        assert {job.sampling.grammar for job in g.fleet.jobs} == {""}


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"regex": "("}, "regex", "invalid_grammar"),
    (CHAT, {"grammar": "start: nothing"}, "grammar", "invalid_grammar"),
    (CHAT, {"guided_json": {"type": "wizard"}}, "guided_json", "invalid_grammar"),
    (CHAT, {"guided_json": "{"}, "guided_json", "invalid_json"),
    (CHAT, {"structured_outputs": {"regex": "["}}, "structured_outputs", "invalid_grammar"),
    (
        CHAT,
        {"response_format": json_schema({"type": "wizard"})},
        "response_format",
        "invalid_grammar",
    ),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (CHAT, {"response_format": {}}, "response_format.type", "missing_required_parameter"),
    (
        CHAT,
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "missing_required_parameter",
    ),
    (CHAT, {"choice": ["a", 5]}, "choice[1]", "invalid_value"),
    (CHAT, {"choice": []}, "choice", "invalid_value"),
    (CHAT, {"regex": "a", "choice": ["a"]}, "choice", "invalid_value"),
    (CHAT, {"regex": "a", "response_format": json_schema()}, "regex", "invalid_value"),
    (
        CHAT,
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "invalid_value",
    ),
    (
        CHAT,
        {"structured_outputs": {"whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
        "invalid_value",
    ),
    (
        COMPLETIONS,
        {"guided_whitespace_pattern": " "},
        "guided_whitespace_pattern",
        "unsupported_parameter",
    ),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", **NAMED, "schema": {"type": 5}}}},
        "text.format",
        "invalid_grammar",
    ),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        "text.format.name",
        "missing_required_parameter",
    ),
    (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity", "invalid_value"),
    (RESPONSES, {"response_format": json_schema()}, "response_format", "unsupported_parameter"),
]


async def test_what_is_no_form_is_refused_by_the_name_of_its_field() -> None:
    """400 before any job exists; the request after all of them is served."""
    async with running_gateway() as g:
        for path, fields, param, code in REFUSED:
            status, answer = await g.post(path, VALID[path] | fields)
            assert status == 400, (fields, answer)
            error: Any = answer["error"]
            assert (error["param"], error["code"]) == (param, code), (fields, error)
        assert not g.fleet.jobs
        assert (await g.post(CHAT, VALID[CHAT] | {"regex": "a"}))[0] == 200


class Thing(BaseModel):
    a: int
    b: Literal["x", "y"]


async def test_the_clients_parse_helpers_for_chat() -> None:
    """`chat.completions.parse` and the streaming variant, with a pydantic model."""
    async with running_gateway(ScriptedFleet(script=lambda job: say(GOOD))) as g:
        parsed = await g.openai.chat.completions.parse(
            model=MODEL,
            messages=HI,
            response_format=Thing,  # type: ignore[arg-type]
        )
        assert parsed.choices[0].message.parsed == Thing(a=5, b="x")
        async with g.openai.chat.completions.stream(
            model=MODEL,
            messages=HI,
            response_format=Thing,  # type: ignore[arg-type]
        ) as stream:
            partial = [event.parsed async for event in stream if event.type == "content.delta"]
            final = await stream.get_final_completion()
        assert {"a": 5} in partial, "what has come so far is parsed as it comes"
        assert final.choices[0].message.parsed == Thing(a=5, b="x")
        first, second = (job.sampling.grammar for job in g.fleet.jobs)
        assert first == second
        assert matches(first, GOOD)
        assert not matches(first, OTHER)


async def test_the_clients_parse_helpers_for_responses() -> None:
    """`responses.parse` and `responses.stream`; the response repeats the format asked for."""
    async with running_gateway(ScriptedFleet(script=lambda job: say(GOOD))) as g:
        parsed = await g.openai.responses.parse(model=MODEL, input="Hi", text_format=Thing)
        assert parsed.output_parsed == Thing(a=5, b="x")
        assert parsed.text is not None
        told: Any = parsed.text.format
        assert (told.type, told.name, told.strict) == ("json_schema", "Thing", True)
        assert told.schema_["required"] == ["a", "b"]
        async with g.openai.responses.stream(model=MODEL, input="Hi", text_format=Thing) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Thing(a=5, b="x")
        assert matches(g.fleet.jobs[-1].sampling.grammar, GOOD)


async def test_an_answer_that_was_cut_says_length() -> None:
    """Half an object: the form was right as far as it went, and the reason says what happened."""
    half = GOOD[:-4]
    fleet = ScriptedFleet(script=lambda job: say(half, reason=FinishReason.LENGTH))
    async with running_gateway(fleet) as g:
        answer = await g.openai.chat.completions.create(
            model=MODEL,
            messages=HI,
            response_format={"type": "json_object"},  # type: ignore[arg-type]
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == half


async def test_over_a_websocket_a_bad_form_is_an_error_frame() -> None:
    async with running_gateway() as g, g.http.ws_connect(RESPONSES) as socket:
        body = {"type": "response.create", **VALID[RESPONSES]}
        await socket.send_json(body | {"regex": "("})
        error = await socket.receive_json(timeout=10)
        assert (error["status"], error["error"]["param"]) == (400, "regex")
        await socket.send_json(body | {"text": {"format": {"type": "json_object"}}})
        assert (await socket.receive_json(timeout=10))["type"] == "response.created"
        assert matches(g.fleet.jobs[0].sampling.grammar, OTHER)
