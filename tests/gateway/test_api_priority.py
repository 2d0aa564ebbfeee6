"""What clients say of urgency, and what their keys may use: fields, headers, refusals, answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from headrace.clock import SystemClock
from headrace.errors import CallerError, OverloadError
from headrace.policy.hashing import block_hashes, root_hash
from headrace.policy.priority import LEVELS_MAX
from headrace.types import BLOCK_KEY_BYTES, EXPECTED_OUTPUT_TOKENS, Band, FinishReason, Job
from headrace_gateway.api.deadlines import (
    DEADLINE_HEADER,
    DEADLINE_MS_MAX,
    Deadline,
    DeadlineParts,
    deadline_of,
)
from headrace_gateway.api.sessions import AFFINITY_BLOCKS, SESSION_HEADER
from headrace_gateway.limits import Limiter
from headrace_gateway.policy.admission import Admission
from headrace_gateway.tenants import salt_of
from support.api import MODEL, Running, ScriptedFleet, make_record, running_gateway, say

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": MODEL, "prompt": "Hi"},
    RESPONSES: {"model": MODEL, "input": "Hi"},
}


async def ask(
    g: Running, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    async with g.http.post(path, json=BODIES[path] | fields, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def job_of(
    g: Running, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any
) -> Job:
    status, answer, _ = await ask(g, path, headers, **fields)
    assert status == 200, answer
    return g.fleet.jobs[-1]


def deadlines(job: Job) -> tuple[int, int]:
    """Both in milliseconds after the arrival; 0 is none."""
    return tuple(by and by - job.arrived_ms for by in (job.ttft_by_ms, job.done_by_ms))  # type: ignore[return-value]  # two of them


@pytest.mark.parametrize("path", BODIES)
async def test_urgency_reaches_the_job(path: str) -> None:
    """The same fields at every endpoint; the header counts where the body says nothing."""
    header = {DEADLINE_HEADER: "ttft=500, total=2000"}
    async with running_gateway() as g:
        plain = await job_of(g, path)
        assert (plain.priority, plain.weight, deadlines(plain)) == (0, 1, (0, 0))
        urgent = await job_of(g, path, priority=-3, deadline_ms=1_500, service_tier="priority")
        assert (urgent.priority, urgent.band) == (-3, Band.INTERACTIVE)
        assert deadlines(urgent) == (0, 1_500)
        both = await job_of(g, path, deadline_ms={"ttft": 250, "total": 9_000})
        assert deadlines(both) == (250, 9_000)
        assert deadlines(await job_of(g, path, header)) == (500, 2_000)
        assert deadlines(await job_of(g, path, {DEADLINE_HEADER: "700"})) == (0, 700)
        assert deadlines(await job_of(g, path, header, deadline_ms={"ttft": 9})) == (9, 0)
        now_ms = SystemClock().wall_ms()
        assert all(now_ms - 60_000 < job.arrived_ms <= now_ms for job in g.fleet.jobs)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("priority", value) for value in (1.5, "1", True, LEVELS_MAX + 1, -LEVELS_MAX - 1, [])],
        *[("deadline_ms", value) for value in (0, -1, 1.5, "5", True, {}, [], DEADLINE_MS_MAX + 1)],
        *[("deadline_ms", {"ttft": value}) for value in (0, "5", True, DEADLINE_MS_MAX + 1)],
        ("deadline_ms", {"tftt": 5}),
        ("deadline_ms", {"ttft": None}),
        ("deadline_ms", {"ttft": 5, "end": 5}),
        ("prompt_cache_key", 5),
        ("prompt_cache_key", "x" * 513),
    ],
)
async def test_what_cannot_be_understood_names_its_field(
    path: str, field: str, value: object
) -> None:
    async with running_gateway() as g:
        status, answer, _ = await ask(g, path, **{field: value})
        assert status == 400, answer
        assert answer["error"]["param"].startswith(field)
        assert not g.fleet.jobs


@pytest.mark.parametrize(
    "text", ["0", "x", "1.5", "-5", "ttft", "ttft=5;total=6", "1,2", "ttft=1,"]
)
async def test_a_header_that_cannot_be_understood_is_refused(text: str) -> None:
    async with running_gateway() as g:
        status, answer, _ = await ask(g, CHAT, {DEADLINE_HEADER: text})
        assert (status, answer["error"]["param"]) == (400, DEADLINE_HEADER)
        assert answer["error"]["code"] == "invalid_value"
        status, answer, _ = await ask(g, CHAT, {SESSION_HEADER: "x" * 513})
        assert (status, answer["error"]["param"]) == (400, SESSION_HEADER)


PART = st.tuples(
    st.sampled_from(["", "ttft=", "total=", "ttft = ", " total=", "TTFT=", "x=", "=", "٣"]),
    st.integers(-1, 10**10).map(str) | st.sampled_from(["", " ", "5 5", "１", "1e3", "0x5"]),
).map("".join)


@given(st.lists(PART, max_size=4).map(",".join) | st.text(max_size=20))
def test_any_header_is_a_deadline_or_refused(text: str) -> None:
    """What is taken is in bounds and says exactly what was written."""
    try:
        made = deadline_of(None, text)
    except CallerError as error:
        assert (error.status, error.param) == (400, DEADLINE_HEADER)
        return
    values = [value for value in (made.ttft_ms, made.total_ms) if value]
    assert all(1 <= value <= DEADLINE_MS_MAX for value in values)
    assert sorted(values) == sorted(int(each) for each in re.findall("[0-9]+", text))
    assert bool(text) == bool(values)
    assert bool(made.ttft_ms) == ("ttft" in text)


def test_the_body_goes_before_the_header() -> None:
    assert deadline_of(5, "nonsense") == Deadline(total_ms=5)
    assert deadline_of(DeadlineParts(ttft=5), "9") == Deadline(ttft_ms=5)
    assert Deadline(5, 0).instants(1_000) == (1_005, 0)


async def test_a_websocket_turn_has_the_same_fields() -> None:
    """A header of the connection counts for each of its turns."""
    async with (
        running_gateway() as g,
        g.http.ws_connect(RESPONSES, headers={DEADLINE_HEADER: "800"}) as socket,
    ):
        for fields in ({}, {"deadline_ms": 400, "priority": 7}, {"priority": "x"}):
            await socket.send_json({"type": "response.create"} | BODIES[RESPONSES] | fields)
            while (event := await socket.receive_json())["type"] not in (
                "response.completed",
                "error",
            ):
                pass
        assert (event["type"], event["error"]["param"]) == ("error", "priority")
        first, second = g.fleet.jobs
        assert (deadlines(first), first.priority) == ((0, 800), 0)
        assert (deadlines(second), second.priority) == ((0, 400), 7)


async def test_refused_before_the_prompt_is_read() -> None:
    """Under overload a refusal costs no tokenizing, whatever the prompt."""
    fleet = ScriptedFleet()
    fleet.admission = Admission(429, "queue_full", "the queue is full for standard", 1_234)
    async with running_gateway(fleet) as g:

        async def no_tokenizer(_: object) -> None:
            raise AssertionError("nobody needs it")

        g.gateway.tokenizers.get = no_tokenizer  # type: ignore[assignment,method-assign]
        for path in BODIES:
            status, answer, headers = await ask(g, path, deadline_ms=700)
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert answer["error"]["type"] == "rate_limit_error"
            assert (headers["retry-after-ms"], headers["retry-after"]) == ("1234", "2")
            assert fleet.asks[-1].band is Band.STANDARD
            assert 0 < fleet.asks[-1].done_by_ms - fleet.asks[-1].now_ms <= 700
        fleet.admission = Admission(429, "deadline_unreachable", "too late", 0)
        status, answer, headers = await ask(g, service_tier="flex")
        assert (status, answer["error"]["code"]) == (429, "deadline_unreachable")
        assert headers["x-should-retry"] == "false"
        assert "retry-after-ms" not in headers
        text = g.gateway.metrics.render().decode()
        assert 'refusals_total{band="standard",code="queue_full"} 3.0' in text
        assert 'refusals_total{band="batch",code="deadline_unreachable"} 1.0' in text


async def test_a_job_names_its_blocks_and_its_session() -> None:
    """Sessions keep requests together whatever they say, and apart from other tenants'."""
    long = list(range(5, 300)) * 2
    async with running_gateway(api_keys="k1:red,k2:blue", api_key="k1") as g:
        red = {"Authorization": "Bearer k1"}
        job = await job_of(g, COMPLETIONS, red, prompt=long)
        salt = salt_of("red")
        hashes = block_hashes(root_hash("fingerprint-of-tiny", salt), long)
        assert job.blocks == b"".join(each[:BLOCK_KEY_BYTES] for each in hashes)
        assert job.affinity == hashes[AFFINITY_BLOCKS - 1]
        keyed = await job_of(g, COMPLETIONS, red, prompt=long, prompt_cache_key="s")
        assert (keyed.blocks, keyed.affinity != job.affinity) == (job.blocks, True)
        same = [
            await job_of(g, CHAT, red, prompt_cache_key="s"),
            await job_of(g, RESPONSES, red | {SESSION_HEADER: "s"}),
            await job_of(g, COMPLETIONS, red | {SESSION_HEADER: "x"}, prompt_cache_key="s"),
        ]
        assert {each.affinity for each in same} == {keyed.affinity}
        blue = {"Authorization": "Bearer k2", SESSION_HEADER: "s"}
        assert (await job_of(g, CHAT, blue)).affinity != keyed.affinity


async def test_lengths_and_cache_hits_are_learned_from_what_ended_by_itself() -> None:
    """Ten short answers, part of their prompts cached: the next job is expected to be like them."""
    fleet = ScriptedFleet(script=lambda job: say("Hello, world!", cached=8))
    async with running_gateway(fleet) as g:
        prompt = [5] * 40
        first = await job_of(g, COMPLETIONS, prompt=prompt, max_tokens=900)
        assert first.expected_tokens == EXPECTED_OUTPUT_TOKENS
        assert first.cached_tokens == 0
        for _ in range(9):
            await job_of(g, COMPLETIONS, prompt=prompt[:20], max_tokens=900)
        learned = await job_of(g, COMPLETIONS, prompt=prompt, max_tokens=900)
        assert learned.expected_tokens == len(say("Hello, world!")) == learned.expected_output
        assert learned.cached_tokens == 0, "80 of 220 tokens are less than a block of 40"
        assert (await job_of(g, COMPLETIONS, prompt=[5] * 100, max_tokens=9)).cached_tokens == 32
        exact = await job_of(g, COMPLETIONS, prompt=prompt, max_tokens=900, ignore_eos=True)
        assert exact.expected_tokens == 900
        least = await job_of(g, COMPLETIONS, prompt=prompt, max_tokens=900, min_tokens=600)
        assert least.expected_tokens == 600
        fleet.script = lambda job: say("Hi", reason=FinishReason.CANCELLED)
        before = fleet.lengths(MODEL).hit_ratio("default")
        status, _, _ = await ask(g, COMPLETIONS, prompt=prompt)
        assert status >= 400
        assert fleet.lengths(MODEL).hit_ratio("default") == before
        fleet.lengths(MODEL).check_integrity()


@asynccontextmanager
async def limited(redis: Redis, entry: str, fleet: ScriptedFleet) -> AsyncIterator[Running]:
    """A gateway with one key `k` that has limits."""
    fleet.limiter = Limiter(redis, SystemClock())
    async with running_gateway(fleet, api_keys=f"k:t weight=3 {entry}") as g:
        g.http.headers["Authorization"] = "Bearer k"
        yield g
        await fleet.limiter.close()


async def test_a_keys_limits_are_told_with_every_answer(redis: Redis) -> None:
    """From the first answer on, also where nothing was taken; the weight reaches the job."""
    limits = "requests_per_minute=2 tokens_per_minute=10000"
    async with limited(redis, limits, ScriptedFleet()) as g:
        async with g.http.get("/v1/models") as response:
            assert response.headers["x-ratelimit-remaining-requests"] == "2"
        status, answer, headers = await ask(g, max_tokens=50)
        assert status == 200
        assert g.fleet.jobs[0].weight == 3
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "1"
        used = 10_000 - int(headers["x-ratelimit-remaining-tokens"])
        assert used <= answer["usage"]["total_tokens"], "what was used, not what was expected"
        assert headers["x-ratelimit-reset-requests"].endswith("s")
        async with g.http.post(CHAT, json=BODIES[CHAT] | {"stream": True}) as response:
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            await response.read()
        status, answer, headers = await ask(g)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 20_000 < int(headers["retry-after-ms"]) <= 30_000
        assert headers["x-ratelimit-remaining-requests"] == "0"
        status, answer, headers = await ask(g, temperature=9)
        assert status == 400, "what cannot be served is told first"
        assert headers["x-ratelimit-limit-tokens"] == "10000"
        assert len(g.fleet.jobs) == 2


async def test_one_request_after_the_other_is_never_refused_for_the_last(redis: Redis) -> None:
    """With a concurrency of 1: at the end of a stream its place is free already."""
    async with limited(redis, "concurrency=1", ScriptedFleet()) as g:
        for stream in (True, False) * 5:
            for path in BODIES:
                body = BODIES[path] | {"stream": stream}
                async with g.http.post(path, json=body) as response:
                    assert response.status == 200, await response.text()
                    async for line in response.content:
                        if line in (b"data: [DONE]\n", b"event: response.completed\n"):
                            break


async def test_requests_at_once_are_bounded_until_their_clients_leave(redis: Redis) -> None:
    gate = asyncio.Event()
    fleet = ScriptedFleet(script=lambda job: [gate, *say("Hi")])
    async with limited(redis, "concurrency=2", fleet) as g:
        running = [asyncio.create_task(ask(g)) for _ in range(2)]
        while len(fleet.jobs) < 2:
            await asyncio.sleep(0.01)
        status, answer, headers = await ask(g)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["retry-after-ms"]) > 0
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        async with asyncio.timeout(10):
            while g.gateway.counts()["active_turns"] > 1:
                await asyncio.sleep(0.01)
        await fleet.limiter.close()
        running[0] = asyncio.create_task(ask(g))
        while len(fleet.jobs) < 3:
            await asyncio.sleep(0.01)
        gate.set()
        assert [status for status, *_ in await asyncio.gather(*running)] == [200, 200]


async def test_what_was_not_accepted_is_given_back(redis: Redis) -> None:
    """The fleet had no room after all: the key has lost nothing."""
    fleet = ScriptedFleet()
    fleet.refusal = OverloadError("full", retry_after_ms=500)
    limits = "requests_per_minute=1 tokens_per_minute=1000 concurrency=1"
    async with limited(redis, limits, fleet) as g:
        assert (await ask(g, max_tokens=500))[0] == 429
        await g.settled()
        await fleet.limiter.close()
        fleet.refusal = None
        assert (await ask(g, max_tokens=500))[0] == 200
        status, answer, _ = await ask(g)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        with pytest.raises(OverloadError):
            fleet.limiter.check(g.gateway.tenants.identify("Bearer k").limits)  # type: ignore[arg-type]  # it has some


async def test_keys_without_limits_ask_redis_nothing() -> None:
    """The scripted fleet's limiter has no Redis: any call would be a 503."""
    async with running_gateway(api_keys="k:t weight=2", api_key="k") as g:
        status, _, headers = await ask(g, headers={"Authorization": "Bearer k"})
        assert status == 200
        assert not [name for name in headers if name.lower().startswith("x-ratelimit")]
        assert g.fleet.jobs[0].weight == 2
    async with running_gateway(api_keys="k:t concurrency=2", api_key="k") as g:
        status, answer, _ = await ask(g, headers={"Authorization": "Bearer k"})
        assert (status, answer["error"]["type"]) == (503, "service_unavailable_error")
        assert not g.fleet.jobs


async def test_a_long_prompt_is_named_without_holding_up_others() -> None:
    """Hashed in a thread, with the same names as inline."""
    async with running_gateway(ScriptedFleet(make_record(context_tokens=20_000))) as g:
        prompt = [5] * 16_000
        body = json.dumps(BODIES[COMPLETIONS] | {"prompt": prompt}).encode()
        headers = {"Content-Type": "application/json"}
        async with g.http.post(COMPLETIONS, data=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        root = root_hash("fingerprint-of-tiny", g.fleet.jobs[0].salt)
        hashes = block_hashes(root, prompt)
        assert g.fleet.jobs[0].blocks == b"".join(each[:BLOCK_KEY_BYTES] for each in hashes)
