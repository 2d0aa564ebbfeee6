"""One computation for the same request on several gateways: real ones, a real queue, no engine.

The worker is scripted: the test says which tokens it writes and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from redis.asyncio import Redis

from headrace import keys, wire
from headrace.types import Band, FinishReason, Job, Sampling, pack_tokens
from headrace_gateway.fleet import Fleet
from headrace_gateway.policy.sharing import Look, Rank, Watched, watch
from headrace_gateway.prompt_cache import Asked
from headrace_gateway.shared_flights import FOLLOWED_MAX
from support.api import MODEL, Running, ScriptedFleet, encode, make_record, running_gateway
from support.fleet import ScriptedWorker, eventually
from support.stack import free_port
from support.valkey import Valkey

KEYS = "k-red:red prompt_entries=true"
RECORD = make_record()
TEXT = "the quick brown fox jumps over the lazy dog"
TOKENS = [*encode(TEXT), 2]
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@dataclass
class Stream:
    """One client's answer as it comes."""

    task: asyncio.Task[None]
    chunks: list[dict[str, Any]]

    @property
    def text(self) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", [])]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def usage(self) -> dict[str, Any]:
        found: dict[str, Any] = self.chunks[-1]["usage"]
        return found

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def ask(http: aiohttp.ClientSession, **body: Any) -> Stream:
    chunks: list[dict[str, Any]] = []

    async def read() -> None:
        headers = {"Authorization": "Bearer k-red"}
        async with http.post("/v1/chat/completions", json=CHAT | body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            async for raw in answer.content:
                line = raw.decode().strip().removeprefix("data: ")
                if line.startswith("{"):
                    chunks.append(json.loads(line))

    return Stream(asyncio.create_task(read()), chunks)


class Mill:
    """A scripted worker, and gateways of one queue."""

    def __init__(
        self, worker: ScriptedWorker, gateways: list[Running], fleets: list[Fleet]
    ) -> None:
        self.worker = worker
        self.gateways = gateways
        self.fleets = fleets

    async def job(self, number: int = 0) -> tuple[str, Job]:
        """The job that was handed to the worker as number `number`, once it was."""
        async with asyncio.timeout(10):
            while len(jobs := await self.worker.jobs()) <= number:
                await asyncio.sleep(0.01)
        return jobs[number]

    async def say(self, job: Job, first: int, last: int) -> None:
        await self.worker.write(job, first, *TOKENS[first:last])

    async def end(self, entry: str, job: Job, first: int) -> None:
        assert await self.worker.finish(entry, job, first, *TOKENS[first:])

    async def followed(self, gateway: int, number: int = 1) -> None:
        await eventually(lambda: self.fleets[gateway].counts()["followed_flights"] == number)


@asynccontextmanager
async def mill(valkey: Valkey, redis: Redis, gateways: int = 2) -> AsyncIterator[Mill]:
    worker = ScriptedWorker(redis, "w", model=RECORD, max_jobs=8, tokens=10_000)
    await worker.join()
    async with AsyncExitStack() as stack:
        fleets = [Fleet(valkey.url, f"g{at}") for at in range(gateways)]
        made = []
        for fleet in fleets:
            await fleet.start()
            stack.push_async_callback(fleet.stop)
            as_seam = cast(ScriptedFleet, fleet)
            made.append(await stack.enter_async_context(running_gateway(as_seam, api_keys=KEYS)))
        await eventually(lambda: not any(fleet.ready() for fleet in fleets))
        yield Mill(worker, made, fleets)
        for fleet in fleets:
            for channel in fleet._channels.values():
                channel.flights.check_integrity()
        await eventually(lambda: not any(sum(fleet.counts().values()) for fleet in fleets))


async def test_the_same_request_on_two_gateways_is_one_job(valkey: Valkey, redis: Redis) -> None:
    """The second comes late, misses nothing, and has its own id and usage."""
    async with mill(valkey, redis) as m:
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        await m.say(job, 0, 3)
        await eventually(lambda: first.text)
        second = ask(m.gateways[1].http)
        await m.followed(1)
        third = ask(m.gateways[1].http)
        await eventually(lambda: len(m.gateways[1].gateway.turns) == 2)
        await m.say(job, 3, 5)
        await m.end(entry, job, 5)
        for each in (first, second, third):
            await each.task
            assert each.text == TEXT
            assert each.usage["completion_tokens"] == len(TOKENS)
        assert len({each.chunks[0]["id"] for each in (first, second, third)}) == 3
        assert first.usage["prompt_tokens_details"]["cached_tokens"] == 0
        for each in (second, third):
            prompt = each.usage["prompt_tokens"]
            assert each.usage["prompt_tokens_details"]["cached_tokens"] == prompt
        assert not await m.worker.jobs()
        metrics = m.gateways[1].gateway.metrics.render().decode()
        assert f'prompt_answers_total{{model="{MODEL}",way="followed"}} 2.0' in metrics
        assert not await redis.keys("headrace:*:flight:*")


async def test_the_last_reader_anywhere_ends_the_job(valkey: Valkey, redis: Redis) -> None:
    """The leader's client leaves and hurts nobody; with the last one the job is cancelled."""
    async with mill(valkey, redis) as m:
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        second = ask(m.gateways[1].http)
        await m.followed(1)
        await first.leave()
        await eventually(lambda: not m.gateways[0].gateway.turns)
        await m.fleets[0]._channels[MODEL].settle()
        assert not await m.worker.entries("cancel")
        await m.say(job, 0, 4)
        await eventually(lambda: len(second.text) > 3)
        third = ask(m.gateways[0].http)
        await m.followed(0)
        await second.leave()
        await m.say(job, 4, 6)
        await eventually(lambda: len(third.text) > 10)
        assert not await m.worker.entries("cancel")
        await third.leave()

        async def cancelled() -> bool:
            return bool(await m.worker.entries("cancel"))

        await eventually(cancelled)
        assert await m.worker.finish(entry, job, 6)
        assert len(await m.worker.jobs()) == 0


async def test_what_breaks_is_taken_over_once(valkey: Valkey, redis: Redis) -> None:
    """The leader's job fails: one follower goes on after the tokens of all, and is followed."""
    async with mill(valkey, redis, gateways=3) as m:
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        await m.say(job, 0, 3)
        others = [ask(g.http) for g in m.gateways[1:]]
        await m.followed(1)
        await m.followed(2)
        await eventually(lambda: all(each.text for each in [first, *others]))
        assert await m.worker.finish(entry, job, 3, reason=FinishReason.ERROR)
        await first.task
        assert "error" in first.chunks[-1]
        entry, next_job = await m.job()
        assert list(next_job.logged) == TOKENS[:3]
        assert next_job.id != job.id
        await eventually(lambda: sum(f.counts()["followed_flights"] for f in m.fleets) == 1)
        await m.say(next_job, 3, 5)
        await m.end(entry, next_job, 5)
        for each in others:
            await each.task
            assert each.text == TEXT
            assert each.usage["completion_tokens"] == len(TOKENS)
        assert not await m.worker.jobs()


async def test_a_cancelled_or_lost_job_is_taken_over(valkey: Valkey, redis: Redis) -> None:
    """Cancelled without a word in the log, then gone from the queue: watched, not waited for."""
    async with mill(valkey, redis) as m:
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        await m.say(job, 0, 3)
        second = ask(m.gateways[1].http)
        await m.followed(1)
        await redis.hset(keys.job(MODEL, job.id), "cancelled", 1)
        entry_2, job_2 = await m.job(1)
        assert list(job_2.logged) == TOKENS[:3]
        await m.end(entry, job, 3)
        await first.task
        await m.end(entry_2, job_2, 3)
        await second.task
        assert first.text == second.text == TEXT


async def test_a_better_band_does_not_wait_for_another_gateway(
    valkey: Valkey, redis: Redis
) -> None:
    """It computes for itself, and who comes later follows it."""
    async with mill(valkey, redis) as m:
        batch = ask(m.gateways[0].http, service_tier="flex")
        first = await m.job()
        urgent = ask(m.gateways[1].http, service_tier="priority")
        second = await m.job(1)
        assert [first[1].band, second[1].band] == [Band.BATCH, Band.INTERACTIVE]
        late = ask(m.gateways[0].http)
        await m.followed(0)
        for entry, job in (second, first):
            await m.end(entry, job, 0)
        for each in (batch, urgent, late):
            await each.task
            assert each.text == TEXT


async def test_unreadable_claims_and_full_tables_cost_a_computation(
    valkey: Valkey, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that nobody can read, one of other tokens, and no room to follow."""
    async with mill(valkey, redis) as m:
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        [name] = await redis.keys("headrace:*:flight:*")
        for payload in (b"\xc1", b"", wire.pack({"g": "g0", "b": 9, "p": 0, "t": b""})):
            await redis.hset(name, "payload", payload)
            second = ask(m.gateways[1].http)
            other_entry, other = await m.job(1)
            await m.end(other_entry, other, 0)
            await second.task
            assert second.text == TEXT
        wrong = {"g": "g0", "b": 1, "p": 0, "t": wire.tokens_to_bytes([7, 8])}
        await redis.hset(name, "payload", wire.pack(wrong))
        flights = m.fleets[1].flights(MODEL)
        sampling = Sampling(max_tokens=9, temperature=0.0)
        mine = replace(job, id="mine", gateway="g1", sampling=sampling, logged=pack_tokens([7, 9]))
        asked = Asked(bytes.fromhex(name.decode().rpartition(":")[2]), mine, RECORD, _never)
        found = await flights.open(asked.key, mine, Rank(Band.BATCH, 0), _never, "")
        assert found.followed
        with pytest.raises(Exception, match="other tokens"):
            await found.source.next()
        await redis.delete(name)
        await m.end(entry, job, 0)
        await first.task
        monkeypatch.setattr("headrace_gateway.shared_flights.FOLLOWED_MAX", 0)
        first = ask(m.gateways[0].http)
        entry, job = await m.job()
        second = ask(m.gateways[1].http)
        other_entry, other = await m.job(1)
        await m.end(entry, job, 0)
        await m.end(other_entry, other, 0)
        await asyncio.gather(first.task, second.task)
    assert FOLLOWED_MAX > 1


async def _never(job: Job) -> Any:
    raise AssertionError("it is followed")


async def test_the_leaders_gateway_dies(valkey: Valkey, redis: Redis, tmp_path: Path) -> None:
    """kill -9: its job runs on in its worker, the other gateway's client gets every token once."""
    worker = ScriptedWorker(redis, "w", model=RECORD, max_jobs=8, tokens=10_000)
    await worker.join()
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(_process(valkey, at)) for at in range(2)]
        m = Mill(worker, [], [])
        first = ask(gateways[0][1])
        entry, job = await m.job()
        await m.say(job, 0, 3)
        second = ask(gateways[1][1])
        await eventually(lambda: first.text and second.text)
        gateways[0][0].kill()
        gateways[0][0].wait()
        await asyncio.gather(first.task, return_exceptions=True)
        await m.say(job, 3, 6)
        late = ask(gateways[1][1])
        await eventually(lambda: late.text)
        await m.end(entry, job, 6)
        await asyncio.gather(second.task, late.task)
        assert second.text == late.text == TEXT
        assert not await worker.jobs()


@asynccontextmanager
async def _process(
    valkey: Valkey, number: int
) -> AsyncIterator[tuple[subprocess.Popen[bytes], aiohttp.ClientSession]]:
    """A gateway as a process of its own, and a client of it; it is ready."""
    port = free_port()
    settings = {
        "REDIS_URL": valkey.url, "PORT": str(port), "HOST": "127.0.0.1",
        "GATEWAY_ID": f"g{number}", "API_KEYS": KEYS,
    }  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    process = subprocess.Popen(  # noqa: ASYNC220  # one spawn, before anything runs
        [sys.executable, "-m", "headrace_gateway"],
        env=env | {f"HEADRACE_{name}": value for name, value in settings.items()},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:

        async def ready() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get("/ready") as answer:
                    return answer.status == 200
            return False

        try:
            await eventually(ready, 30)
            yield process, http
        finally:
            process.kill()
            process.communicate()


def looks(*each: Look) -> Watched:
    watched = Watched()
    for look in each:
        watched = watch(watched, look)
    return watched


RUNS = Look(claimed=True, known=True)


@pytest.mark.parametrize(
    ("seen", "lost"),
    [
        ([RUNS] * 9, ""),
        ([RUNS, *[RUNS._replace(claimed=False)] * 9], ""),
        ([Look(True, False)] * 9, ""),
        ([Look(True, False), Look(False, False)], "it was never accepted"),
        ([RUNS, Look(True, False)], ""),
        ([RUNS, Look(True, False), RUNS, Look(True, False)], ""),
        ([RUNS, *[Look(True, False)] * 2], "the queue has lost it"),
        ([RUNS._replace(cancelled=True)], ""),
        ([RUNS._replace(cancelled=True)] * 2, "it was cancelled"),
        ([RUNS._replace(cancelled=True, done=True)] * 4, ""),
        ([RUNS._replace(done=True)] * 5, "its finish has not come"),
    ],
)
def test_when_a_job_elsewhere_counts_as_lost(seen: list[Look], lost: str) -> None:
    """Its gateway may be gone for ever; what counts is what the queue knows of the job."""
    assert looks(*seen).lost == lost


def test_ranks_keep_their_order_as_numbers() -> None:
    ranks = [Rank(band, priority) for band in Band for priority in (-99, 0, 1, 99)]
    assert [rank.number for rank in ranks] == sorted(rank.number for rank in ranks)
    assert len({rank.number for rank in ranks}) == len(ranks)
