"""Many streams while workers are killed, paused and drained and the cache comes and goes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import openai

from support.stack import Stack

SECONDS = float(os.environ.get("HEADRACE_TEST_STORM_S", "30"))
WORKERS = 3
LEASE_MS = 1_000


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 0.0},
    {"temperature": 0.9, "frequency_penalty": 0.7, "logit_bias": {"260": 3}, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 1},
    {
        "temperature": 0.8,
        "extra_body": {"regex": "(wheel|mill|water|[a-z]{3,9}) (turns|runs)[ a-z]{40}"},
    },
    {"temperature": 1.0, "extra_body": {"min_p": 0.05, "repetition_penalty": 1.2}},
]
"""What the streams ask for: everything that an attempt has to take up where another left it."""


async def read(client: openai.AsyncOpenAI, number: int) -> list[str]:
    """The stream's text, or its tokens as their logprobs tell them, once and in order."""
    options = dict(OPTIONS[number])
    extra = options.pop("extra_body", {})
    free = "regex" not in extra
    stream = await client.completions.create(
        model="smollm2",
        prompt=[(number * 53 + k) % 4_000 + 100 for k in range(20 + 16 * number)],
        max_tokens=24 + number if free else 60,
        seed=number,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra | {"ignore_eos": free},
        **options,
    )
    said: list[str] = []
    tokens: list[str] = []
    async for chunk in stream:
        for choice in chunk.choices:
            said.append(choice.text)
            tokens += (choice.logprobs.tokens or []) if choice.logprobs else []
        if chunk.usage is not None and free:
            assert chunk.usage.completion_tokens == 24 + number
            assert len(tokens) in (0, 24 + number)
    return ["".join(said), *tokens]


class Storm:
    """Does one seeded piece of harm after the other; always leaves a worker that can serve."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self._stack = stack
        self._dice = random.Random(seed)
        self.done: list[str] = []

    async def strike(self) -> None:
        names = [name for name in self._stack.processes if name.startswith("w")]
        victim = self._dice.choice(names)
        kind = self._dice.choice(["kill", "pause", "drain", "cache"])
        self.done.append(f"{kind} {victim}")
        if kind == "cache":
            await asyncio.to_thread(self._stack.kill, "cache")
            await asyncio.sleep(self._dice.random())
            self._stack.start_cache()
        elif kind == "pause":
            process = self._stack.processes[victim]
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE_MS / 1000 * self._dice.uniform(0.5, 2.5))
            process.send_signal(signal.SIGCONT)
        else:
            number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
            await asyncio.to_thread(self._stack.kill, victim, number)
            self._stack.start_worker()
        await asyncio.to_thread(self._stack.wait_ready, WORKERS)


async def test_every_stream_is_whole_in_a_storm() -> None:
    """Greedy and sampled text equals the calm one, whatever strikes; nothing is left behind."""
    seed = int(os.environ.get("HEADRACE_TEST_SEED", "1"))
    print(f"seed {seed}")
    with Stack(workers=WORKERS, env={"HEADRACE_LEASE_MS": str(LEASE_MS)}) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        calm = [await read(client, n) for n in range(len(OPTIONS))]
        storm = Storm(stack, seed)
        over = asyncio.Event()

        async def keep_reading(number: int) -> int:
            rounds = 0
            while not over.is_set():
                assert await read(client, number) == calm[number], (number, storm.done)
                rounds += 1
            return rounds

        readers = [asyncio.create_task(keep_reading(n)) for n in range(len(OPTIONS))]
        try:
            async with asyncio.timeout(SECONDS):
                while not any(reader.done() for reader in readers):
                    await storm.strike()
        except TimeoutError:
            pass
        over.set()
        rounds = sum(await asyncio.gather(*readers))
        # a worker that the last strike left paused goes on
        for name, process in stack.processes.items():
            if name.startswith("w"):
                process.send_signal(signal.SIGCONT)
        await stack.wait_idle(limit_s=30)
        await client.close()
    print(f"{rounds} whole streams, {len(storm.done)} strikes: {', '.join(storm.done)}")
