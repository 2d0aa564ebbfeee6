"""What clients and operators are told: errors' shape, limits by name, health, shutting down."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from headrace.errors import CallerError
from headrace.policy.hashing import block_hashes, root_hash
from headrace.types import BLOCK_TOKENS, Band
from headrace_gateway.api.bodies import parse_object
from headrace_gateway.tenants import salt_of
from support.api import MODEL, Running, ScriptedFleet, encode, make_record, running_gateway, say

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HI, **fields}


async def error_of(g: Running, body: object, path: str = CHAT) -> tuple[int, dict[str, Any]]:
    status, answer = await g.post(path, body)
    error = answer["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    return status, error


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": HI}, "model", "missing_required_parameter"),
        ({"model": MODEL}, "messages", "missing_required_parameter"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "invalid_value"),
        (
            chat(messages=[*HI, {"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[1].content[0].type",
            "invalid_value",
        ),
        (
            chat(messages=[{"role": "user"}]),
            "messages[0].content",
            "missing_required_parameter",
        ),
        (
            chat(messages=[*HI, {"role": "assistant", "content": "", "tool_calls": [{}]}]),
            "messages[1].tool_calls[0].id",
            "missing_required_parameter",
        ),
        (chat(stop=["a", ""]), "stop[1]", "invalid_value"),
        (chat(n=9), "n", "invalid_value"),
        (chat(temperature=2.5), "temperature", "invalid_value"),
        (chat(metadata={"a": 1}), "metadata.a", "invalid_value"),
        (chat(tools=[{"type": "web_search"}]), "tools[0].type", "unsupported_parameter"),
        (chat(best_of=2), "best_of", "unsupported_parameter"),
        (chat(length_penalty=1.5), "length_penalty", "unsupported_parameter"),
        (chat(model="other"), "model", "model_not_found"),
        (chat(max_tokens=1_999), "max_tokens", "context_length_exceeded"),
        (
            chat(max_tokens=1, max_completion_tokens=1_999),
            "max_completion_tokens",
            "context_length_exceeded",
        ),
    ],
)
async def test_an_error_names_the_field(body: dict[str, Any], param: str, code: str) -> None:
    async with running_gateway() as g:
        status, error = await error_of(g, body)
        assert status == (404 if code == "model_not_found" else 400)
        assert (error["param"], error["code"]) == (param, code)
        assert error["type"] == "invalid_request_error"
        assert not g.fleet.jobs


async def test_neutral_values_of_unsupported_options_are_accepted() -> None:
    """Clients send defaults; only what would change the output is refused."""
    neutral = chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False,
        top_logprobs=0, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1,
        use_beam_search=False, length_penalty=1, skip_special_tokens=True, echo=False,
        modalities=["text"], audio=None,
        n=1, stop=[], seed=None, user="u", metadata={}, store=True, parallel_tool_calls=True,
        stream=False, service_tier="auto", prompt_cache_key="k", something_new={"a": 1},
        format="json", sampling=5, stops=[1], asked_tokens=0, alternatives="x",
    )  # fmt: skip
    async with running_gateway() as g:
        status, answer = await g.post(CHAT, neutral)
        assert status == 200, answer


async def test_context_errors_carry_both_numbers() -> None:
    async with running_gateway(ScriptedFleet(make_record(context_tokens=50))) as g:
        body = {"model": MODEL, "prompt": [5] * 60}
        _, error = await error_of(g, body, "/v1/completions")
        assert "50 tokens" in error["message"]
        assert "60 tokens" in error["message"]
        assert error["param"] == "prompt"
        assert (await g.post("/v1/completions", {"model": MODEL, "prompt": [5] * 40}))[0] == 200
        assert g.fleet.jobs[0].sampling.max_tokens == 10, "16 by default, but only 10 fit"
        status, _ = await g.post("/v1/responses", {"model": MODEL, "input": "Hi"})
        assert status == 200
        job = g.fleet.jobs[1]
        assert job.sampling.max_tokens == 50 - len(job.prompt), "what fits"
        _, error = await error_of(g, {"model": MODEL, "prompt": ""}, "/v1/completions")
        assert error["message"] == "the prompt has no tokens"
        _, error = await error_of(g, {"model": MODEL, "prompt": [9_999]}, "/v1/completions")
        assert "9999" in error["message"]


async def test_a_model_without_a_template_still_completes() -> None:
    async with running_gateway(ScriptedFleet(make_record(chat_template=""))) as g:
        status, error = await error_of(g, chat())
        assert (status, error["code"]) == (400, "no_chat_template")
        assert (await g.post("/v1/completions", {"model": MODEL, "prompt": "Hi"}))[0] == 200


async def test_unknown_places_methods_and_sizes() -> None:
    async with running_gateway(body_bytes_max=5_000) as g:
        status, error = await error_of(g, {}, "/v1/nothing")
        assert (status, error["code"]) == (404, "unknown_url")
        async with g.http.get(CHAT) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        status, error = await error_of(g, chat(user="x" * 6_000))
        assert (status, error["code"]) == (413, "body_too_large")
        bomb = gzip.compress(json.dumps(chat(user="x" * 100_000)).encode())
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        async with g.http.post(CHAT, data=bomb, headers=headers) as response:
            assert response.status == 413
        async with g.http.post(CHAT, data=b"\x01\x02", headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"]


async def test_a_bug_is_a_500_that_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The client gets the shape and the request id, the log gets the traceback."""
    bug = ScriptedFleet(script=lambda job: [RuntimeError("the secret detail")])
    async with running_gateway(bug) as g:
        for body in (chat(), chat(stream=True)):
            async with g.http.post(CHAT, json=body, headers={"x-request-id": "mine-1"}) as response:
                text = await response.text()
                assert response.headers["x-request-id"] == "mine-1"
            assert "secret" not in text
            assert '"internal_error"' in text
        await g.settled()
    assert "the secret detail" in capsys.readouterr().out


async def test_keys_guard_the_api_and_nothing_else() -> None:
    async with running_gateway(api_keys="k1:red,k2:blue:batch", api_key="k2") as g:
        status, error = await error_of(g, chat())
        assert (status, error["type"], error["code"]) == (
            401,
            "authentication_error",
            "missing_api_key",
        )
        assert (await g.post(CHAT, chat(), Authorization="Bearer nope"))[0] == 401
        for path in ("/live", "/ready", "/health", "/metrics"):
            async with g.http.get(path) as response:
                assert response.status == 200
        answer = await g.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], service_tier="priority"
        )
        job = g.fleet.jobs[0]
        assert (job.tenant, job.salt) == ("blue", salt_of("blue"))
        assert job.band is Band.BATCH
        assert answer.service_tier == "flex", "the tier that was used, not the one asked for"


async def test_jobs_say_who_where_and_what() -> None:
    """Affinity is the last of the first 16 block hashes, under the tenant's salt."""
    async with running_gateway() as g:
        prompt = (encode("hello world ") * 200)[: 20 * BLOCK_TOKENS]
        for tokens in (prompt, prompt[:20], prompt[:5], [*prompt[:5], 9]):
            await g.post("/v1/completions", {"model": MODEL, "prompt": tokens, "max_tokens": 1})
        salt = salt_of("default")
        hashes = block_hashes(root_hash("fingerprint-of-tiny", salt), prompt)
        long, one_block, short, other = [job.affinity for job in g.fleet.jobs]
        assert long == hashes[15]
        assert one_block == hashes[0]
        assert len({long, one_block, short, other}) == 4
        job = g.fleet.jobs[0]
        assert (job.gateway, job.model, job.attempt) == ("gw-test", MODEL, 1)
        seeds = {job.sampling.seed for job in g.fleet.jobs}
        assert len(seeds) == 4, "a seed is drawn for each request without one"


async def test_too_many_choices_and_prompts_are_named() -> None:
    async with running_gateway(prompts_max=3, jobs_max=4) as g:
        body = {"model": MODEL, "prompt": ["a"] * 4}
        assert (await error_of(g, body, "/v1/completions"))[1]["code"] == "too_many_prompts"
        body = {"model": MODEL, "prompt": ["a"] * 3, "n": 2}
        assert (await error_of(g, body, "/v1/completions"))[1]["code"] == "too_many_choices"


async def test_operators_see_state_and_figures() -> None:
    async with running_gateway() as g:
        await g.post(CHAT, chat())
        await g.post(CHAT, chat(n=99))
        await g.settled()
        async with g.http.get("/health") as response:
            health = await response.json()
        assert health["status"] == "healthy"
        assert health["models"][MODEL]["context_tokens"] == 2_000
        assert set(health["counts"].values()) == {0}
        async with g.http.get("/metrics") as response:
            text = await response.text()
        assert 'requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
        tokens = len(encode("Hello, world!")) + 1
        assert f'tokens_total{{kind="completion",model="tiny"}} {tokens}.0' in text
        assert 'time_to_first_token_seconds_count{band="standard",model="tiny"} 1.0' in text
        assert "headrace_gateway_live_generations 0.0" in text
        g.fleet.reason = "no worker is ready"
        for path in ("/ready", "/health"):
            async with g.http.get(path) as response:
                assert response.status == 503
                assert (await response.json())["reason"] == "no worker is ready"


async def test_a_draining_gateway_finishes_what_runs_and_takes_nothing_new() -> None:
    """SIGTERM's half of the work: unready, 503 for new requests, the open stream ends whole."""
    gate = asyncio.Event()
    async with running_gateway(ScriptedFleet(script=lambda job: [gate, *say("to the end")])) as g:
        stream = await g.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)  # type: ignore[arg-type]
        async with g.http.ws_connect("/v1/responses") as socket:
            drain = asyncio.create_task(g.gateway.drain())
            await asyncio.sleep(0)
            status, error = await error_of(g, chat())
            assert (status, error["code"]) == (503, "draining")
            await socket.send_json({"type": "response.create", "model": MODEL, "input": "Hi"})
            frame = await socket.receive_json(timeout=5)
            assert (frame["status"], frame["error"]["code"]) == (503, "draining")
            async with g.http.get("/ready") as response:
                assert response.status == 503
            async with g.http.get("/live") as response:
                assert response.status == 200
            gate.set()
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == "to the end"
            assert await asyncio.wait_for(drain, 5)


async def test_a_drain_that_takes_too_long_is_cut_off() -> None:
    async with running_gateway(
        ScriptedFleet(script=lambda job: [asyncio.Event()]), drain_ms=20
    ) as g:
        await g.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)  # type: ignore[arg-type]
        assert not await g.gateway.drain()
    assert g.fleet.generations[0].cancelled.is_set()


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async with running_gateway(body_read_ms=100) as g:
        host, port = g.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -1e400}', "out of range"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "deeper than 64"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "deeper than 64"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[]", "expected an object, got an array"),
        (b"", "Expecting value"),
    ],
)
def test_json_is_taken_strictly(body: bytes, said: str) -> None:
    with pytest.raises(CallerError, match=said) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_json_at_its_limits_is_taken() -> None:
    deep = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_object(deep)
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
