"""Two workers, and the one that streams is killed: the stream goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise

import openai
import pytest

from support.kills import read, streaming_worker
from support.stack import Stack

KILLS = int(os.environ.get("HEADRACE_TEST_KILLS", "10"))


@pytest.mark.timeout(600)  # a slow machine takes half a minute to start each heir
async def test_kill_9_of_the_streaming_worker() -> None:
    """The text is exactly the fault-free one each time, and usage counts each token once."""
    pauses = []
    with Stack(workers=2, env={"HEADRACE_LEASE_MS": "1500"}) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        prompts = [f"Here is story number {n}. Once upon a time" for n in range(KILLS)]
        expected = {p: await read(client, p, []) for p in prompts[:4]}
        for number in range(KILLS):
            prompt = prompts[number % 4]
            times: list[float] = []
            reading = asyncio.create_task(read(client, prompt, times))
            while len(times) < 5 + number % 11:
                await asyncio.sleep(0.005)
            victim = await streaming_worker(stack)
            await asyncio.to_thread(stack.kill, victim)
            stack.start_worker()
            assert await reading == expected[prompt], f"kill {number} of {victim}"
            pauses.append(max(b - a for a, b in pairwise(times)))
            await asyncio.to_thread(stack.wait_ready, 2)
        await stack.wait_idle()
        await client.close()
    pauses.sort()
    print(f"{KILLS} kills, longest pause median {pauses[len(pauses) // 2]:.2f} s, "
          f"maximum {pauses[-1]:.2f} s")  # fmt: skip
