"""Workers of two ranks, and any rank of the one that streams is killed or stopped.

The worker fails as a whole, its job moves on, the stream goes on as if nothing had been, and no
process is left behind. Seeded; HEADRACE_TEST_KILLS asks for more of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from itertools import pairwise
from pathlib import Path

import openai
import pytest

from support.kills import read, streaming_worker
from support.stack import Stack

pytestmark = pytest.mark.skipif(
    "HEADRACE_TEST_RANKS" not in os.environ,
    reason="some minutes of two cores: HEADRACE_TEST_RANKS=1 asks for them",
)

KILLS = int(os.environ.get("HEADRACE_TEST_KILLS", "3"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "7"))
SHAPES = (
    {"HEADRACE_TENSOR_PARALLEL": "2"},
    {"HEADRACE_PIPELINE_PARALLEL": "2"},
    {"HEADRACE_TENSOR_PARALLEL": "2", "HEADRACE_RANK_LINKS": "torch"},
)


def ranks_of(pid: int) -> list[int]:
    """The worker's processes, rank 0 first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def is_gone(pid: int) -> bool:
    """Whether no such process runs; one that nobody has waited for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.timeout(900)  # a slow machine takes half a minute to start each heir
async def test_kill_9_of_any_rank() -> None:
    """The text is exactly the fault-free one each time; a hung rank counts as a dead one."""
    dice = random.Random(SEED)
    pauses = []
    with Stack(workers=2, env={"HEADRACE_LEASE_MS": "3000"}, each=SHAPES) as stack:
        client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0)
        prompts = [f"Here is story number {n}. Once upon a time" for n in range(min(KILLS, 4))]
        expected = {p: await read(client, p, []) for p in prompts}
        for number in range(KILLS):
            prompt = prompts[number % len(prompts)]
            times: list[float] = []
            reading = asyncio.create_task(read(client, prompt, times))
            while len(times) < 5 + dice.randrange(11):
                await asyncio.sleep(0.005)
            victim = await streaming_worker(stack)
            ranks = ranks_of(stack.processes[victim].pid)
            assert len(ranks) == 2, "a worker of two ranks is two processes"
            which = dice.randrange(2)
            # one that is stopped gives no sign of life, and is no use to the others
            how = signal.SIGSTOP if which and number % 3 == 2 else signal.SIGKILL
            os.kill(ranks[which], how)
            assert await reading == expected[prompt], (
                f"seed {SEED}, {how.name} {number} of rank {which}"
            )
            pauses.append(max(b - a for a, b in pairwise(times)))
            code = await asyncio.to_thread(stack.processes.pop(victim).wait, 20)
            assert code != 0, "a worker without a rank does not end well"
            async with asyncio.timeout(5):
                while not all(is_gone(pid) for pid in ranks):
                    await asyncio.sleep(0.02)
            stack.start_worker(**SHAPES[(number + 2) % len(SHAPES)])
            await asyncio.to_thread(stack.wait_ready, 2)
        await stack.wait_idle()
        await client.close()
    pauses.sort()
    print(f"{KILLS} kills, longest pause median {pauses[len(pauses) // 2]:.2f} s, "
          f"maximum {pauses[-1]:.2f} s")  # fmt: skip
