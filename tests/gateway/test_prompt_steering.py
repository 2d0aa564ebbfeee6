"""What a request says of the cache: where it ends up in its job, and what its answer says."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import CacheMode, Finish, FinishReason, Job
from headrace_gateway.api.caching import BREAKPOINT_TTL_MS, CONTROL_TTL_MS, Caching, ttl_ms
from headrace_gateway.generation import Chunk
from support.api import (
    MODEL,
    Running,
    ScriptedFleet,
    Step,
    encode,
    make_record,
    running_gateway,
    say,
    tiny_tokenizer,
)
from support.tools import HERMES, MISTRAL, speak, tool_record, tool_tokenizer

MINUTE_MS, HOUR_MS = 60_000, 3_600_000


async def job_of(g: Running, path: str, body: dict[str, Any]) -> Job:
    g.fleet.generations.clear()
    status, answer = await g.post(f"/v1/{path}", {"model": MODEL, **body})
    assert status == 200, answer
    return g.fleet.jobs[0]


def kept_text(job: Job) -> str:
    """The part of a job's prompt that is to be kept."""
    tokens = list(job.prompt[: job.cache_until_tokens])
    text: str = tiny_tokenizer().decode(tokens, skip_special_tokens=False)
    return text


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


BREAK = {"prompt_cache_breakpoint": True}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}


async def test_options_travel_in_the_job() -> None:
    """Implicit with a time keeps the whole prompt; explicit without breakpoints keeps nothing."""
    async with running_gateway() as g:
        hi = {"messages": [user(part("Hi"))]}
        for options, wanted in [
            (None, (0, 0, CacheMode.IMPLICIT)),
            ({}, (0, 0, CacheMode.IMPLICIT)),
            ({"ttl": "30m"}, (-1, 30 * MINUTE_MS, CacheMode.IMPLICIT)),
            ({"mode": "explicit"}, (0, 0, CacheMode.EXPLICIT)),
            ({"mode": "explicit", "ttl": "12h"}, (0, 12 * HOUR_MS, CacheMode.EXPLICIT)),
        ]:
            job = await job_of(g, "chat/completions", hi | {"prompt_cache_options": options})
            until = len(job.prompt) if wanted[0] == -1 else wanted[0]
            assert (job.cache_until_tokens, job.cache_ttl_ms, job.cache_mode) == (
                until,
                *wanted[1:],
            )
        job = await job_of(
            g, "completions", {"prompt": "Hello", "prompt_cache_options": {"ttl": "90s"}}
        )
        assert (job.cache_until_tokens, job.cache_ttl_ms) == (len(job.prompt), 90_000)


async def test_a_breakpoint_is_a_place_in_the_rendered_prompt() -> None:
    """Within a message, at its end, in system messages, and as Anthropic writes it."""
    async with running_gateway() as g:
        messages = [
            {"role": "system", "content": [part("Long rules.", **BREAK)]},
            user(part("one", **EPHEMERAL), part("two")),
            {"role": "assistant", "content": "three"},
            user(part("four")),
        ]
        job = await job_of(g, "chat/completions", {"messages": messages})
        text = kept_text(job)
        assert text == ("<|im_start|>system\nLong rules.<|im_end|>\n<|im_start|>user\none")
        assert job.cache_ttl_ms == BREAKPOINT_TTL_MS, "the longest that any asks for"
        job = await job_of(g, "chat/completions", {"messages": messages[1:]})
        assert kept_text(job) == "<|im_start|>user\none"
        assert job.cache_ttl_ms == CONTROL_TTL_MS
        messages[3] = user(part("four", prompt_cache_breakpoint={"ttl": "2h"}))
        job = await job_of(g, "chat/completions", {"messages": messages})
        assert kept_text(job).endswith("<|im_start|>user\nfour")
        assert job.cache_ttl_ms == 2 * HOUR_MS
        plain = await job_of(
            g, "chat/completions", {"messages": [user(part("one", prompt_cache_breakpoint=False))]}
        )
        assert plain.cache_until_tokens == plain.cache_ttl_ms == 0
        await g.settled()


async def test_breakpoints_in_items_and_results() -> None:
    """Calls join the message before them, so that items and messages count differently."""
    items = [
        {"role": "user", "content": "What is it?"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_text", "text": "It is blue.", **BREAK}],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "Sure?"}]},
    ]
    async with running_gateway() as g:
        job = await job_of(g, "responses", {"instructions": "Be brief.", "input": items})
        assert kept_text(job).endswith("It is blue.")
        assert job.cache_ttl_ms == BREAKPOINT_TTL_MS


def tool(name: str, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"It is {name}"}
    return {"type": "function", "function": function, **fields}


@pytest.mark.parametrize("template", [HERMES, MISTRAL], ids=["hermes", "mistral"])
async def test_a_breakpoint_behind_a_tool_keeps_what_the_model_is_told_of_it(
    template: str,
) -> None:
    """Of three tools the second is marked, in whatever place: both are kept, the third is not."""
    fleet = ScriptedFleet(tool_record(template), script=lambda job: speak("Hi"))
    async with running_gateway(fleet) as g:
        for marked in (
            tool("second", **EPHEMERAL),
            tool("second", **BREAK),
            {"type": "function", "function": {
                "name": "second", "description": "It is second", **EPHEMERAL}},
        ):  # fmt: skip
            body = {"model": "tools", "messages": [user(part("Which?"))]}
            body["tools"] = [tool("first"), marked, tool("third")]
            job = await job_of(g, "chat/completions", body)
            kept = tool_text(job)
            assert "It is first" in kept and "It is second" in kept
            assert "third" not in kept
            assert job.cache_ttl_ms in (CONTROL_TTL_MS, BREAKPOINT_TTL_MS)
        body["tools"] = [tool("first"), tool("second", **BREAK)]
        last = await job_of(g, "chat/completions", body)
        assert "It is second" in tool_text(last) and "Which?" not in tool_text(last)
        body["messages"] = [{"role": "user", "content": "Which?", **BREAK}]
        later = await job_of(g, "chat/completions", body)
        assert tool_text(later).endswith("Which?"), "the later breakpoint counts"
        body["tool_choice"] = "none"
        body["messages"] = [user(part("Which?"))]
        told_nothing = await job_of(g, "chat/completions", body)
        assert told_nothing.cache_until_tokens == 0
        flat = {"type": "function", "name": "second", "description": "It is second"}
        asked = {"model": "tools", "input": "Which?", "tools": [flat | EPHEMERAL]}
        job = await job_of(g, "responses", asked)
        assert "It is second" in tool_text(job) and "Which?" not in tool_text(job)


def tool_text(job: Job) -> str:
    """As `kept_text`, of the model that knows tools."""
    tokens = list(job.prompt[: job.cache_until_tokens])
    text: str = tool_tokenizer().decode(tokens, skip_special_tokens=False)
    return text


async def test_whole_messages_and_instructions_are_marked_too() -> None:
    """A text without parts, and instructions that are parts."""
    async with running_gateway() as g:
        messages = [
            {"role": "system", "content": "Long rules.", **EPHEMERAL},
            {"role": "user", "content": "Hi"},
        ]
        job = await job_of(g, "chat/completions", {"messages": messages})
        assert kept_text(job) == "<|im_start|>system\nLong rules."
        assert job.cache_ttl_ms == CONTROL_TTL_MS
        instructions = [
            {"type": "input_text", "text": "Be", **BREAK}, {"type": "input_text", "text": "brief."}
        ]  # fmt: skip
        asked = {"model": MODEL, "instructions": instructions, "input": "Hi"}
        job = await job_of(g, "responses", asked)
        assert kept_text(job) == "<|im_start|>system\nBe"
        _, told = await g.post("/v1/responses", asked)
        assert told["instructions"] == "Be\nbrief."
        items = [{"role": "user", "content": "Hi", **BREAK}, {"role": "user", "content": "there"}]
        job = await job_of(g, "responses", asked | {"input": items})
        assert kept_text(job).endswith("Be\nbrief.<|im_end|>\n<|im_start|>user\nHi")


async def test_tools_and_messages_share_the_breakpoints() -> None:
    """Four in all, however many things are marked."""
    fleet = ScriptedFleet(tool_record(HERMES), script=lambda job: speak("Hi"))
    async with running_gateway(fleet) as g:
        body: dict[str, Any] = {"model": "tools", "tools": [tool("a", **BREAK), tool("b", **BREAK)]}
        body["messages"] = [user(part("x", **BREAK)), {"role": "user", "content": "y", **BREAK}]
        assert (await g.post("/v1/chat/completions", body))[0] == 200
        body["messages"][0]["prompt_cache_breakpoint"] = True
        status, answer = await g.post("/v1/chat/completions", body)
        error: Any = answer["error"]
        assert (status, error["param"]) == (400, "messages[1].content")
        body["tools"] = [tool(name, **BREAK) for name in "abcde"]
        status, answer = await g.post("/v1/chat/completions", body)
        error = answer["error"]
        assert (status, error["param"]) == (400, "tools[4]")


async def test_what_the_cache_services_hold_is_expected_to_be_cached() -> None:
    """It is in the job, for admission and queue: less than the prompt, in whole blocks."""
    async with running_gateway() as g:
        body = {"messages": [user(part("water to a mill " * 20))]}
        assert (await job_of(g, "chat/completions", body)).cached_tokens == 0
        g.fleet.held = 40
        assert (await job_of(g, "chat/completions", body)).cached_tokens == 32
        g.fleet.held = 10_000
        job = await job_of(g, "chat/completions", body)
        assert len(job.prompt) - 17 < job.cached_tokens < len(job.prompt)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


TRIMMING = (
    "{% for m in messages if m['role'] == 'system' %}[{{ m['content'] | trim }}]{% endfor %}"
    "{% for m in messages if m['role'] != 'system' %}<{{ m['content'] | trim | upper }}>"
    "{% endfor %}"
)


MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user"]), TEXTS, TEXTS), min_size=1, max_size=4
)


def test_a_place_is_never_behind_its_breakpoint() -> None:
    """Also where a template trims, moves or rewrites: other text behind it changes no kept text."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        fleet = ScriptedFleet(make_record(chat_template=TRIMMING))
        g = runner.run(stack.enter_async_context(running_gateway(fleet)))

        @given(MESSAGES, st.integers(0, 3))
        @settings(max_examples=60, deadline=None)
        def place(told: list[tuple[str, str, str]], at: int) -> None:
            at %= len(told)
            messages = [
                {"role": role, "content": [part(one, **(BREAK if here == at else {})), part(two)]}
                for here, (role, one, two) in enumerate(told)
            ]
            other = [replace_tail(message, here, at) for here, message in enumerate(messages)]
            job, unlike = (
                runner.run(job_of(g, "chat/completions", {"messages": each}))
                for each in (messages, other)
            )
            whole = replace(unlike, cache_until_tokens=len(unlike.prompt))
            assert job.cache_until_tokens <= len(job.prompt)
            # a character may be cut within: its first bytes are no text
            assert kept_text(whole).startswith(kept_text(job).rstrip("\ufffd"))

        place()
        runner.run(stack.aclose())


def replace_tail(message: dict[str, Any], here: int, at: int) -> dict[str, Any]:
    if here != at:
        return message
    return message | {"content": [message["content"][0], part("another end")]}


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_prewarming_computes_the_prompt_and_says_nothing(path: str, streamed: bool) -> None:
    """One token is sampled, as that is what ends a prompt's computation; nobody is told."""
    token = tiny_tokenizer().token_to_id("<plain ñ>")
    fleet = ScriptedFleet(
        script=lambda job: [Chunk((token,), Finish(FinishReason.LENGTH), 16, cache_write_tokens=32)]
    )
    body: dict[str, Any] = {
        "chat/completions": {"messages": [user(part("Hi"))]},
        "completions": {"prompt": "Hi"},
        "responses": {"input": "Hi"},
    }[path]
    async with running_gateway(fleet) as g:
        asked = {"model": MODEL, "prompt_cache_options": {"prewarm": True, "ttl": "1h"}, **body}
        asked |= {"temperature": 0.7, "stream": streamed}
        async with g.http.post(f"/v1/{path}", json=asked) as answer:
            text = await answer.text()
            assert answer.status == 200, text
        job = fleet.jobs[0]
        assert (job.sampling.max_tokens, job.sampling.temperature) == (1, 0.0)
        assert (job.cache_until_tokens, job.cache_ttl_ms) == (len(job.prompt), HOUR_MS)
        assert "<plain" not in text
        if not streamed:
            status, whole = await g.post(f"/v1/{path}", asked)
            assert status == 200
            usage: Any = whole["usage"]
            details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
            assert usage.get("completion_tokens", usage.get("output_tokens")) == 0
            assert (details["cached_tokens"], details["cache_write_tokens"]) == (16, 32)
            assert said_by(path, whole) == ("", "completed" if path == "responses" else "stop")
        await g.settled()


def said_by(path: str, whole: Any) -> tuple[str, str]:
    """An answer's text, and how it ended."""
    if path == "responses":
        return whole["output"][0]["content"][0]["text"], whole["status"]
    choice = whole["choices"][0]
    text = choice["text"] if path == "completions" else choice["message"]["content"]
    return text, choice["finish_reason"]


async def test_generate_false_prewarms_too() -> None:
    """As on OpenAI's WebSockets."""
    fleet = ScriptedFleet(script=lambda job: say("x", reason=FinishReason.LENGTH))
    async with running_gateway(fleet) as g:
        job = await job_of(g, "responses", {"input": "Hi", "generate": False})
        assert job.sampling.max_tokens == 1
        assert job.cache_until_tokens == len(job.prompt)


@pytest.mark.parametrize("fields", [{"n": 2}, {"logprobs": True}, {"prompt_logprobs": 1}])
async def test_prewarming_has_nothing_to_tell(fields: dict[str, Any]) -> None:
    async with running_gateway() as g:
        body = {"model": MODEL, "messages": [user(part("Hi"))], **fields}
        status, answer = await g.post(
            "/v1/chat/completions", body | {"prompt_cache_options": {"prewarm": True}}
        )
        assert status == 400
        error: Any = answer["error"]
        assert error["param"] == "prompt_cache_options"


async def test_five_breakpoints_are_one_too_many() -> None:
    async with running_gateway() as g:
        messages = [user(part(str(at), **BREAK)) for at in range(4)]
        body = {"model": MODEL, "messages": messages}
        assert (await g.post("/v1/chat/completions", body))[0] == 200
        body["messages"] = [*messages, user(part("a"), part("b", **EPHEMERAL))]
        status, answer = await g.post("/v1/chat/completions", body)
        error: Any = answer["error"]
        assert (status, error["param"]) == (400, "messages[4].content[1]")


async def test_usage_tells_what_was_written() -> None:
    """Of several choices the one that wrote most, as they write the same blocks."""

    def script(job: Job) -> list[Step]:
        written = 48 if job.id.endswith("1") else 16
        return [
            replace(step, cache_write_tokens=written) if isinstance(step, Chunk) else step
            for step in say("Hello")
        ]

    async with running_gateway(ScriptedFleet(script=script)) as g:
        body = {"model": MODEL, "messages": [user(part("Hi"))], "n": 2}
        _, answer = await g.post("/v1/chat/completions", body)
        usage: Any = answer["usage"]
        assert usage["prompt_tokens_details"]["cache_write_tokens"] == 48
        assert usage["completion_tokens"] == 2 * (len(encode("Hello")) + 1)


@pytest.mark.parametrize(
    ("text", "ms"), [("1s", 1_000), ("30m", 1_800_000), ("12h", 43_200_000), ("7d", 604_800_000)]
)
def test_times_are_written_with_their_unit(text: str, ms: int) -> None:
    assert ttl_ms(text) == ms


@given(st.text(max_size=8))
def test_other_texts_are_no_times(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 < ttl_ms(text) <= 604_800_000


def test_a_mark_goes_before_everything_else() -> None:
    assert Caching(CacheMode.EXPLICIT, 5, True, 7).until_tokens(20) == 7
    assert Caching(CacheMode.EXPLICIT, 5, True).until_tokens(20) == 20
    assert Caching(CacheMode.EXPLICIT, 5).until_tokens(20) == 0
