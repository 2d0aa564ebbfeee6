"""A worker whose KV pool is smaller than its model's context: requests are held to the pool."""

from __future__ import annotations

import asyncio

import openai
import pytest

from support.stack import Stack


async def test_what_cannot_fit_is_refused_and_what_crowds_it_is_served() -> None:
    """400 with both numbers for the one; the others take turns, preempted if they must be."""
    with Stack(env={"HEADRACE_KV_TOKENS": "512"}) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(model="smollm2", prompt=[7] * 600)
        assert refused.value.code == "context_length_exceeded"
        assert "600" in refused.value.message
        assert "512" in refused.value.message

        async def ask(number: int) -> str:
            answer = await client.completions.create(
                model="smollm2",
                prompt=[(number * 41 + k) % 4_000 + 100 for k in range(100)],
                max_tokens=60,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 60
            return answer.choices[0].text

        alone = [await ask(n) for n in range(2)]
        crowd = await asyncio.gather(*(ask(n) for n in range(8)))
        assert crowd[:2] == alone
        await stack.wait_idle()
        await client.close()
