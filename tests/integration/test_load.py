"""Many streams at once: exact usage, and nothing left behind."""

from __future__ import annotations

import asyncio

import openai

from support.stack import Stack

STREAMS = 32


async def one_stream(client: openai.AsyncOpenAI, number: int) -> tuple[str, int, int, str]:
    """Text, prompt tokens, completion tokens and finish reason of one streamed request."""
    stream = await client.completions.create(
        model="smollm2",
        prompt=[(number * 37 + k) % 4_000 + 100 for k in range(20 + 9 * number)],
        max_tokens=10 + number % 7,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, reason, usage = "", "", None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    assert usage is not None, "include_usage was asked for"
    return text, usage.prompt_tokens, usage.completion_tokens, reason


async def test_32_streams_have_exact_usage_and_leave_nothing(
    client: openai.AsyncOpenAI, stack: Stack
) -> None:
    results = await asyncio.gather(*(one_stream(client, n) for n in range(STREAMS)))
    for number, (_, prompt_tokens, completion_tokens, reason) in enumerate(results):
        assert prompt_tokens == 20 + 9 * number
        assert completion_tokens == 10 + number % 7
        assert reason == "length"
    await stack.wait_idle()
    statuses = await stack.statuses()
    assert {s.free_tokens for s in statuses.values()} == {16_384}, "every block is free again"
    counts = stack.get("/health")[1]["counts"]
    assert set(counts.values()) == {0}, counts


async def test_greedy_text_is_the_same_alone_and_in_a_crowd(client: openai.AsyncOpenAI) -> None:
    """Batch composition, chunking and the caches change how it is computed, not what comes out."""
    alone = [await one_stream(client, n) for n in (0, 5, 11)]
    crowd = await asyncio.gather(*(one_stream(client, n) for n in range(16)))
    assert [crowd[n][0] for n in (0, 5, 11)] == [text for text, *_ in alone]
