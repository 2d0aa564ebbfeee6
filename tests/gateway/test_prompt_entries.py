"""Answers that were given before: kept in a real cache service, told again in every form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache_client import CacheClient
from headrace.cache_entries import PutEntry
from headrace.errors import OverloadError, WireError
from headrace.frames import PROMPT
from headrace.policy.hashing import layout_hash
from headrace.types import Band, FinishReason, Job, TokenLogprobs
from headrace_gateway.policy.admission import Admission
from headrace_gateway.prompt_entries import (
    Cost,
    Output,
    PromptEntries,
    decode_output,
    encode_output,
)
from support.api import MODEL, Running, ScriptedFleet, Step, encode, running_gateway, say
from support.cache import cache_service
from support.fleet import eventually

KEYS = (
    "k-red:red prompt_entries=true,k-blue:blue prompt_entries=true,k-off:off,"
    "k-one:one prompt_entries=true sharing_group=g,k-two:two prompt_entries=true sharing_group=g"
)
HI = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HI, "temperature": 0}
TEXT = "Hello, 😀 naïve wörld"


@asynccontextmanager
async def kept(folder: Path, fleet: ScriptedFleet | None = None) -> AsyncIterator[Running]:
    """A gateway with a cache service behind it."""
    async with (
        cache_service(folder) as url,
        running_gateway(fleet, api_keys=KEYS, cache_url=url, cache_timeout_ms=20_000) as g,
    ):
        yield g


async def ask(g: Running, body: dict[str, Any], key: str = "k-red") -> Any:
    status, answer = await g.post("/v1/chat/completions", body, Authorization=f"Bearer {key}")
    assert status == 200, answer
    cache = g.gateway.cache
    assert cache is not None
    assert await cache.flush(20)
    return answer


async def stream(
    g: Running, body: dict[str, Any], path: str = "chat/completions"
) -> list[dict[str, Any]]:
    headers = {"Authorization": "Bearer k-red"}
    async with g.http.post(f"/v1/{path}", json=body | {"stream": True}, headers=headers) as answer:
        assert answer.status == 200
        lines = (await answer.text()).splitlines()
    assert g.gateway.cache is not None
    assert await g.gateway.cache.flush(20)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


VOLATILE = ("id", "created", "usage", "cached")


def same(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in VOLATILE}


async def test_a_greedy_answer_is_told_again_exactly(tmp_path: Path) -> None:
    """Text, finish reason, logprobs and counts; the fleet hears of the first request only."""
    fleet = ScriptedFleet(script=lambda job: say(TEXT, per_chunk=2, cached=16))
    async with kept(tmp_path, fleet) as g:
        for body in (
            CHAT,
            CHAT | {"logprobs": True, "top_logprobs": 3},
            CHAT | {"n": 2, "max_tokens": 70},
            CHAT | {"seed": 5, "temperature": 0.8, "n": 2},
        ):
            fleet.generations.clear()
            first = await ask(g, body)
            jobs = len(fleet.jobs)
            again = await ask(g, body)
            assert len(fleet.jobs) == jobs
            assert "cached" not in first
            assert again["cached"] is True
            assert again["id"] != first["id"]
            assert same(again) == same(first)
            usage, before = again["usage"], first["usage"]
            assert usage["completion_tokens"] == before["completion_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
            assert before["prompt_tokens_details"]["cached_tokens"] == 16
            assert usage["prompt_tokens_details"]["cache_write_tokens"] == 0
        await g.settled()


async def test_streams_tell_the_same_text_at_once(tmp_path: Path) -> None:
    async with kept(tmp_path, ScriptedFleet(script=lambda job: say(TEXT))) as g:
        await ask(g, CHAT)
        chunks = await stream(g, CHAT)
        assert all(chunk["cached"] for chunk in chunks)
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == TEXT
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        # the same prompt as a response and as a completion is the same job, told differently
        events = await stream(g, {"model": MODEL, "input": "Hi", "temperature": 0}, "responses")
        assert [e["type"] for e in events][:2] == ["response.created", "response.in_progress"]
        assert events[-1]["type"] == "response.completed"
        assert events[-1]["response"]["cached"] is True
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == TEXT
        assert len(g.fleet.jobs) == 1
        await g.settled()


async def test_a_stop_string_ends_both_and_belongs_to_the_request(tmp_path: Path) -> None:
    """The first was cut off in the fleet, so that what is kept ends there too."""
    never = asyncio.Event()

    def script(job: Job) -> list[Step]:
        return [*say("one two STOP more", reason=FinishReason.LENGTH)[:-3], never]

    async with kept(tmp_path, ScriptedFleet(script=script)) as g:
        body = CHAT | {"stop": ["STOP"]}
        first, again = await ask(g, body), await ask(g, body)
        assert again["cached"]
        assert same(first) == same(again)
        assert first["choices"][0]["message"]["content"] == "one two "
        assert first["usage"]["completion_tokens"] == again["usage"]["completion_tokens"]
        assert len(g.fleet.jobs) == 1
        assert g.fleet.generations[0].cancelled.is_set()


async def test_nothing_is_shared_that_should_not_be(tmp_path: Path) -> None:
    """Not what is random, nor over tenants outside a group, nor for those that did not opt in."""
    async with kept(tmp_path) as g:
        for key, body, computed in [
            ("k-red", CHAT, 1),
            ("k-red", CHAT, 1),
            ("k-blue", CHAT, 2),
            ("k-off", CHAT, 3),
            ("k-off", CHAT, 4),
            ("k-one", CHAT, 5),
            ("k-two", CHAT, 5),
            ("k-red", CHAT | {"temperature": 0.7}, 6),
            ("k-red", CHAT | {"temperature": 0.7}, 7),
            ("k-red", CHAT | {"max_tokens": 50}, 8),
        ]:
            await ask(g, body, key)
            assert len(g.fleet.jobs) == computed, (key, body)
        metrics = g.gateway.metrics.render().decode()
        assert 'prompt_answers_total{model="tiny",way="entry"} 2.0' in metrics
        await g.settled()


async def test_what_is_kept_is_told_under_overload(tmp_path: Path) -> None:
    """A full queue refuses what would have to be computed, and nothing else."""
    async with kept(tmp_path) as g:
        await ask(g, CHAT)
        g.fleet.admission = Admission(429, "queue_full", "the queue is full", 500)
        g.fleet.refusal = OverloadError("the queue is full", retry_after_ms=500)
        assert (await ask(g, CHAT))["cached"]
        for body in (CHAT | {"max_tokens": 3}, CHAT | {"temperature": 1}):
            status, _ = await g.post("/v1/chat/completions", body, Authorization="Bearer k-red")
            assert status == 429
        await g.settled()
        assert "prompt_saved_seconds_total" in g.gateway.metrics.render().decode()


async def test_what_came_to_no_end_is_not_kept(tmp_path: Path) -> None:
    """A client that left, and a deadline that passed, leave nothing behind."""
    gate = asyncio.Event()

    def script(job: Job) -> list[Step]:
        if job.done_by_ms:
            return say("late", reason=FinishReason.DEADLINE)
        return [*say("Hello")[:-1], gate]

    async with kept(tmp_path, ScriptedFleet(script=script)) as g:
        headers = {"Authorization": "Bearer k-red"}
        async with g.http.post(
            "/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers
        ) as answer:
            await answer.content.readany()
        await g.settled()
        await ask(g, CHAT | {"deadline_ms": 60_000})
        await ask(g, CHAT | {"deadline_ms": 60_000})
        assert len(g.fleet.jobs) == 3


async def test_identical_requests_in_flight_are_one_job(tmp_path: Path) -> None:
    """Each with its own id and usage; the first one's client may leave."""
    gate = asyncio.Event()
    steps = say(TEXT)
    fleet = ScriptedFleet(script=lambda job: [*steps[:2], gate, *steps[2:]])
    async with kept(tmp_path, fleet) as g:
        leader = asyncio.create_task(ask(g, CHAT))
        await fleet.submitted.wait()
        others = [asyncio.create_task(ask(g, CHAT)) for _ in range(3)]
        await eventually(lambda: len(g.gateway.turns) == 4)
        await asyncio.sleep(0.05)
        leader.cancel()
        await eventually(lambda: len(g.gateway.turns) == 3)
        gate.set()
        answers = [await other for other in others]
        assert {a["choices"][0]["message"]["content"] for a in answers} == {TEXT}
        assert len({a["id"] for a in answers}) == 3
        assert all("cached" not in a for a in answers)
        assert {a["usage"]["completion_tokens"] for a in answers} == {len(encode(TEXT)) + 1}
        assert len(fleet.jobs) == 1
        await g.settled()


async def test_without_the_service_requests_are_computed(tmp_path: Path) -> None:
    """Nobody there, or killed between two requests: slower, never an error."""
    url = f"unix://{tmp_path}/nobody"
    async with running_gateway(api_keys=KEYS, cache_url=url) as g:
        for _ in range(3):
            await ask(g, CHAT)
        assert len(g.fleet.jobs) == 3
        await g.settled()


async def test_a_strange_entry_is_a_miss(tmp_path: Path) -> None:
    """Bytes under the right key that are no output of this request are computed over."""
    name = f"fingerprint-of-{MODEL}"
    async with cache_service(tmp_path) as url:
        client = CacheClient(url, timeout_s=20)
        entry = PutEntry(b"k" * 32, b"junk", kind=PROMPT, layout=layout_hash(name, "prompt"))
        assert await client.write([entry])
        facts = {"tenant": "red", "band": Band.STANDARD, "vocab_size": 400}
        entries = PromptEntries(client)
        assert await entries.read(b"k" * 32, fingerprint=name, **facts) is None
        output = Output((1, 2), FinishReason.STOP)
        assert entries.write_soon(b"l" * 32, output, name, Cost("red", Band.STANDARD, 9))
        assert await client.flush(20)
        assert await entries.read(b"l" * 32, fingerprint=name, **facts) == output
        assert await entries.read(b"l" * 32, fingerprint="another model", **facts) is None
        too_long = Output(tuple(range(300_000)), FinishReason.STOP)
        assert not entries.write_soon(b"m" * 32, too_long, name, Cost("red", Band.BATCH, 9))
        assert entries.unwritten == 1
        await client.close()


SCORES = st.builds(
    TokenLogprobs,
    st.floats(-50, 0),
    st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0)), max_size=2).map(tuple),
)


@given(
    st.lists(st.tuples(st.integers(0, 99), SCORES), max_size=6),
    st.booleans(),
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    st.lists(SCORES, max_size=3),
)
def test_outputs_survive_being_kept(
    made: list[tuple[int, TokenLogprobs]],
    scored: bool,
    finish: FinishReason,
    prompt: list[TokenLogprobs],
) -> None:
    key = b"k" * 32
    tokens = tuple(token for token, _ in made)
    output = Output(tokens, finish, tuple(s for _, s in made) if scored else (), tuple(prompt), 7)
    assert decode_output(key, encode_output(key, output), 100) == output
    with pytest.raises(WireError):
        decode_output(b"l" * 32, encode_output(key, output), 100)
    if tokens:
        with pytest.raises(WireError):
            decode_output(key, encode_output(key, output), max(tokens))


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_are_an_output_or_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_output(b"k" * 32, data, 100)
