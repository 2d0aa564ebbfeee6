"""Whatever a client sends, it gets an OpenAI error, and the stream beside it does not notice."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import aiohttp
import openai
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.stack import Stack

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"model": "smollm2", "messages": [{"role": "user", "content": "x"}]},
    PATHS[1]: {"model": "smollm2", "prompt": "x"},
    PATHS[2]: {"model": "smollm2", "input": "x"},
}
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
# values that no endpoint accepts in the field they are put into
broken_fields = st.one_of(
    st.tuples(st.just("model"), st.integers() | st.none() | st.just("no such model")),
    st.tuples(st.just("temperature"), st.sampled_from([-1, 3, "warm", [], float("nan")])),
    st.tuples(st.just("top_p"), st.sampled_from([0, -0.5, 1.5, "x", {}])),
    st.tuples(st.just("stream"), st.sampled_from(["maybe", 7, [], {}])),
    st.tuples(st.just("tools"), st.just([{"type": "web_search"}])),
)
content_fields = {
    PATHS[0]: ("messages", st.sampled_from([None, [], "text", [{}], [{"role": "king"}], [5]])),
    PATHS[1]: ("prompt", st.sampled_from([[], {}, [[]], [-1], [10**9], [["a"]], 5, [None]])),
    PATHS[2]: ("input", st.sampled_from([{}, 5, [5], [{"role": "user"}], [{"type": "alien"}]])),
}


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(PATHS))
    kind = draw(st.sampled_from(["bytes", "json", "field", "content", "deep"]))
    if kind == "bytes":
        return path, draw(st.binary(max_size=60)) + b"\xff"
    if kind == "json":
        body = draw(junk.filter(lambda value: not isinstance(value, dict) or "model" not in value))
        return path, json.dumps(body).encode()
    if kind == "deep":
        return path, b'{"model":"smollm2","messages":' + b"[" * 5_000 + b"]" * 5_000 + b"}"
    name, value = draw(broken_fields)
    if kind == "content":
        name, values = content_fields[path]
        value = draw(values)
    return path, json.dumps(GOOD[path] | {name: value}).encode()


async def send(url: str, path: str, body: bytes) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, data=body, headers={"content-type": "application/json"}) as answer,
    ):
        return answer.status, await answer.json()


def check_error(status: int, body: Any) -> None:
    assert 400 <= status < 500, (status, body)
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"], body


async def test_200_malformed_requests_beside_a_running_stream(
    client: openai.AsyncOpenAI, stack: Stack
) -> None:
    """hypothesis makes the bodies; the stream that runs meanwhile stays whole."""

    async def story() -> str:
        stream = await client.completions.create(
            model="smollm2", prompt="Once upon a time", max_tokens=300, temperature=0,
            stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join([chunk.choices[0].text async for chunk in stream])

    expected = await story()
    running = asyncio.create_task(story())
    sent = 0

    @settings(
        max_examples=200, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(malformed())
    def attack(request: tuple[str, bytes]) -> None:
        nonlocal sent
        sent += 1
        check_error(*asyncio.run(send(stack.url, *request)))

    await asyncio.to_thread(attack)
    assert sent >= 200
    assert await running == expected


async def test_errors_that_are_not_about_the_body(stack: Stack) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{stack.url}/v1/nowhere") as answer:
            check_error(answer.status, await answer.json())
            assert answer.status == 404
        async with session.get(f"{stack.url}/v1/completions") as answer:
            check_error(answer.status, await answer.json())
            assert answer.status == 405
        large = io.BytesIO(b"x" * 50_000_000)
        json_type = {"content-type": "application/json"}
        async with session.post(
            f"{stack.url}/v1/completions", data=large, headers=json_type
        ) as answer:
            check_error(answer.status, await answer.json())
            assert answer.status == 413
