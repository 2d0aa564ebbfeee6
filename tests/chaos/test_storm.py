"""Many streams while workers are killed, paused and drained and the cache comes and goes."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import openai

from support.stack import Stack

SECONDS = float(os.environ.get("HEADRACE_TEST_STORM_S", "30"))
STREAMS = 6
WORKERS = 3
LEASE_MS = 1_000


async def read(client: openai.AsyncOpenAI, number: int) -> str:
    stream = await client.completions.create(
        model="smollm2",
        prompt=[(number * 53 + k) % 4_000 + 100 for k in range(20 + 16 * number)],
        max_tokens=24 + number,
        temperature=0.0 if number % 2 else 0.8,
        seed=number,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        if chunk.usage is not None:
            assert chunk.usage.completion_tokens == 24 + number
    return text


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
        calm = [await read(client, n) for n in range(STREAMS)]
        storm = Storm(stack, seed)
        over = asyncio.Event()

        async def keep_reading(number: int) -> int:
            rounds = 0
            while not over.is_set():
                assert await read(client, number) == calm[number], (number, storm.done)
                rounds += 1
            return rounds

        readers = [asyncio.create_task(keep_reading(n)) for n in range(STREAMS)]
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
