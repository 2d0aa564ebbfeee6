"""Workers of several ranks, through gateway and Redis: the same text as from one process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from headrace import keys
from headrace.streams import connect, parse_entries
from headrace.types import JobMoved
from headrace.wire_reports import decode_event
from support.namespaces import two_hosts
from support.stack import Stack

pytestmark = pytest.mark.skipif(
    "HEADRACE_TEST_RANKS" not in os.environ,
    reason="two minutes of two cores: HEADRACE_TEST_RANKS=1 asks for them",
)

STOP_S_MAX = 40
PROMPTS = ["Here is a story. Once upon a time", "1, 2, 3, 4,", "def add(a, b):"]


@pytest.fixture(scope="module")
def own_stack() -> Iterator[Stack]:
    """A stack whose workers come and go; the cache service keeps blocks of one for the next."""
    with Stack(workers=1, env={"HEADRACE_LEASE_MS": "15000"}) as running:
        yield running


@pytest.fixture
async def own_client(own_stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    """It asks again where the gateway has lost one worker and not heard yet of another."""
    url = f"{own_stack.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=5) as client:
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


@pytest.fixture(scope="module")
def expected(own_stack: Stack) -> list[str]:
    """What one process says."""

    async def ask() -> list[str]:
        url = f"{own_stack.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await texts(client)

    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, ask()).result()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("links", ["shared", "torch"])
@pytest.mark.parametrize("way", ["TENSOR", "PIPELINE"])
async def test_two_processes_say_the_same(
    own_stack: Stack, own_client: openai.AsyncOpenAI, expected: list[str], way: str, links: str
) -> None:
    """Two ranks that the worker starts itself, with common memory and without."""
    name = own_stack.start_worker(**{f"HEADRACE_{way}_PARALLEL": "2", "HEADRACE_RANK_LINKS": links})
    await asyncio.to_thread(own_stack.wait_lease, name)
    with logs_if_it_fails(own_stack, name):
        await only(own_stack, name)
        assert await texts(own_client) == expected
        code = own_stack.stop(name, STOP_S_MAX)
        assert code == 0, "an orderly stop is no loss of a rank"


@pytest.mark.timeout(400)
async def test_two_hosts_say_the_same(
    own_stack: Stack, own_client: openai.AsyncOpenAI, expected: list[str]
) -> None:
    """Two network namespaces that torchrun joins, a tensor rank on each."""
    with contextlib.ExitStack() as made:
        try:
            first, second = made.enter_context(two_hosts())
        except PermissionError as error:
            pytest.skip(f"no two hosts here: {error}")
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
        with logs_if_it_fails(own_stack, *names):
            await only(own_stack, *names)
            assert await texts(own_client) == expected
            for name in names:
                own_stack.stop(name, STOP_S_MAX)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("prompts", "streams"), [(2, 1), (1, 2), (2, 2)])
async def test_prompts_and_streams_apart_whatever_the_ranks_of_either_side(
    prompts: int, streams: int, expected: list[str]
) -> None:
    """Every job moves once with its KV, between workers of other numbers of ranks too."""
    each = [{"HEADRACE_TENSOR_PARALLEL": str(ranks)} for ranks in (prompts, streams)]
    env = {"HEADRACE_LEASE_MS": "15000"}
    with Stack(workers=2, roles=("prefill", "decode"), each=each, env=env) as stack:
        url = f"{stack.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert await texts(client) == expected
        assert await moved(stack) == len(PROMPTS)


async def moved(stack: Stack) -> int:
    """How many jobs have gone from one worker to another."""
    redis = connect(stack.valkey.url)
    rows = parse_entries(await redis.xrange(keys.events("smollm2")))
    await redis.aclose()
    events = [decode_event(row.data) for row in rows if row.kind == "e"]
    return sum(isinstance(event, JobMoved) for event in events)


@contextlib.contextmanager
def logs_if_it_fails(stack: Stack, *names: str) -> Iterator[None]:
    """What these workers said, beside the failure."""
    try:
        yield
    except BaseException:
        for name in names:
            print(f"--- {name}\n{stack.log_of(name)[-4000:]}")
        raise


async def only(stack: Stack, *names: str) -> None:
    """No worker but these, so that one of them is asked; the gateway may have had none before."""
    others = stack.processes.keys() - {*names, "cache"}
    for name in [name for name in others if not name.startswith("gateway")]:
        await asyncio.to_thread(stack.stop, name, STOP_S_MAX)
    async with asyncio.timeout(STOP_S_MAX):
        while (await asyncio.to_thread(stack.get, "/ready"))[0] != 200:
            await asyncio.sleep(0.05)
