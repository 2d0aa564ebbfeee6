"""A real model's answer is told again from the cache service, and a prompt is computed ahead."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from support.fleet import eventually
from support.stack import Stack

STORY = "Tell me in one sentence what a mill needs water for. " * 12


async def ask(client: openai.AsyncOpenAI, text: str, **options: Any) -> Any:
    return await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": text}],
        max_tokens=12,
        temperature=0,
        **options,
    )


async def test_an_answer_is_told_again_and_a_prompt_is_warm() -> None:
    """The same text, finish and logprobs; a prewarmed prompt's blocks are there for it."""
    with Stack(workers=1, env={"HEADRACE_PROMPT_ENTRIES": "true"}) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        warming = await ask(
            client, STORY, extra_body={"prompt_cache_options": {"prewarm": True, "ttl": "10m"}}
        )
        assert warming.choices[0].message.content == ""
        assert warming.usage.completion_tokens == 0
        first = await ask(client, STORY, logprobs=True, top_logprobs=2)
        assert first.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 32
        assert not hasattr(first, "cached")

        async def told_again() -> Any:
            again = await ask(client, STORY, logprobs=True, top_logprobs=2)
            return again if getattr(again, "cached", False) else None

        # the answer is written beside what the client hears
        await eventually(told_again)
        again = await told_again()
        assert again.choices == first.choices
        assert again.usage.completion_tokens == first.usage.completion_tokens
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
        await asyncio.to_thread(stack.kill, "cache")
        alone = await ask(client, STORY, logprobs=True, top_logprobs=2)
        assert not hasattr(alone, "cached")
        assert alone.choices[0].message == first.choices[0].message
        await client.close()
        await stack.wait_idle()
