"""A job moves from one worker to another, and one of the two is killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import time

import openai
import pytest

from support.stack import Stack

KILLS = int(os.environ.get("HEADRACE_TEST_KILLS", "2"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "1"))
TOKENS = 24
WORDS = ("the", "mill", "stands", "by", "river", "and", "its", "wheel", "turns", "while", "water")


def a_prompt(number: int) -> str:
    """Some 200 tokens, several steps of the engine."""
    dice = random.Random(number)
    return f"Story {number}. " + " ".join(dice.choice(WORDS) for _ in range(190))


async def read(client: openai.AsyncOpenAI, prompt: str, began: asyncio.Event) -> str:
    stream = await client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    text = ""
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        if text:
            began.set()
        if chunk.usage is not None:
            assert chunk.usage.completion_tokens == TOKENS
    return text


def worker_of(stack: Stack, role: str) -> str:
    [name] = [name for name in stack.processes if name.startswith(role)]
    return name


async def first_token_s(client: openai.AsyncOpenAI, number: int) -> float:
    """How long a prompt takes here, with its move, where nobody is killed."""
    began = asyncio.Event()
    reading = asyncio.create_task(read(client, a_prompt(number), began))
    asked = time.monotonic()
    await began.wait()
    took = time.monotonic() - asked
    await reading
    return took


async def kill(
    stack: Stack, role: str, began: asyncio.Event, usual_s: float, dice: random.Random
) -> str:
    """The worker of prompts while it computes and sends, or the other right after the hand-off."""
    victim = worker_of(stack, role)
    if role == "prefill":
        await asyncio.sleep(dice.uniform(0, usual_s))
    else:
        await began.wait()
        await asyncio.sleep(dice.uniform(0, 0.1))
    await asyncio.to_thread(stack.kill, victim)
    return victim


@pytest.mark.timeout(900)  # a slow machine takes half a minute to start each heir
async def test_kill_9_of_either_side_while_a_job_moves() -> None:
    """The text is exactly the fault-free one, each token once, whoever dies at whatever instant."""
    dice = random.Random(SEED)
    env = {"HEADRACE_LEASE_MS": "1500", "HEADRACE_STEP_TOKENS": "64"}
    with Stack(workers=2, roles=("prefill", "decode"), env=env) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        await first_token_s(client, -1)  # the first one of all takes longer
        usual_s = await first_token_s(client, -2)
        told = []
        for number in range(KILLS):
            role, began = ("prefill", "decode")[number % 2], asyncio.Event()
            reading = asyncio.create_task(read(client, a_prompt(number), began))
            victim = await kill(stack, role, began, usual_s, dice)
            stack.start_worker(role)
            told.append((victim, await reading))
            await asyncio.to_thread(stack.wait_ready, 2)
        for number, (victim, text) in enumerate(told):
            # afterwards, as every worker and cache would know the prompt otherwise
            calm = await read(client, a_prompt(number), asyncio.Event())
            assert text == calm, f"seed {SEED}, kill {number} of {victim}"
        await stack.wait_idle()
        await client.close()
