"""Malformed requests: always 4xx in OpenAI's shape, and no running stream notices."""

from __future__ import annotations

import asyncio
import json
import math
import re
from contextlib import AsyncExitStack
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.types import Finish, FinishReason, Job
from headrace_gateway.generation import Chunk
from support.api import (
    MODEL,
    Running,
    ScriptedFleet,
    Step,
    encode,
    running_gateway,
    say,
    tiny_tokenizer,
)

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}
PATHS = st.sampled_from(sorted(VALID))

BAD_COMMON: dict[str, list[Any]] = {
    "model": [None, 5, "", "x" * 201, [], {}, "unknown", True, "a\nb"],
    "stream": ["yes", 1, [], {}],
    "temperature": [-0.1, 2.1, "1", [], {}, True, 10**400],
    "top_p": [0, -1, 1.01, "0.5", [1], True],
    "top_k": [-2, 1.5, "3", [], 2**40],
    "min_p": [-0.1, 1.1, "x", True, []],
    "typical_p": [0, -1, 1.1, "x", {}],
    "seed": [2**63, -(2**63) - 1, 1.5, "7", [], False],
    "service_tier": ["gold", 5, "", []],
    "metadata": [
        [], "x", {"a": 1}, {"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "" for i in range(17)},
    ],
    "user": [5, [], "x" * 513],
    "store": ["x", 0],
    "ignore_eos": ["x", 1],
    "stop_token_ids": ["x", [-1], [2**32], [1.5], list(range(65)), [9_999]],
    "stop": ["", [""], ["a"] * 5, "x" * 257, [1], {}, 5],
    "include_stop_str_in_output": ["x", 1, []],
    "min_tokens": [-1, 1.5, "x", 10**6, True],
    "bad_words": ["x", [""], [5], ["a"] * 129, {}],
    "repetition_penalty": [0, -1, 2.1, "x", True],
    "tools": [
        [{"type": "function"}], "x", {}, [5], [None], [[]], [{"type": "web_search"}],
        [{"type": "function", "function": {"name": "a b"}, "name": "a b"}],
        [{"type": "function", "function": {"name": "a", "parameters": []}, "name": 5}],
    ],
    "tool_choice": ["required", "x", 5, {}, {"type": "function"}, {"type": "web_search"}],
    "top_logprobs": [1, "x", -1],
    "presence_penalty": [2.5, "x", True, -2.5],
    "frequency_penalty": [3, [], {}],
    "logit_bias": [{"5": 101}, {"x": 1}, {"9999": 1}, {"5": "x"}, {"-1": 1}, {"05": 1}, [], "x"],
    "background": [True, "x"],
    "regex": [5, [], "[", "a" * 100_000],
    "choice": [[], [""], "x", [5], {}, ["a", "a"]],
    "grammar": [5, [], "", "start: nothing", "x" * 300_000],
    "guided_json": [5, [], "x", "[]", {"type": 5}, {"type": "wizard"}],
    "guided_regex": [5, "("],
    "guided_choice": [[], "x", {"a": 1}],
    "guided_grammar": [5, "start: ("],
    "structured_outputs": [
        5, [], "x", {"json": 5}, {"regex": 5}, {"choice": []}, {"regex": "a", "choice": ["a"]},
        {"json_object": "x"}, {"structural_tag": "x"}, {"whitespace_pattern": " "}, {"regex": "["},
    ],
    "use_beam_search": [True],
    "length_penalty": [2],
    "prompt_cache_key": [5, [], "x" * 513],
    "prompt_cache_options": [
        5, [], "x", {"mode": "x"}, {"mode": 1}, {"ttl": "x"}, {"ttl": "30"}, {"ttl": "0m"},
        {"ttl": "8d"}, {"ttl": 30}, {"ttl": "999999d"}, {"prewarm": "x"}, {"prewarm": 1},
    ],
}  # fmt: skip
BAD_CHOICES: dict[str, list[Any]] = {
    "n": [0, -1, 9, 1.5, "2", True, 10**30],
    "max_tokens": [0, -1, "5", 1.5, 10**9, 2**31, [], True],
    "stream_options": [5, [], {"include_usage": "x"}],
    "prompt_logprobs": [-1, 21, "x", True, 1.5],
    "response_format": [
        "x", 5, {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "structural_tag"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}},
    ],
}  # fmt: skip
BAD_ITEMS: list[Any] = [
    5, {}, True, [], [1], ["x"], [None], [{}], [{"role": "user"}], [{"content": "x"}],
    [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 5}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}],
    [{"role": "user", "content": [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "9"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": 5}]}],
    [{"role": "user", "content": [
        {"type": "text", "text": "x", "prompt_cache_breakpoint": {"ttl": "8d"}}]}],
    [{"role": "user", "content": [
        {"type": "text", "text": "x", "prompt_cache_breakpoint": True}] * 5}],
    [{"role": 5, "content": "x"}], [[{"role": "user", "content": "x"}]],
    [{"role": "tool", "content": "x", "tool_call_id": "a"}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}],
    [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}],
]  # fmt: skip
BAD: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": BAD_COMMON | BAD_CHOICES | {
        "messages": [None, "Hi", *BAD_ITEMS],
        "max_completion_tokens": [0, "x", 10**9],
        "logprobs": [1, 3, "x", []],
        "best_of": [2],
        "echo": [True],
        "modalities": [["audio"], "x"],
        "audio": [{}],
        "functions": [[{"name": "f"}]],
        "reasoning_effort": ["high"],
    },
    "/v1/completions": BAD_COMMON | BAD_CHOICES | {
        "prompt": [
            None, 5, {}, [], [[]], [1, "x"], [-1], [2**32], [10**9], [1.5], ["x", [1]], [[1], "x"],
            ["x"] * 17,
        ],
        "best_of": [0, 21, "x", 1.5, True],
        "echo": [1, "x"],
        "suffix": ["x", 1],
        "logprobs": [-1, 21, "x", True, 1.5],
    },
    "/v1/responses": BAD_COMMON | {
        "input": [None, *BAD_ITEMS, [{"type": "function_call_output", "call_id": "x"}]],
        "instructions": [5, [], {}],
        "max_output_tokens": [0, "x", 10**9],
        "previous_response_id": ["resp_1", 5],
        "conversation": ["c", {}],
        "truncation": ["auto"],
        "text": [
            {"verbosity": "low"}, 5, {"format": {"type": "json_schema"}}, {"format": 5},
            {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wizard"}}},
        ],
        "reasoning": [{"effort": "high"}, "x"],
        "include": ["x", [5], ["x"] * 33],
        "n": [2],
        "response_format": [{"type": "json_object"}],
    },
}  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


NEARLY = st.recursive(
    st.sampled_from(
        [None, True, False, -1, 0, 0.5, 1, 2, 5, 20, 300, "a", "x", "5", "[a-z]+", "start: /a/",
         "object", "string", "text", "json_object", "json_schema", "message.output_text.logprobs",
         "explicit", "implicit", "30m", "ephemeral"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "format", "json_schema", "name", "schema", "strict", "properties", "x",
                 "json", "regex", "choice", "grammar", "json_object", "items", "enum", "5", "300",
                 "mode", "ttl", "prewarm", "text", "cache_control", "prompt_cache_breakpoint"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)  # fmt: skip
"""Values made of what the fields hold when they are right."""


@st.composite
def wrong_field(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid body with one to three fields that cannot be right."""
    path = draw(PATHS)
    body = dict(VALID[path])
    for field in draw(st.lists(st.sampled_from(sorted(BAD[path])), min_size=1, max_size=3)):
        body[field] = draw(st.sampled_from(BAD[path][field]))
    if draw(st.booleans()):
        body.setdefault("stream", True)
    return path, json.dumps(body).encode()


@st.composite
def missing_field(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(PATHS)
    body = dict(VALID[path])
    del body[draw(st.sampled_from(sorted(body)))]
    return path, json.dumps(body).encode()


@st.composite
def broken_bytes(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid body cut short, with a byte that is no UTF-8, or with what JSON does not have."""
    path = draw(PATHS)
    text = json.dumps(VALID[path]).encode()
    extra = st.sampled_from(
        [
            b'"x": NaN', b'"x": -Infinity', b'"x": 1e999', b'"model": "tiny"', b'"x": "\\ud800"',
            b'"x": ' + b"9" * 5_000, b'"x": ' + b"[" * 100 + b"]" * 100, b'"x": "\xff"', b'"x"',
            b'"x": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b'"\\udfff": 1', b'"x": \x00',
        ]
    )  # fmt: skip
    kind = draw(st.sampled_from(["cut", "extra", "raw", "other", "after"]))
    if kind == "cut":
        return path, text[: draw(st.integers(0, len(text) - 1))]
    if kind == "extra":
        return path, text[:-1] + b", " + draw(extra) + b"}"
    if kind == "raw":
        return path, b"\x00" + draw(st.binary(max_size=64))
    if kind == "after":
        return path, text + draw(st.sampled_from([b"{}", b"x", b"\x00", b"]"]))
    value = draw(JSON.filter(lambda value: not isinstance(value, dict)))
    return path, json.dumps(value).encode()


async def attack(g: Running, path: str, body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": kind}
    async with g.http.post(path, data=body, headers=headers) as response:
        assert response.headers["x-request-id"]
        return response.status, await response.json()


def check_refused(status: int, answer: dict[str, Any], what: object) -> None:
    assert 400 <= status < 500, (what, answer)
    assert set(answer) == {"error"}, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}, answer
    assert answer["error"]["message"]
    assert answer["error"]["code"], answer


def check_names(answer: dict[str, Any], fields: set[str], what: object) -> None:
    """The error names one of `fields`, unless what is wrong is no field at all."""
    error = answer["error"]
    if error["code"] != "invalid_json":
        assert error["param"], (what, answer)
        assert re.split(r"[.\[]", error["param"])[0] in fields, (what, answer)


class Bystander:
    """A stream that runs beside the attacks, one token an attack."""

    TOKENS = 600

    def __init__(self) -> None:
        self.tokens = (encode("over the lazy dog again ") * self.TOKENS)[: self.TOKENS]
        self.gates = [asyncio.Event() for _ in self.tokens]
        self.texts: list[str] = []
        self.usage: Any = None

    def script(self, job: Job) -> list[Step]:
        if job.sampling.max_tokens != self.TOKENS:
            return say("x")
        last = len(self.tokens) - 1
        steps: list[Step] = []
        for at, token in enumerate(self.tokens):
            finish = Finish(FinishReason.LENGTH) if at == last else None
            steps += [self.gates[at], Chunk((token,), finish)]
        return steps

    async def read(self, g: Running) -> None:
        stream = await g.openai.completions.create(
            model=MODEL,
            prompt="Hi",
            max_tokens=self.TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            self.usage = chunk.usage
            self.texts += [choice.text for choice in chunk.choices]

    def let_one_through(self) -> None:
        if self.gates:
            self.gates.pop(0).set()


def test_malformed_requests_are_refused_and_disturb_nobody() -> None:
    """More than 200 of each kind of malformed request, while a stream goes on token by token."""
    with asyncio.Runner() as runner:
        bystander = Bystander()
        stack = AsyncExitStack()
        fleet = ScriptedFleet(script=bystander.script)
        g = runner.run(stack.enter_async_context(running_gateway(fleet, body_bytes_max=200_000)))
        reading = runner.get_loop().create_task(bystander.read(g))
        runner.run(fleet.submitted.wait())

        @given(wrong_field() | missing_field() | broken_bytes())
        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        def attack_with(case: tuple[str, bytes]) -> None:
            bystander.let_one_through()
            status, answer = runner.run(attack(g, *case, "application/json"))
            check_refused(status, answer, case)
            if answer["error"]["code"] == "invalid_value":
                check_names(answer, set(json.loads(case[1])), case)

        @given(PATHS, st.sampled_from(["text/plain", "multipart/form-data", "x", "image/png"]))
        @settings(max_examples=20, deadline=None)
        def attack_with_type(path: str, kind: str) -> None:
            bystander.let_one_through()
            check_refused(*runner.run(attack(g, path, b"{}", kind)), kind)

        attack_with()
        attack_with_type()
        assert not reading.done(), "the stream was still running when the last attack came"
        assert len(fleet.generations) == 1, "none of them reached the fleet"
        while bystander.gates:
            bystander.let_one_through()
        runner.run(asyncio.wait_for(reading, 30))
        assert "".join(bystander.texts) == tiny_tokenizer().decode(bystander.tokens)
        assert bystander.usage.completion_tokens == Bystander.TOKENS
        runner.run(g.settled())
        runner.run(stack.aclose())


def test_any_value_in_any_field_is_answered_without_a_bug() -> None:
    """Arbitrary JSON anywhere, also below messages and items: 200 or 4xx, never 5xx."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        g = runner.run(stack.enter_async_context(running_gateway()))
        fields = sorted({field for bad in BAD.values() for field in bad} | {"extra", "messages"})

        changed = st.dictionaries(st.sampled_from(fields), JSON | NEARLY | NEARLY, max_size=3)

        @given(PATHS, changed, JSON)
        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        def attack_with(path: str, changes: dict[str, Any], content: Any) -> None:
            body = VALID[path] | changes
            if path.endswith("chat/completions"):
                body.setdefault("messages", [{"role": "user", "content": content}])
            body.pop("stream", None)
            text = json.dumps(body).encode()
            status, answer = runner.run(attack(g, path, text, "application/json"))
            if status != 200:
                check_refused(status, answer, body)
                check_names(answer, {*changes, "messages"}, body)
            assert not _has_non_finite(body) or status == 400

        attack_with()
        runner.run(g.settled())
        runner.run(stack.aclose())


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL_TALK: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "1"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "F", "parameters": SCHEMA, "strict": True},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "Hi"},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "a", "output": "1"},
        ],
        "tools": [
            {"type": "function", "name": "f", "description": "F", "parameters": SCHEMA},
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": True,
    },
}
SAID = ['<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "Hi", "<tool_call>{"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@st.composite
def nearly_tools(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A conversation with tools, one to three parts of which are anything else, or gone."""
    path = draw(st.sampled_from(sorted(TOOL_TALK)))
    body = json.loads(json.dumps(TOOL_TALK[path]))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(body)))
        if draw(st.integers(0, 3)):
            container[key] = draw(
                JSON | st.sampled_from(["f", "auto", "required", "none", "\ud800"])
            )
        else:
            del container[key]
        if not places(body):
            break
    return path, {"model": MODEL, **body}


def test_tools_of_any_shape_are_answered_without_a_bug() -> None:
    """200 or 4xx, streamed or whole, whatever the model then says."""
    said = iter(SAID * 1_000)
    fleet = ScriptedFleet(script=lambda job: say(next(said)))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        g = runner.run(stack.enter_async_context(running_gateway(fleet)))
        for path, body in TOOL_TALK.items():
            status, answer = runner.run(g.post(path, {"model": MODEL, **body}))
            assert status == 200, answer

        @given(nearly_tools(), st.booleans())
        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        def attack_with(case: tuple[str, dict[str, Any]], stream: bool) -> None:
            path, body = case
            text = json.dumps(body | {"stream": stream}).encode()
            status, answer = runner.run(attack_or_stream(g, path, text))
            if status != 200:
                check_refused(status, answer, body)
            else:
                assert "internal_error" not in json.dumps(answer)

        attack_with()
        runner.run(g.settled())
        runner.run(stack.aclose())


async def attack_or_stream(g: Running, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    async with g.http.post(path, data=body, headers=headers) as response:
        if response.content_type == "text/event-stream":
            return response.status, {"events": await response.text()}
        return response.status, await response.json()


def _has_non_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_non_finite, value.values()))
    if isinstance(value, list):
        return any(map(_has_non_finite, value))
    return isinstance(value, float) and not math.isfinite(value)
