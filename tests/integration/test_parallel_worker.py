"""Workers of several ranks, through gateway and Redis: the same text as from one process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from support.namespaces import two_hosts
from support.stack import Stack

PROMPTS = ["Here is a story. Once upon a time", "1, 2, 3, 4,", "def add(a, b):"]


@pytest.fixture(scope="module")
def own_stack() -> Iterator[Stack]:
    """A stack whose workers come and go; the cache service keeps blocks of one for the next."""
    with Stack(workers=1, env={"HEADRACE_LEASE_MS": "5000"}) as running:
        yield running


@pytest.fixture
async def own_client(own_stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{own_stack.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def texts(client: openai.AsyncOpenAI) -> list[str]:
    """Greedy continuations, all at a time."""
    answers = await asyncio.gather(
        *(
            client.completions.create(model="smollm2", prompt=p, max_tokens=24, temperature=0)
            for p in PROMPTS
        )
    )
    return [answer.choices[0].text for answer in answers]


def swap(stack: Stack, old: list[str]) -> None:
    """The new worker is there; the `old` processes go, so that it is asked."""
    stack.wait_ready(2)
    for name in old:
        stack.kill(name)


@pytest.mark.timeout(400)
async def test_every_split_says_the_same(own_stack: Stack, own_client: openai.AsyncOpenAI) -> None:
    """One process, two tensor ranks, two stages; then two hosts that torchrun joins."""
    expected = await texts(own_client)
    current = ["w1"]
    for env in ({"HEADRACE_TENSOR_PARALLEL": "2"}, {"HEADRACE_PIPELINE_PARALLEL": "2"}):
        name = own_stack.start_worker(**env)
        await asyncio.to_thread(swap, own_stack, current)
        assert await texts(own_client) == expected, env
        current = [name]
    try:
        hosts = two_hosts()
        first, second = hosts.__enter__()
    except PermissionError as error:
        pytest.skip(f"two tensor ranks and two stages did; no two hosts here: {error}")
    try:
        commands = [
            [
                *host.inside, "env", f"GLOO_SOCKET_IFNAME={host.device}",
                sys.executable, "-m", "torch.distributed.run",
                "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}",
                f"--master-addr={first.address}", "--master-port=29511", "--max-restarts=0",
            ]
            for number, host in enumerate((first, second))
        ]  # fmt: skip
        names = ["torchrun0", "torchrun1"]
        own_stack.start_torchrun(
            names, commands, HEADRACE_TENSOR_PARALLEL="2", HEADRACE_CACHE_URL=""
        )
        await asyncio.to_thread(own_stack.wait_lease, names[0])
        for name in current:
            own_stack.kill(name)
        assert await texts(own_client) == expected, "two hosts"
        for name in names:
            own_stack.stop(name)
    finally:
        hosts.__exit__(None, None, None)
