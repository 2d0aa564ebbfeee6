"""What tests that kill a worker under a stream share: the stream, and whom it comes from."""

from __future__ import annotations

import asyncio
import time

import openai

from support.stack import Stack

TOKENS = 60


async def read(client: openai.AsyncOpenAI, prompt: str, times: list[float]) -> str:
    stream = await client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    text = ""
    async for chunk in stream:
        times.append(time.monotonic())
        text += "".join(choice.text for choice in chunk.choices)
        if chunk.usage is not None:
            assert chunk.usage.completion_tokens == TOKENS
    return text


async def streaming_worker(stack: Stack) -> str:
    async with asyncio.timeout(30):
        while True:
            for name, status in (await stack.statuses()).items():
                if status.running and name in stack.processes:
                    return name
            await asyncio.sleep(0.02)
